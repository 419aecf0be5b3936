"""Pre-training (3.5, A.1.2): python train.py [--data demo] [--arch vit_t] [--method dirl].

Prepares what is missing (tiles, cells), pre-trains with DINO on the method's representations and writes
runs/<data>_<arch>_<method>/: checkpoint.pt, encoder.pt (the teacher's encoder), log.csv, config.json, split.csv.
The same command goes on where a stopped run was; every step draws its random numbers from (seed, step).
"""
import argparse
import csv
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data as data_py
import dirl
import views
from data import DATASETS
from errors import InputError, check_ranges, exit_code, renamed

# The demo has to end within minutes on two CPU cores; everything else starts from the paper's settings.
# A hundred steps are few: fewer outputs, a sharper and quicker teacher, or the loss only reaches ln(out_dim).
DEMO = dict(batch=32, out_dim=4096, disentangled_dim=1024, local_crops=2, global_size=112, local_size=48,
            lr=4e-3, momentum=0.99, teacher_temp=0.03)
NOT_THE_RUN = ("run", "workers", "save_minutes", "max_steps", "device", "probe", "probe_epochs",
               "probe_images")  # may change when a run goes on


def arguments(argv):
    parser = argparse.ArgumentParser(description="Pre-trains DiRL; run it again to go on with a stopped run.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="demo", help=f"{', '.join(DATASETS)}, or a folder with slides or crops")
    add("--arch", default="vit_t", choices=list(dirl.ARCHS), help="vit_s where the data has 10^5 crops and more")
    add("--method", default="dirl", choices=list(dirl.METHODS), help="baseline is DINO; cellback is DiRL without its block")
    add("--run", help="folder of the run, to keep several apart (runs/<data>_<arch>_<method>)")
    add("--mpp", type=float, help="um/px of the crops; a folder needs it (2.0 is 5x, 1.0 10x, 0.5 20x)")
    add("--slide-mpp", type=float, help="um/px of slides and images that record none")
    add("--tissue", type=float, default=0.5, help="least share of tissue in a tile; lower for thin biopsies")
    add("--prior", default="auto", choices=data_py.PRIORS, help="whose cells P_c is made of (Table 7): files in cells/<prior>/ or "
        "cells/; auto: the user's own where there are any, else the built-in detector's")
    add("--shuffle-prior", action="store_true", help="a control: as many cell patches, at random places of each crop")
    add("--probe", help="a folder of images with labels.csv (image,label,split): attention bins and 20-nearest-neighbour accuracy "
        "on it in log.csv, to see when something is learned and when attention goes sparse")
    add("--probe-epochs", type=int, default=1, help="epochs between two looks at it; more where an epoch is short")
    add("--probe-images", type=int, default=500, help="training and test images of it that are used; more is steadier, slower")
    add("--fraction", type=float, default=1.0, help="share of the training crops that is used (Fig. 6)")
    add("--epochs", type=int, help="default: the paper's for the data set, 100 for a folder; more for few crops")
    add("--batch", type=int, default=256, help="crops a step; lower it when memory runs out")
    add("--local-crops", type=int, default=8, help="local views of a crop; 0 is the two-view setting, faster")
    add("--global-scale", type=float, nargs=2, default=(0.4, 1.0), help="area of the global views, share of the crop; 0.14 1 with --local-crops 0")
    add("--local-scale", type=float, nargs=2, default=(0.05, 0.4), help="area of the local views, share of the crop")
    add("--global-size", type=int, default=224, help="px of the global views, a multiple of 16; 112 is 4 times faster, and coarser")
    add("--local-size", type=int, default=96, help="px of the local views, a multiple of 16")
    add("--out-dim", type=int, default=65536, help="outputs of the heads of f, f_c, f_b; fewer for small data")
    add("--disentangled-dim", type=int, default=4096, help="outputs of the four disentangled heads")
    add("--lambda-1", type=float, default=0.5, help="weight of L_c and L_b in eq. 9")
    add("--lambda-2", type=float, default=0.1 / 4, help="weight of L_cc, L_bb, L_cb, L_bc in eq. 9")
    add("--empty-regions", default="skip", choices=["skip", "zeros"], help="views without a cell, or with nothing else: skip leaves "
        "them out of that region's loss; zeros counts them, as a control")
    add("--lr", type=float, default=5e-4, help="learning rate for a batch of 256; it is scaled by batch / 256")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end")
    add("--warmup-epochs", type=int, help="epochs of linear warm-up (10, at most a third of all); more if the loss blows up early")
    add("--weight-decay", type=float, default=0.04, help="at the start; none on biases and norms")
    add("--weight-decay-end", type=float, default=0.4, help="at the end")
    add("--clip", type=float, default=3.0, help="largest gradient norm of a parameter; 0 is off")
    add("--drop-path", type=float, default=0.1, help="stochastic depth of the student")
    add("--momentum", type=float, default=0.996, help="of the teacher at the start, 1 at the end; higher for small batches")
    add("--student-temp", type=float, default=0.1, help="temperature of the student")
    add("--teacher-temp", type=float, default=0.04, help="of the teacher; lower if the loss stays at ln(out_dim)")
    add("--center-momentum", type=float, default=0.9, help="of each head's centre")
    add("--freeze-last-layer", type=int, default=1, help="epochs in which the heads' last layers stand still")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 where the device has it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that cut tiles and read crops")
    add("--save-minutes", type=float, default=10, help="time between checkpoints within an epoch; at an epoch's end one minute is enough")
    add("--max-steps", type=int, help="stop after this many steps in this call; the next call goes on")
    add("--seed", type=int, default=0, help="of everything; the same seed on the same machine gives the same run")
    demo = "demo" == parser.parse_known_args(argv)[0].data
    if demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = DATASETS[args.data][1] if args.data in DATASETS else 100
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, args.epochs // 3)
    args.run = args.run or f"runs/{run_name(args.data)}_{args.arch}_{args.method}"
    check_ranges(args, fraction=(1e-9, 1), tissue=(0, 1), epochs=(1, 1e6), batch=(1, 1e6), local_crops=(0, 100),
                 out_dim=(2, 1e7), disentangled_dim=(2, 1e7), drop_path=(0, 0.99), momentum=(0, 1), lr=(0, 10),
                 workers=(0, 1024), clip=(0, 1e9), probe_epochs=(1, 1e6), probe_images=(20, 1e6), weight_decay=(0, 10),
                 weight_decay_end=(0, 10), min_lr=(0, 10), lambda_1=(0, 100), lambda_2=(0, 100),
                 warmup_epochs=(0, args.epochs - 1), student_temp=(1e-4, 100), teacher_temp=(1e-4, 100),
                 center_momentum=(0, 1), seed=(0, 2 ** 31))
    for name in ("global_size", "local_size"):
        if getattr(args, name) < 16 or getattr(args, name) % 16:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: has to be a multiple of 16 px")
    for name in ("global_scale", "local_scale"):
        if not 0 < getattr(args, name)[0] <= getattr(args, name)[1] <= 1:
            raise InputError(f"--{name.replace('_', '-')}: two shares, 0 < low <= high <= 1")
    check_device(args.device)
    return args


def check_device(device):
    """InputError where --device is no device of this machine."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device {device}: cpu, cuda or cuda:1 is expected") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch finds no CUDA device here; use --device cpu")


def run_name(data):
    return data if data in DATASETS else data_py.safe_name(data)


def native_bf16(device):
    """Does the device compute in bf16 itself? Elsewhere it would only be emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(test() for test in tests if test)


def cosine(start, end, step, steps, warmup=0):
    """The schedule at a step: linear from 0 to start over warmup steps, then half a cosine to end."""
    if step < warmup:
        return start * step / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def clip_gradients(parameters, limit):
    """Each parameter's gradient on its own, cut to that norm, as DINO does (0: as it is). False: one is not finite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads)
    if limit:
        torch._foreach_mul_(grads, [(limit / (norm + 1e-6)).clamp(max=1) for norm in norms])
    return torch.stack(norms).isfinite().all().item()


def batches(count, batch, start, steps, seed):
    """Indices of the crops of steps start to steps; each epoch in its own order, the incomplete batch left out."""
    per_epoch, order, epoch = count // batch, None, None
    for step in range(start, steps):
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        k = step % per_epoch
        yield order[k * batch: (k + 1) * batch]


def save(path, state):
    with renamed(path) as temp:
        with open(temp, "wb") as file:  # so that a full disk is an OSError
            torch.save(state, file)


def load(path):
    """A file of tensors and plain values; InputError where it is not one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise InputError(f"{path}: cannot be loaded ({type(error).__name__}); delete it or take another copy") from None


def check_batch(batch, count):
    """InputError where count training crops do not fill one batch."""
    if count < batch:
        raise InputError(f"--batch {batch}: there are only {count} training crops; lower --batch")


@contextmanager
def stop_signals():
    """A list that SIGINT and SIGTERM fill while the block runs, instead of ending the program."""
    stop = []
    old = {number: signal.signal(number, lambda *_: stop.append(1)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(args):
    if args.data == "demo":
        from demo import make_demo
        if not Path("datasets/demo/labels.csv").is_file():
            print("The demo data is synthetic: slides are drawn into datasets/demo (once).")
            make_demo(Path("datasets/demo"), workers=args.workers)
    found = data_py.find_data(args.data, args.mpp, args.slide_mpp, args.seed, args.prior)
    run, device = Path(args.run), torch.device(args.device)
    bf16 = args.precision == "bf16" or args.precision == "auto" and native_bf16(device)
    failed = data_py.prepare(found, args.slide_mpp, args.tissue, args.workers)
    for line in failed:
        print("passed over:", line)
    names = found.split("train") + found.split("val")  # nothing of the test part is ever seen here
    crops = data_py.Crops(found, names, shuffle_seed=args.seed if args.shuffle_prior else None)
    print(data_py.describe_prior(crops, found.mpp))
    images = len(set(crops.owner))
    if args.fraction < 1:
        keep = torch.randperm(len(crops), generator=torch.Generator().manual_seed(args.seed))
        crops = torch.utils.data.Subset(crops, sorted(keep[: max(1, round(args.fraction * len(crops)))].tolist()))
    check_batch(args.batch, len(crops))
    config = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUN}
    config |= {"mpp": found.mpp, "precision": "bf16" if bf16 else "fp32", "crops": len(crops)}
    checkpoint = run / "checkpoint.pt"
    if checkpoint.is_file():
        check_config(run / "config.json", config)
    per_epoch = len(crops) // args.batch
    steps, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    lr = args.lr * args.batch / 256

    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    encoder = dirl.ARCHS[args.arch](drop_path=args.drop_path)
    student = dirl.DiRL(encoder, args.method, args.out_dim, args.disentangled_dim).to(device)
    teacher = dirl.make_teacher(student)
    loss_fn = dirl.DiRLLoss(student, args.lambda_1, args.lambda_2, args.student_temp, args.center_momentum,
                            args.empty_regions == "skip").to(device)
    parameters = list(student.parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]  # biases and norms
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    parts = {"student": student, "teacher": teacher, "loss": loss_fn, "optimizer": optimizer}

    probe_set = read_probe(args.probe, args.probe_images, args.seed) if args.probe else None
    start = 0
    if checkpoint.is_file():
        state = load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start = state["step"]
        del state
    run.mkdir(parents=True, exist_ok=True)
    with renamed(run / "config.json") as temp:
        temp.write_text(json.dumps(config, indent=1))
    write_split(run / "split.csv", found)

    def keep(step):
        log.flush()
        save(run / "encoder.pt", {"encoder": teacher.encoder.state_dict(), "arch": args.arch, "method": args.method,
                                  "data": args.data, "mpp": found.mpp, "mean": list(views.MEAN), "std": list(views.STD),
                                  "step": step})
        save(checkpoint, {name: part.state_dict() for name, part in parts.items()} | {"step": step})  # last: it says done

    loader = DataLoader(crops, batch_sampler=batches(len(crops), args.batch, start, steps, args.seed),
                        collate_fn=data_py.collate, num_workers=args.workers if device.type == "cuda" else 0,
                        pin_memory=device.type == "cuda")
    print(f"{len(crops)} crops of {images} {found.kind}, {steps} steps of {args.batch} ({args.epochs} epochs), "
          f"{args.method} {args.arch} on {device} in {'bf16' if bf16 else 'fp32'}"
          + (f"; goes on at step {start}" if start else ""))
    log, writer = open_log(run / "log.csv", start, list(student.heads))
    bar = tqdm(total=steps, initial=start, unit="step", mininterval=1)
    saved = began = time.monotonic()
    last = min(steps, start + args.max_steps) if args.max_steps else steps
    step = start
    with stop_signals() as stop:
        for images, cells in loader if start < last else ():
            rate = cosine(lr, args.min_lr, step, steps, warmup)
            decay = cosine(args.weight_decay, args.weight_decay_end, step, steps)
            momentum = cosine(args.momentum, 1, step, steps)
            optimizer.param_groups[0].update(lr=rate, weight_decay=decay)
            optimizer.param_groups[1].update(lr=rate)
            torch.manual_seed(args.seed * 1_000_003 + step)  # drop path
            generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step + 500_009)  # a stream of its own
            x, priors = views.make_views(images, cells, generator, args.local_crops, args.global_scale, args.local_scale,
                                         args.global_size, args.local_size)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                with torch.no_grad():
                    target = teacher(x[:1], priors[:1])
                output = student(x, priors)
            total, each = loss_fn(output, target, args.teacher_temp)  # in fp32
            value = total.item()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if not math.isfinite(value) or not clip_gradients(parameters, args.clip):
                bar.close()
                log.close()
                raise FloatingPointError(f"the loss or a gradient is not finite at step {step} (loss {value}); {checkpoint} is the "
                                         "last good state. Try a lower --lr, a longer --warmup-epochs or --precision fp32 with a new --run")
            if step < args.freeze_last_layer * per_epoch:
                for head in student.heads.values():
                    head.last_layer.weight.grad = None
            optimizer.step()
            dirl.update_teacher(student, teacher, momentum)
            both = torch.cat([((p.amax(-1) > 0) & (p.amin(-1) < 1)).flatten() for p in priors]).float().mean().item()
            covered = priors[0].mean().item()  # share of cell tokens in the global views
            probed = [""] * len(PROBED)
            if args.probe and ((step + 1) % (per_epoch * args.probe_epochs) == 0 or step + 1 == steps):
                probed = [f"{v:.4g}" for v in probe(teacher.encoder, *probe_set)]
            writer.writerow([step, step // per_epoch, f"{value:.6g}", *(f"{v.item():.6g}" for v in each.values()),
                             f"{rate:.6g}", f"{momentum:.8g}", f"{both:.4g}", f"{covered:.4g}", f"{math.log(args.out_dim):.6g}", *probed])
            step += 1
            bar.update()
            if probed[-1]:
                tqdm.write(f"step {step}: tokens with attention 0.5 to 2 {float(probed[1]):.1%}, 20-NN accuracy {float(probed[3]):.3f} on {args.probe}")
            bar.set_postfix(loss=f"{value:.3f}", lr=f"{rate:.1e}", img_s=f"{(step - start) * args.batch / (time.monotonic() - began):.0f}")
            if step == last or stop:
                break
            minutes = min(1, args.save_minutes) if step % per_epoch == 0 else args.save_minutes  # an epoch may be short
            if time.monotonic() - saved > 60 * minutes:
                keep(step)
                saved = time.monotonic()
        bar.close()
        if step > start:
            keep(step)
    log.close()
    speed = f", {(step - start) * args.batch / (time.monotonic() - began):.1f} crops a second" if step > start else ""
    if step < steps:
        print(f"Stopped at step {step} of {steps}{speed}; the same command goes on from {checkpoint}.")
    else:
        print(f"Wrote {run}/encoder.pt, checkpoint.pt and log.csv ({steps} steps{speed}). "
              f"Next: python eval.py --data {args.data}" + ("" if args.run == f"runs/{run_name(args.data)}_{args.arch}_{args.method}"
                                                              else f" --checkpoint {run}/encoder.pt"))
    if failed:
        print(f"{len(failed)} images were passed over (see above).")
    if stop:
        return 130
    return 1 if failed else 0


PROBED = ("probe_0_to_0.5", "probe_0.5_to_2", "probe_over_2", "probe_knn")  # shares of tokens, accuracy


def read_probe(folder, count, seed):
    """The images of --probe: (images, labels (N,)) of its training part and of its test part, count of each at most."""
    import patches
    rows, _ = patches.find_patches(folder, seed)
    rng, out = torch.Generator().manual_seed(seed), []
    for part in ("train", "test"):
        there = [row for row in rows if row["part"] == part]
        images, kept, _ = patches.load_images([there[i] for i in torch.randperm(len(there), generator=rng)[:count].tolist()], 4)
        if len(kept) < 20:
            raise InputError(f"--probe {folder}: {len(kept)} {part} images that can be read; 20 at least are needed")
        out.append((images, [row["label"] for row in kept]))
    return out


def probe(encoder, train_set, test_set):
    """Shares of the test tokens in the bins of Fig. 4, and the accuracy of 20 nearest neighbours by cosine on f."""
    from sklearn.neighbors import KNeighborsClassifier

    import eval as eval_py
    import patches
    features = [patches.in_batches(lambda x: eval_py.represent(encoder, x), images, 64).numpy() for images, _ in (train_set, test_set)]
    columns = patches.in_batches(lambda x: eval_py.attention(encoder, x), test_set[0], 64)
    knn = KNeighborsClassifier(20, metric="cosine").fit(features[0], train_set[1])
    return *dirl.attention_bins(columns), knn.score(features[1], test_set[1])


def open_log(path, start, heads):
    """log.csv, open for the row of step start: rows from there on, of steps that were not kept, are taken out."""
    names = ["step", "epoch", "loss", *(f"loss_{h}" for h in heads), "lr", "momentum", "both_regions", "cell_share", "ln_out_dim", *PROBED]
    rows = []
    if start and path.is_file():
        with open(path, newline="") as file:
            rows = [row for row in list(csv.reader(file))[1:] if row and row[0].isdigit() and int(row[0]) < start]
    with renamed(path) as temp, open(temp, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    file = open(path, "a", newline="")
    return file, csv.writer(file)


def check_config(path, config):
    """InputError where a run that is to go on was started otherwise."""
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path}: cannot be read; take another folder for a new run") from None
    new = json.loads(json.dumps(config))
    changed = [f"{'' if k in ('crops', 'labels.csv') else '--'}{k.replace('_', '-')} {old.get(k)} (now {v})" for k, v in new.items() if old.get(k) != v]
    if changed:
        raise InputError(f"{path.parent}: was made with {'; '.join(changed)}: say the same to go on, or take another folder for a new run")


def write_split(path, found):
    """Which image is in which part, beside the run."""
    with renamed(path) as temp, open(temp, "w", newline="") as file:
        rows = [(name, row["label"], row["patient"], row["split"]) for name, row in sorted(found.labels.items())]
        csv.writer(file).writerows([(found.kind[:-1], "label", "patient", "split"), *rows])


def main(argv=None):
    return exit_code("train.py", lambda: train(arguments(argv)), "--batch or --local-crops",
                     "finished slides stay, run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
