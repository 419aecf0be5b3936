"""Pre-training (3.5, A.1.2): python train.py [--data demo] [--arch vit_t] [--method dirl].

Prepares what is missing (tiles, cells), pre-trains with DINO on the method's representations and writes
runs/<data>_<arch>_<method>/: checkpoint.pt, encoder.pt (the teacher's encoder), log.csv, config.json.
The same command resumes a stopped run; every step draws its random numbers from (seed, step).
torchrun --nproc_per_node=N -- train.py ... shares each batch among N processes, one a GPU.
"""
import math
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import dirl
from common.benchmark import WARM_UP, Parts
from common.classify import nearest
from common.curves import plot_runs
from common.datasets import DATASETS, run_name
from common.encoders import (
    attention_of,
    check_init,
    in_batches,
    represent,
    start_encoder,
    stats_of_crops,
    use_bf16,
)
from common.errors import InputError, exit_code_of, print_skipped, run_script
from common.figures import spread
from common.flags import arguments, default_run
from common.pack import Packed
from common.parallel import limits_of
from common.processes import any_of, first_before_others, join, leave, processes, rank
from common.run import Log, Run
from data import Crops, PartOfBatch, collate, find_data, make_views
from wsi.demo import make_demo
from wsi.folders import what_was_seen
from wsi.prepare import crop_mpp, describe_cells, load_crops, prepare, warn_of_cell_files

# ---------------------------------------------------------------- schedules, gradients, order

def cosine(peak, end, step, steps, warmup=0):
    """The schedule at a step: linear from 0 to peak over warmup steps, then half a cosine to end."""
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2


def clip_gradients(parameters, limit):
    """Clips each parameter's gradient to limit, as DINO does (0: not at all); a tensor: are all finite?"""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if limit:
        torch._foreach_mul_(grads, list((limit / (norms + 1e-6)).clamp(max=1)))
    return norms.isfinite().all()


def batches(count, batch, start, steps, seed, part=(0, 1)):
    """Crop indices for steps start to steps; each epoch in its own order, without its incomplete batch.

    part: (number, count) of this process, which takes its part of each batch.
    """
    per_epoch, order, epoch = count // batch, None, None
    index, size = part[0], batch // part[1]
    for step in range(start, steps):
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        k = step % per_epoch
        first = k * batch + index * size
        yield order[first: first + size]


# ---------------------------------------------------------------- data, models, optimiser

def training_crops(args):
    """The data set, its crops that are trained on, what was skipped, and what the encoder will have seen."""
    with first_before_others():
        if args.data == "demo":
            make_demo(Path("datasets/demo"), workers=args.workers)
        found = find_data(args.data, args.mpp, args.prior, args.split_seed, slide_mpp=args.slide_mpp)
        warn_of_cell_files(found)
        failed = prepare(found, args.tissue, args.workers, limits_of(args))
    print_skipped(failed)
    names = found.split("train", "val") + found.unlabelled()
    crops = Crops(found, names, shuffle_seed=args.seed if args.shuffle_prior else None)
    if not len(crops):
        raise InputError(failed[0] if failed else
                         f"{found.source}: no crop in it to train on; see python data.py check")
    print(describe_cells(len(crops.xy), len(crops), crops.priors().mean().item(), crop_mpp(found)))
    owners = crops.owner
    if args.pack:
        with first_before_others():
            crops = Packed(crops, found.work / f"packed_{found.mpp:g}um.npy")
    if args.fraction < 1:
        order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(args.seed)).tolist()
        kept = sorted(order[: max(1, round(args.fraction * len(crops)))])
        crops, owners = Subset(crops, kept), [owners[i] for i in kept]
    if args.stats == "data":
        args.pixels = stats_of_crops(torch.stack([crops[i][0] for i in spread(len(crops), 128)]))
    if len(crops) < args.batch:
        raise InputError(f"--batch {args.batch}: there are only {len(crops)} training crops; lower --batch")
    return found, crops, failed, what_was_seen(found, sorted(set(owners)))


def build_models(args):
    """Student, teacher and the loss of every head, on the device; seeded."""
    encoder = start_encoder(args)
    student = dirl.DiRL(encoder, args.method, args.out_dim, args.disentangled_dim, args.norm_last_layer)
    student = student.to(args.device)
    loss_fn = dirl.DiRLLoss(student, args.lambda_1, args.lambda_2, args.student_temp, args.center_momentum,
                            skip_empty=args.empty_regions == "skip").to(args.device)
    return student, dirl.make_teacher(student), loss_fn


def build_optimizer(student):
    """AdamW with weight decay on everything but biases and norms, as DINO."""
    parameters = list(student.parameters())
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    biases_and_norms = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, biases_and_norms], fused=True)


def teacher_temperature(args, step, per_epoch):
    """Of the teacher at a step: linear over the warm-up, where DINO's goes up epoch by epoch."""
    warmup, start = args.warmup_teacher_temp_epochs * per_epoch, args.warmup_teacher_temp
    return args.teacher_temp if step >= warmup else start + step / warmup * (args.teacher_temp - start)


def set_schedules(optimizer, args, step, steps, per_epoch):
    """Sets this step's learning rate and weight decay; gives rate, teacher's momentum and temperature."""
    rate = cosine(args.lr * args.batch / 256, args.min_lr, step, steps, args.warmup_epochs * per_epoch)
    decay = cosine(args.weight_decay, args.weight_decay_end, step, steps)
    optimizer.param_groups[0].update(lr=rate, weight_decay=decay)
    optimizer.param_groups[1].update(lr=rate)
    return rate, cosine(args.momentum, 1, step, steps), teacher_temperature(args, step, per_epoch)


def freeze_last_layers(student):
    """Drops the gradient of every head's last layer, so that the optimiser leaves it as it is."""
    for head in student.heads.values():
        head.last_layer.weight.grad = None
        if head.last_norm is not None:
            head.last_norm.grad = None


def parts_of(images, cells, args):
    """This process's crops of a batch in --accumulate parts: (images, cells, (number, count) of the part)."""
    count, first = processes() * args.accumulate, rank() * args.accumulate
    chunks = zip(images.chunk(args.accumulate), cells.chunk(args.accumulate))
    for k, (some, their_cells) in enumerate(chunks):
        yield some, their_cells, (first + k, count)


def views_of_step(images, cells, args, step, part=(0, 1)):
    """The views of a part of the step's batch, and their priors.

    Drop path and views have random streams of their own, seeded by (seed, step), so that a resumed run draws
    what the uninterrupted one does; the primes keep the seeds of different runs apart. A crop's views do not
    depend on how the batch is divided.
    """
    torch.manual_seed(args.seed * 1_000_003 + step + part[0] * 15_485_863)  # drop path
    generator = PartOfBatch(args.device).manual_seed(args.seed * 1_000_003 + step + 500_009)
    generator.part = part
    return draw_views(images, cells, generator, args, args.local_crops)


def draw_views(images, cells, generator, args, local_crops):
    """make_views with the flags of a run."""
    return make_views(
        images, cells, generator, local_crops, args.global_scale, args.local_scale, args.global_size,
        args.local_size, args.jitter, args.greyscale, args.solarize, args.blur, args.pixels,
        counts=getattr(args, "counts", False))  # L_sup of experiments alone asks for them


CONTRAST_CROPS = 64


@torch.no_grad()
def contrast_of_views(encoder, crops, args):
    """Variance of f between crops over its variance between two global views of a crop.

    Both are sums over the d features, over at most CONTRAST_CROPS crops; a crop counts by the mean of its two
    views, so that crops which do not differ give 1/2. Runs that learn start at 0.4 to 0.75, so a value below
    1 is no fault. The views have a random stream of their own, so that training's numbers stay as they are.
    """
    images, cells = collate([crops[i] for i in spread(len(crops), CONTRAST_CROPS)])
    generator = torch.Generator(args.device).manual_seed(args.seed)
    (views,), _ = draw_views(images, cells, generator, args, local_crops=0)  # (2, N, 3, H, W)
    f = torch.stack([encoder(view).mean(1) for view in views])  # (2, N, d)
    between = f.mean(0).var(0, correction=1).sum()
    within = f.var(0, correction=1).mean(0).sum()
    return (between / within.clamp(min=1e-12)).item()


# ---------------------------------------------------------------- the probe

def read_probe(folder, count, seed):
    """(images, labels) of the training part of --probe and of its test part, at most count each; classes."""
    if folder not in DATASETS and not Path(folder).is_dir():
        raise InputError(f"--probe {folder}: is missing; a folder of images with labels.csv is expected")
    found, out = find_data(folder), []
    if not found.labels or found.kind != "crops":
        raise InputError(f"--probe {folder}: a folder of images with labels.csv (image,label,split) "
                         "is expected")
    generator = torch.Generator().manual_seed(seed)
    for part in (("train", "val"), ("test",)):
        names = [name for name, row in found.labels.items() if row["split"] in part]
        names = [names[i] for i in torch.randperm(len(names), generator=generator)[:count].tolist()]
        images, good, failed = load_crops([found.images[name] for name in names], 4)
        print_skipped(failed)
        if len(good) < 20:
            raise InputError(f"--probe {folder}: {len(good)} {part[0]} images can be read; "
                             "at least 20 are needed")
        labels = [found.classes.index(found.labels[names[i]]["label"]) for i in good]
        out.append((images, np.array(labels)))
    return *out, len(found.classes)


def probe(encoder, train_set, test_set, classes):
    """Shares of the test tokens in the bins of Fig. 4, and the accuracy of 20 nearest neighbours on f."""
    train, test = (in_batches(lambda x: represent(encoder, x), images, 64).numpy()
                   for images, _ in (train_set, test_set))
    aggregated = in_batches(lambda x: attention_of(encoder, x), test_set[0], 64)
    said = nearest(train, train_set[1], test, classes).argmax(1)
    return *dirl.attention_bins(aggregated), (said == test_set[1]).mean()


HANDFUL = 32  # crops on which the features' rank is taken


@torch.no_grad()
def effective_rank(features):
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), features (N, d) centred.

    1 where all features lie on a line, at most min(N - 1, d); 0 where they are all the same, NaN where one is
    not finite.
    """
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features.cpu() - features.cpu().mean(0))
    if values[0] <= 1e-6 * features.norm().cpu():
        return 0.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


def handful_of(crops):
    """HANDFUL of the crops (N, 3, H, W), which the features' rank is taken on."""
    return torch.stack([crops[i][0] for i in spread(len(crops), HANDFUL)])


def watch(encoder, handful, probe_sets, args, step, steps, per_epoch):
    """(the features' rank on a handful of crops, probe's result) after a step; None for what is not due."""
    if rank():
        return None, None  # of several processes the first watches
    of_features = effective_rank(represent(encoder, handful)) if step % per_epoch == 0 else None
    due = step == steps or step % (per_epoch * args.probe_epochs) == 0
    return of_features, probe(encoder, *probe_sets) if probe_sets and due else None


# ---------------------------------------------------------------- training

@contextmanager
def stop_signals():
    """A list that SIGINT, SIGTERM and SIGHUP fill while the block runs, instead of ending the program."""
    stop = []
    old = {number: signal.signal(number, lambda *_: stop.append(1))
           for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def loader_of(crops, args, start, steps):
    """Batches of crops with their cells, from step start to the last, or for --max-steps."""
    last = steps if args.max_steps is None else min(steps, start + args.max_steps)
    cuda = torch.device(args.device).type == "cuda"
    mine = batches(len(crops), args.batch, start, last, args.seed, (rank(), processes()))
    return DataLoader(crops, batch_sampler=mine, collate_fn=collate,
                      num_workers=args.workers if cuda else 0, pin_memory=cuda)


def teach(teacher, views, priors):
    """The targets: only the global views, views[0], pass through the teacher (SelfPatch's sees all)."""
    sizes = getattr(teacher, "sizes", 1)
    with torch.no_grad():
        return teacher(views[:sizes], priors[:sizes])


def train(args, build=build_models):
    """Trains what build(args) gives (student, teacher, loss), as build_models does; gives the exit code."""
    # Data: crops with their cells, of the training and validation parts only. A bad --probe is refused first.
    probe_sets = read_probe(args.probe, args.probe_images, args.seed) if args.probe else None
    found, crops, failed, trained_on = training_crops(args)
    per_epoch = len(crops) // args.batch
    steps = args.epochs * per_epoch
    handful = handful_of(crops)

    # Models: a student and its momentum teacher, with a head and a centre for each representation.
    student, teacher, loss_fn = build(args)
    optimizer = build_optimizer(student)

    # Files: a stopped run is resumed, if its settings are the same.
    run = Run(args, run_name(args.data), crop_mpp(found), len(crops), trained_on,
              student=student, teacher=teacher, loss=loss_fn, optimizer=optimizer)
    step = start = run.resume()
    announce(args, run, found, steps, start, teacher.encoder, crops)
    model = DistributedDataParallel(student) if processes() > 1 else student
    model = torch.compile(model) if args.compile else model

    with run, Log(args, run, loss_fn.losses, start, steps, per_epoch) as log, stop_signals() as stop:
        for images, cells in loader_of(crops, args, start, steps):
            # Schedules: learning rate, weight decay, the teacher's momentum and temperature.
            _, momentum, temperature = schedule = set_schedules(optimizer, args, step, steps, per_epoch)
            optimizer.zero_grad(set_to_none=True)

            # The batch in parts that fit into memory: one, unless --accumulate says otherwise.
            for k, (images, cells, part) in enumerate(parts_of(images, cells, args), 1):
                # Views of every crop; the cells go through the same crop and flip as the pixels (3.2).
                views, priors = views_of_step(images, cells, args, step, part)

                # Only the global views, views[0], pass through the teacher; all pass through the student.
                with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                    target = teach(teacher, views, priors)
                    output = model(views, priors)

                # Eq. 9 over all pairs of views, in fp32 from here on; the centres move once a step.
                loss, each = loss_fn(output, target, temperature, move_center=k == args.accumulate)
                (loss / args.accumulate).backward()
                log.add(loss, each, priors)

            # Every parameter's gradient is clipped on its own; the last layers are frozen in the first epoch.
            finite = clip_gradients(list(student.parameters()), args.clip)
            if step < args.freeze_last_layer * per_epoch:
                freeze_last_layers(student)
            optimizer.step()

            # The teacher follows the student: theta_t = m theta_t + (1 - m) theta_s.
            dirl.update_teacher(student, teacher, momentum)

            # The log, at an epoch's end the features' rank and the probe, and now and then a checkpoint.
            step += 1
            seen = watch(teacher.encoder, handful, probe_sets, args, step, steps, per_epoch)
            log.write(step - 1, finite, schedule, *seen)
            run.save_if_due(step, per_epoch, log)
            if any_of(stop, run.device):
                break
        if step > start:
            run.save(step, log)
    return finish(args, run, log, step, steps, failed, stop)


def announce(args, run, found, steps, start, encoder, crops):
    """Prints what is about to run, and for a new run the ratio of contrast_of_views."""
    print(f"{run.config['crops']} crops of {len(run.seen['images'])} {found.kind}, {steps} steps of "
          f"{args.batch} ({args.epochs} epochs), {args.method} {args.arch} on {args.device} "
          f"in {run.config['precision']}"
          + (f"; resumed at step {start}" if 0 < start < steps else ""))
    if not start:
        print(f"at the start f varies {contrast_of_views(encoder, crops, args):.2f} times as much between "
              "crops as between two views of one")


def finish(args, run, log, step, steps, failed, stop):
    """Prints what was written and what to run next; returns the exit code."""
    speed = f", {log.speed(step):.1f} crops a second" if step > log.start else ""
    if step < steps:
        print(f"Stopped at step {step} of {steps}{speed}; "
              f"the same command resumes from {run.folder}/checkpoint.pt.")
    else:
        where = "" if args.run == default_run(args) else f" --checkpoint {run.folder}/encoder.pt"
        done = (f"Wrote {run.folder}/encoder.pt, checkpoint.pt and log.csv ({steps} steps{speed})"
                if step > log.start else f"{run.folder} had finished its {steps} steps; nothing was trained")
        print(f"{done}. Next: python eval.py --data {args.data}{where}")
    code = exit_code_of(failed)
    return 130 if stop else code


# ---------------------------------------------------------------- benchmark

def benchmark(args, build=build_models):
    """--benchmark STEPS: prints what each part of a step takes with the flags given; gives 0."""
    _, crops, _, _ = training_crops(args)
    student, teacher, loss_fn = build(args)
    optimizer, parts = build_optimizer(student), Parts(args.device)
    bf16, args.max_steps = use_bf16(args.precision, args.device), WARM_UP + args.benchmark
    for head in student.heads.values():
        parts.within(head, "student's heads")
    loader = iter(loader_of(crops, args, 0, args.max_steps))
    for step in range(args.max_steps):
        with parts.part("crops read"):
            images, cells = next(loader)
        with parts.part("views and priors"):
            views, priors = views_of_step(images, cells, args, step)
        with torch.autocast(parts.device.type, torch.bfloat16, enabled=bf16):
            with parts.part("teacher"):
                target = teach(teacher, views, priors)
            with parts.part("student's encoder and block"):
                output = student(views, priors)
        with parts.part("loss"):
            loss, _ = loss_fn(output, target, args.teacher_temp)
        with parts.part("backward"):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with parts.part("clipping and optimiser"):
            clip_gradients(list(student.parameters()), args.clip)
            set_schedules(optimizer, args, step, 1000, 100)
            optimizer.step()
        with parts.part("teacher's update"):
            dirl.update_teacher(student, teacher, args.momentum)
    parts.report(args.batch, args.benchmark, f"{args.method} {args.arch}, batch {args.batch}, "
                 f"2 + {args.local_crops} views of {args.global_size} and {args.local_size} px, "
                 f"{'bf16' if bf16 else 'fp32'}")
    return 0


def run_command(args, build):
    if args.plot:
        return plot_runs(args.plot)
    join(args)
    check_init(args)  # now, rather than after hours of tiling
    return benchmark(args, build) if args.benchmark else train(args, build)


def main(argv=None):
    torch.set_flush_denormal(True)  # denormal numbers are slow on a CPU
    try:
        return run_script("train.py", lambda: run_command(arguments(argv), build_models),
                          "--batch or --local-crops", "finished slides stay, run it again to go on")
    finally:
        leave()


if __name__ == "__main__":
    sys.exit(main())
