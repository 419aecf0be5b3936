"""Pre-training (3.5, A.1.2): python train.py [--data demo] [--method dirl].

Prepares missing tiles, and cells unless the method is the baseline; pre-trains with DINO on the method's
representations, and writes runs/<data>_<arch>_<method>/: checkpoint.pt, encoder.pt (the teacher's encoder),
log.csv, config.json. The same command resumes a run: each step draws its random numbers from (seed, step).
torchrun --nproc_per_node=N -- train.py ... shares each batch among N processes, one per GPU.
"""
import argparse
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import dirl
from common import encoders, optimization
from common.checkpoint import Run
from common.distributed import any_of, device_of_process, first_before_others, join, leave, processes, rank
from common.errors import InputError, Parser, exit_code_of, print_skipped, run_script, stop_signals
from common.files import check_writable, stamp
from common.flags import RUNNING, SEED, SHARE, between, running_flags, side, whole, words_of
from common.log import Log
from common.watch import contrast, effective_rank, probe
from data import Augmentation, Crops, collate, images_of, make_views, share_of, spread
from demo.slides import make_demo
from wsi.cache import crop_mpp, prepare, warn_of_cell_files
from wsi.datasets import DATASETS, DEMO, NO_CELLS, OWN, add_data_flags, cutting_flags, run_name, split_flags
from wsi.folders import Data
from wsi.splits import find_data, read_probe, training_record, warn_of_untestable

# ---------------------------------------------------------------- flags: the paper's and DINO's values

def argument_parser(prog="python train.py"):
    """Returns the parser of train.py; experiments add flags to it. Epochs and um/px: wsi/datasets.py."""
    parser = Parser(
        prog=prog, allow_abbrev=False, parents=[running_flags()],
        description="Pre-trains DiRL; the same command again resumes a stopped run.",
        epilog=f"--data demo replaces these defaults: {words_of(DEMO)}")
    parser.set_defaults(ssl="dino")  # experiments.compare adds the flag, with other objectives

    add = parser.add_argument_group("data").add_argument
    add_data_flags(add)
    add("--shuffle-prior", action="store_true",
        help="moves the cell patches of each crop to random places in the crop, as a control")
    add("--fraction", type=between(1e-9, 1), default=1.0, help="share of the training crops to use (Fig. 6)")

    add = parser.add_argument_group("model").add_argument
    add("--method", default="dirl", choices=list(dirl.METHODS),
        help="baseline is DINO; cellback is DiRL without the disentangle block")
    add("--arch", default="vit_t", choices=list(dirl.ARCHS), help="encoder; vit_s for 10^5 crops or more")
    add("--depth", type=whole(1, encoders.MAX_DEPTH), help="blocks of the encoder; default: those of --arch")
    add("--init", metavar="FILE",
        help="weights that the encoder starts from: an encoder.pt, a state dict with timm's or DINO's names, "
             "or DINO's checkpoint.pth (vit_tiny, vit_small, patch 16); worth it with a few thousand crops")
    add("--out-dim", type=whole(2, 10 ** 7), default=65536,
        help="outputs K of the heads of f, f_c and f_b; fewer for small data sets")
    add("--disentangled-dim", type=whole(2, 10 ** 7), default=4096, help="outputs of the other four heads")
    add("--norm-last-layer", action=argparse.BooleanOptionalAction, default=True,
        help="keeps the prototypes' norms at 1; DINO found learning them better for ViT-S, but less stable")
    add("--drop-path", type=between(0, 0.99), default=0.1, help="stochastic depth of the student's encoder")

    add = parser.add_argument_group("views").add_argument
    add("--local-crops", type=whole(0, 100), default=8, help="local views per crop; 0: the two-view setting")
    add("--global-scale", type=SHARE, nargs=2, default=(0.4, 1.0),
        help="smallest and largest area of a global view, as shares; DINO has 0.14 1 with --local-crops 0")
    add("--local-scale", type=SHARE, nargs=2, default=(0.05, 0.4), help="the same for the local views")
    add("--global-size", type=side, default=224,
        help="side of the global views in px, a multiple of 16; 112 is 4 times faster but coarser")
    add("--local-size", type=side, default=96, help="side of the local views in px, a multiple of 16")
    add("--stats", default="imagenet", choices=["imagenet", "data", "init"],
        help="mean and sd that normalise the pixels: ImageNet's as in DINO, those in the file of --init, or "
             "the training crops' own (data), with which small runs on H&E learn sooner")
    add("--jitter", type=between(0, 2), default=1.0,
        help="factor on the strengths of colour jitter and, below 1, on its probability: 0 is none, 1 "
             "DINO's, 2 near SimCLR's; lower it if a head's outputs stay uniform")
    add("--greyscale", type=SHARE, default=1.0, help="factor on the probability of grey (DINO: 1 view in 5)")
    add("--solarize", type=SHARE, default=1.0, help="the same for solarising the second global view (1 in 5)")
    add("--blur", type=SHARE, default=1.0, help="the same for blur (global views: 1 and 0.1, local: 0.5)")

    add = parser.add_argument_group("loss").add_argument
    add("--lambda-1", type=between(0, 100), default=0.5, help="weight of L_c and L_b in eq. 9")
    add("--lambda-2", type=between(0, 100), default=0.1 / 4, help="weight of L_cc, L_bb, L_cb, L_bc in eq. 9")
    add("--empty-regions", default="skip", choices=["skip", "zeros"],
        help="views without cells, or without background: skip keeps them out of that region's loss; zeros "
             "counts them as zero features, as a control (with very large gradients at the start)")
    temperature = between(1e-4, 100)
    add("--student-temp", type=temperature, default=0.1, help="temperature of the student")
    add("--teacher-temp", type=temperature, default=0.04,
        help="temperature of the teacher; lower it if the loss stays at ln(out_dim)")
    add("--warmup-teacher-temp", type=temperature, default=0.04,
        help="temperature of the teacher at the start of its warm-up; lower it if the loss does not fall")
    add("--warmup-teacher-temp-epochs", type=whole(0, 10 ** 6), default=0,
        help="epochs of linear warm-up to --teacher-temp; DINO's long recipes take 30 epochs, to 0.07")
    add("--center-momentum", type=SHARE, default=0.9, help="momentum of each head's centre")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole(1, 10 ** 6),
        help="epochs; default: the paper's for the data set, 100 for a folder; more for few crops")
    add("--batch", type=whole(1, 10 ** 6), default=256, help="crops per step; lower it if memory runs out")
    add("--accumulate", type=whole(), default=1,
        help="number of shards into which a batch is divided; more if memory runs out. Exact for the "
             "baseline; a region's loss is the mean over shards, however many of a shard's views have it")
    add("--lr", type=between(0, 10), default=5e-4,
        help="peak learning rate for a batch of 256; it is scaled by --batch / 256")
    add("--min-lr", type=between(0, 10), default=1e-6, help="learning rate at the end")
    add("--warmup-epochs", type=whole(0, 10 ** 6),
        help="epochs of linear warm-up of --lr; default: 10 (demo: 1), at most a third of --epochs; more if "
             "the loss blows up")
    add("--weight-decay", type=between(0, 10), default=0.04,
        help="weight decay at the start; biases and LayerNorms have none")
    add("--weight-decay-end", type=between(0, 10), default=0.4, help="weight decay at the end")
    add("--clip", type=between(0, 1e9), default=3.0, help="largest gradient norm of a parameter; 0: no limit")
    add("--momentum", type=SHARE, default=0.996,
        help="momentum of the teacher at the start; it rises to 1; DINO advises 0.9995 for a batch of 256")
    add("--freeze-last-layer", type=whole(0, 10 ** 6), default=1,
        help="epochs at the start in which the heads' last layers are frozen; more if the loss does not fall")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"],
        help="auto takes bf16 if the device has it natively; use fp32 if a loss is not finite")
    add("--seed", type=SEED, default=0, help="seed of everything but the split; the same seed repeats a run")
    return parser


def arguments(argv=None, parser=None):
    """Returns the flags of a command line, with defaults that depend on others; InputError if two clash."""
    parser = parser or argument_parser()  # an experiment's has more flags
    if parser.parse_known_args(argv)[0].data == "demo":
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = DATASETS.get(args.data, OWN).epochs or 100
    if args.warmup_epochs is None:
        args.warmup_epochs = min(1 if args.data == "demo" else 10, args.epochs // 3)
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs}: has to be below --epochs {args.epochs}")
    for flag, (low, high) in (("--global-scale", args.global_scale), ("--local-scale", args.local_scale)):
        if not 0 < low <= high:
            raise InputError(f"{flag}: two shares are expected, 0 < low <= high <= 1")
    if args.depth and args.arch == "vit_h":
        raise InputError("--depth: --arch vit_h has blocks of two sizes; take another --arch")
    if args.batch % (processes() * args.accumulate):
        raise InputError(f"--batch {args.batch}: has to be a multiple of {processes()} processes times "
                         f"--accumulate {args.accumulate}")
    encoders.check_device(args.device)
    args.device = device_of_process(args.device)
    args.run = args.run or default_run(args)
    return args


def default_run(args):
    return f"runs/{run_name(args.data, args.split, args.drop_shared)}_{args.arch}_{args.method}"


# ---------------------------------------------------------------- models

def teach_global_views(teacher, views, priors):
    """Returns the teacher's output on the global views, views[0]; the student sees all views."""
    return teacher(views[:1], priors[:1])


@dataclass
class Recipe:
    """What is trained, and with which loss; experiments.compare has other recipes.

    loss: called on (student's output, teacher's output, teacher's temperature), returns (loss, {name: L_name
    without gradient}). Its weight is {name: weight of L_name}; its losses are {name: the dirl.DINOLoss of a
    head with prototypes}, whose entropy is logged; its update_centers() is called once per step. teach:
    called on (teacher, views, priors), returns the teacher's output. counts: views come with the cells per
    patch instead of P_c.
    """

    student: nn.Module  # has .encoder
    teacher: nn.Module  # its encoder is what is kept
    loss: nn.Module
    teach: Callable = teach_global_views
    counts: bool = False


def start_encoder(args, mean, std):
    """Returns the encoder that training starts from: random weights of --seed, or those of --init."""
    torch.manual_seed(args.seed)
    encoder = encoders.make_encoder(args.arch, mean, std, args.depth, args.drop_path)
    if args.init:
        encoders.init_encoder(encoder, args.init)
    return encoder


def build_dirl(encoder, args):
    """Returns the paper's Recipe: DiRL, Cellback or the baseline (--method), trained with DINO."""
    student = dirl.DiRL(encoder, args.method, args.out_dim, args.disentangled_dim, args.norm_last_layer)
    student = student.to(args.device)
    loss = dirl.DiRLLoss(student, args.lambda_1, args.lambda_2, args.student_temp, args.center_momentum,
                         skip_empty=args.empty_regions == "skip").to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss)


# ---------------------------------------------------------------- one step

@dataclass(frozen=True)
class StepSettings:
    """The settings that all steps of a run share."""

    augmentation: Augmentation
    schedules: optimization.Schedules
    seed: int
    device: torch.device
    bf16: bool
    clip: float = 3.0
    accumulate: int = 1


def settings_of(args, per_epoch, mean, std):
    """Returns the StepSettings of a run's flags; per_epoch: steps per epoch."""
    augmentation = Augmentation(
        local_crops=args.local_crops, global_scale=args.global_scale, local_scale=args.local_scale,
        global_size=args.global_size, local_size=args.local_size, jitter=args.jitter,
        greyscale=args.greyscale, solarize=args.solarize, blur=args.blur, mean=mean, std=std)
    schedules = optimization.Schedules(
        steps=args.epochs * per_epoch, lr=args.lr * args.batch / 256, min_lr=args.min_lr,
        warmup_steps=args.warmup_epochs * per_epoch, weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay_end, momentum=args.momentum, teacher_temp=args.teacher_temp,
        warmup_teacher_temp=args.warmup_teacher_temp,
        warmup_temp_steps=args.warmup_teacher_temp_epochs * per_epoch,
        frozen_steps=args.freeze_last_layer * per_epoch)
    return StepSettings(augmentation, schedules, args.seed, torch.device(args.device),
                        encoders.use_bf16(args.precision, args.device), args.clip, args.accumulate)


def shards_of(images, cells, accumulate):
    """Yields this process's crops of a batch in --accumulate shards: (images, cells, (index, count))."""
    shards = zip(images.chunk(accumulate), cells.chunk(accumulate))
    for index, shard in enumerate(shards, rank() * accumulate):
        yield *shard, (index, processes() * accumulate)


def views_of_step(images, cells, step, settings, shard, counts):
    """Returns the views of a shard of the step's batch, and their priors.

    Drop path and views each have a random stream, seeded by (seed, step), so a resumed run draws the same
    numbers as an uninterrupted one; the primes keep the seeds of different runs apart. A crop's views do not
    depend on how the batch is divided.
    """
    torch.manual_seed(settings.seed * 1_000_003 + step + shard[0] * 15_485_863)  # drop path
    generator = torch.Generator(settings.device).manual_seed(settings.seed * 1_000_003 + step + 500_009)
    return make_views(images, cells, generator, settings.augmentation, shard, counts)


def log_values(recipe, loss, each, priors):
    """Returns the log's values of a shard: loss, each L_name, entropies, both_regions, cell_share."""
    both = [((p.amax(-1) > 0) & (p.amin(-1) <= 0)).flatten() for p in priors]
    both_regions = torch.cat(both).float().mean()  # share of all views that have cells and background
    cell_share = (priors[0] > 0).float().mean()  # share of the global views' patches that hold a cell
    entropies = [cross_entropy.entropy for cross_entropy in recipe.loss.losses.values()]
    return torch.stack([loss.detach(), *each.values(), *entropies, both_regions, cell_share])


def training_step(recipe, model, optimizer, images, cells, step, settings, section=nullcontext):
    """Trains one step on uint8 crops (B, 3, S, S) with cells (B, K, 2).

    model: recipe.student or its wrapper (DistributedDataParallel, torch.compile). section(name): a context
    around each section of the step, which experiments.benchmark times. Returns the step's Schedule and a
    tensor: log_values averaged over shards and processes, then 1 if all gradients are finite, else less.
    """
    # The step's learning rate and weight decay, and the teacher's momentum and temperature.
    schedule = settings.schedules.at(step)
    optimization.set_rates(optimizer, schedule)
    optimizer.zero_grad(set_to_none=True)
    shards = []

    # A batch that does not fit into memory goes through in shards (--accumulate).
    for x, xy, shard in shards_of(images, cells, settings.accumulate):
        # Views of every crop; the cells go through the same crop and flip as the pixels (3.2).
        with section("views and priors"):
            views, priors = views_of_step(x, xy, step, settings, shard, recipe.counts)

        # The teacher sees the global views only, the student all views.
        with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16):
            with section("teacher"), torch.no_grad():
                target = recipe.teach(recipe.teacher, views, priors)
            with section("student's encoder and block"):
                output = model(views, priors)

        # Eq. 9 over all pairs of views, in fp32.
        with section("loss"):
            loss, each = recipe.loss(output, target, schedule.teacher_temp)
        with section("backward"):
            (loss / settings.accumulate).backward()
        shards.append(log_values(recipe, loss, each, priors))

    # The gradient of each parameter is clipped separately; the last layers are frozen at first.
    with section("clipping and optimiser"):
        finite = optimization.clip_gradients(list(recipe.student.parameters()), settings.clip)
        if step < settings.schedules.frozen_steps:
            optimization.freeze_last_layers(recipe.student)
        optimizer.step()

    # theta_t = m theta_t + (1 - m) theta_s; the centres move towards the mean of the teacher's outputs.
    with section("teacher's update"):
        dirl.update_teacher(recipe.student, recipe.teacher, schedule.momentum)
        recipe.loss.update_centers()
    values = torch.cat([torch.stack(shards).mean(0), finite.float()[None]])
    return schedule, dirl.process_mean(values)


# ---------------------------------------------------------------- data

@dataclass
class TrainingData:
    """The crops that are trained on, and where they come from."""

    found: Data
    crops: torch.utils.data.Dataset
    places: str  # Crops.stamp
    skipped: list  # a line for each file that could not be used
    trained_on: dict  # images and patients, for encoder.pt
    mean: tuple  # of the pixels (--stats)
    std: tuple


def uses_cells(args):
    """Whether a head or a loss uses P_c: DINO's do not, but --ssl lsup (experiments.compare) counts cells."""
    return args.method != "baseline" or args.ssl == "lsup"


def training_crops(args):
    """Prepares the data set and returns its TrainingData; InputError if too few crops can be used."""
    with_cells = uses_cells(args)
    prior = args.prior if with_cells else NO_CELLS
    with first_before_others():
        if args.data == "demo":
            make_demo(Path("datasets/demo"), workers=args.workers)
        found = find_data(args.data, args.mpp, prior, args.split_seed, slide_mpp=args.slide_mpp,
                          split=args.split, drop_shared=args.drop_shared)
        if with_cells:
            warn_of_cell_files(found)
        warn_of_untestable(found)
        skipped = prepare(found, args.tissue, args.workers, args.max_gigapixels)
    print_skipped(skipped)
    names = found.split("train", "val") + found.unlabelled()
    crops = Crops(found, names, shuffle_seed=args.seed if args.shuffle_prior else None)
    if not len(crops):
        raise InputError(skipped[0] if skipped else
                         f"{found.source}: holds no crop to train on; see python data.py check")
    if with_cells:
        print(crops.describe(crop_mpp(found)))
    places = crops.stamp()
    crops, owners = share_of(crops, args.fraction, args.seed)
    if len(crops) < args.batch:
        raise InputError(f"--batch {args.batch}: there are only {len(crops)} training crops; lower --batch")
    mean, std = encoders.stats_of(args.stats, args.init, lambda: images_of(crops, spread(len(crops), 128)))
    trained_on = training_record(found, sorted(set(owners)))
    if args.init:
        trained_on["init"] = encoders.record_of_file(args.init)
    return TrainingData(found, crops, places, skipped, trained_on, mean, std)


def loader_of(crops, args, start, steps):
    """Returns a loader of batches of crops with their cells, from step start to the last (--max-steps)."""
    last = steps if args.max_steps is None else min(steps, start + args.max_steps)
    cuda = torch.device(args.device).type == "cuda"
    order = optimization.batches(len(crops), args.batch, start, last, args.seed, (rank(), processes()))
    return DataLoader(crops, batch_sampler=order, collate_fn=collate,
                      num_workers=args.workers if cuda else 0, pin_memory=cuda)


# ---------------------------------------------------------------- what is watched

CONTRAST_CROPS = 64
RANK_CROPS = 32


def contrast_at_start(encoder, crops, settings):
    """Returns how much more f varies between some crops than between two global views of one (contrast).

    The views have their own random stream, so that training draws the same numbers with and without this.
    """
    images, cells = collate([crops[i] for i in spread(len(crops), CONTRAST_CROPS)])
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    views, _ = make_views(images, cells, generator, replace(settings.augmentation, local_crops=0))
    return contrast(encoder, views[0])


# ---------------------------------------------------------------- training

def set_up(args, build):
    """Returns what the first step needs: TrainingData, StepSettings, Recipe and optimiser."""
    # Data: crops with their cells, never of test slides.
    data = training_crops(args)
    settings = settings_of(args, len(data.crops) // args.batch, data.mean, data.std)
    # Process-wide: on CUDA, fp32 products (the heads' logits) are TF32, whose mantissa has fp16's 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = settings.bf16

    # Models: a student and its momentum teacher, with a head and a centre for each representation.
    recipe = build(start_encoder(args, data.mean, data.std), args)
    return data, settings, recipe, optimization.build_optimizer(recipe.student)


def train(args, build=build_dirl):
    """Trains the Recipe that build(encoder, args) returns; returns the exit code."""
    # A bad --run, --init or --probe is refused first, because preparing slides may take hours.
    check_writable(args.run)
    encoders.check_init(args.init, args.stats, args.arch, args.depth)
    probe_sets = read_probe(args.probe, args.probe_images, args.seed) if args.probe else None
    data, settings, recipe, optimizer = set_up(args, build)
    per_epoch = len(data.crops) // args.batch
    steps = settings.schedules.steps
    rank_images = images_of(data.crops, spread(len(data.crops), RANK_CROPS))

    # Files: a stopped run is resumed if its settings are the same.
    config = config_of(args, data, settings) | {"recipe": build.__qualname__}
    run = Run(args.run, config, data.trained_on, args.save_minutes, args.save_every,
              student=recipe.student, teacher=recipe.teacher, loss=recipe.loss, optimizer=optimizer)
    step = start = run.resume()
    announce(args, run, data, settings, start, recipe.teacher.encoder)
    model = DistributedDataParallel(recipe.student) if processes() > 1 else recipe.student
    model = torch.compile(model) if args.compile else model

    log = Log(run.folder, tuple(recipe.loss.weight), recipe.loss.losses, start, steps, per_epoch, args.batch,
              args.out_dim, reads_late=settings.device.type == "cuda", has_cells=uses_cells(args))
    with run, log, stop_signals() as stop:
        for images, cells in loader_of(data.crops, args, start, steps):
            schedule, values = training_step(recipe, model, optimizer, images, cells, step, settings)
            step += 1

            # At an epoch's end: the features' rank, and the probe if due.
            rank_of_f, probed = None, None
            if step % per_epoch == 0 and not rank():
                rank_of_f = effective_rank(encoders.represent(recipe.teacher.encoder, rank_images))
            probe_is_due = step == steps or step % (per_epoch * args.probe_epochs) == 0
            if probe_sets and probe_is_due and not rank():
                probed = probe(recipe.teacher.encoder, *probe_sets)

            log.write(step - 1, values, schedule, rank_of_f, probed)
            run.save_if_due(step, per_epoch, log)
            if any_of(stop):
                break
        if step > start:
            run.save(step, log)
    return finish(args, run, log, step, steps, data.skipped, stop)


def config_of(args, data, settings):
    """Returns the content of config.json: what must stay the same when the run is resumed."""
    flags = {flag: value for flag, value in vars(args).items() if flag not in RUNNING}
    record = {name: value for name, value in data.trained_on.items() if name != "init"}
    images = f"{len(record['images'])} (stamp {stamp(**record)})"
    return flags | {
        "data": run_name(args.data, args.split, args.drop_shared), "mpp": crop_mpp(data.found),
        "crops": len(data.crops), "places": data.places, "images": images, "pixels": [data.mean, data.std],
        "precision": "bf16" if settings.bf16 else "fp32"}


def announce(args, run, data, settings, start, encoder):
    """Prints what will be trained; for a new run also the contrast between crops."""
    resumed = f"; resumed at step {start}" if 0 < start < settings.schedules.steps else ""
    print(f"{len(data.crops)} crops of {len(data.trained_on['images'])} {data.found.kind}, "
          f"{settings.schedules.steps} steps of {args.batch} ({args.epochs} epochs), {args.method} "
          f"{args.arch} on {args.device} in {run.config['precision']}{resumed}")
    if not start and len(data.crops) > 1:
        ratio = contrast_at_start(encoder, data.crops, settings)
        print(f"at the start f varies {ratio:.2f} times as much between crops as between two views of a crop")


def finish(args, run, log, step, steps, skipped, stop):
    """Prints what was written and what to run next; returns the exit code."""
    speed = f", {log.speed(step):.1f} crops a second" if step > log.start else ""
    if step < steps:
        print(f"Stopped at step {step} of {steps}{speed}; "
              f"the same command resumes from {run.folder}/checkpoint.pt.")
    else:
        flags = ["--data", args.data, *split_flags(args.split, args.drop_shared)]
        flags += cutting_flags(args.data, args.mpp, args.slide_mpp, args.tissue)
        flags += [] if args.run == default_run(args) else ["--checkpoint", f"{run.folder}/encoder.pt"]
        done = f"{run.folder} had finished its {steps} steps; nothing was trained"
        if step > log.start:
            done = f"Wrote {run.folder}/encoder.pt, checkpoint.pt and log.csv ({steps} steps{speed})"
        print(f"{done}. Next: python eval.py {shlex.join(flags)}")
    return 130 if stop else exit_code_of(skipped)


# ---------------------------------------------------------------- script

def main(argv=None, name="train.py", arguments=arguments, build=build_dirl):
    """Runs a script that trains; one with recipes of its own, as experiments.compare, passes its build."""
    torch.set_flush_denormal(True)  # denormal numbers are slow on a CPU
    join()
    try:
        return run_script(name, lambda: train(arguments(argv), build), "--batch or --local-crops",
                          "finished slides stay; the same command resumes")
    finally:
        leave()


if __name__ == "__main__":
    sys.exit(main())
