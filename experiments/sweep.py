"""Data efficiency (4.3, Fig. 6) and effect of the segmenter (Table 7), each as one command.

    python -m experiments.sweep fraction --data lung --epochs 50 [--values 0.2 0.4 0.6 0.8 1]
    python -m experiments.sweep prior --data lung [--values histomicstk cellpose hovernet]

Pre-trains every method with every value by train.py and measures it by eval.py, each in a run of its own
below --out. Stop it whenever you like: the same command goes on, and what is finished is kept. Writes
sweep.csv and sweep.png after each run.
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import dirl
import train
from common.errors import InputError, check_ranges, run_script
from common.files import file_stamp, read_json, write_json
from experiments.claim import TRAIN, pre_train
from experiments.figures import shared
from experiments.table import METHODS, read_values, sd_of
from wsi.datasets import PRIORS, run_name
from wsi.splits import find_data

VALUES = {"fraction": ["0.2", "0.4", "0.6", "0.8", "1"], "prior": ["histomicstk", "cellpose", "hovernet"]}
SHOWN = {"accuracy": "accuracy", "auc": "AUC"}


def arguments(argv):
    parser, add = shared.parser_of(
        "sweep", "Pre-trains and measures methods over the values of a flag.", allow_abbrev=False,
        epilog="All other flags are train.py's, the same for every run: --data, --epochs, --arch, ...")
    add("what", choices=list(VALUES), help="fraction: Fig. 6; prior: Table 7 (the baseline has none, and "
        "runs once)")
    add("--values", nargs="+", help=f"of the flag; default: {'; '.join(map(' '.join, VALUES.values()))}")
    add("--methods", nargs="+", default=list(METHODS), choices=list(dirl.METHODS), help="fewer save time")
    add("--seeds", type=int, nargs="+", default=[0], help="of train.py; several tell an effect from luck")
    add("--repeats", type=int, default=5, help="trainings of DSMIL for each run")
    add("--mil-epochs", type=int, default=200, help="of DSMIL")
    add("--mil-weight-decay", type=float, default=5e-2, help="of DSMIL, as in eval.py")
    add("--folds", type=int, default=5, help="of labelled crops, which are classified linearly")
    add("--out", help="folder of the runs; default: runs/sweep_<what>_<data>")
    args, args.rest = parser.parse_known_args(argv)
    said = {word.split("=")[0] for word in args.rest}
    for flag in {"--run", "--method", "--seed", f"--{args.what}"} & said:
        raise InputError(f"{flag}: the sweep sets it; use --values, --methods, --seeds or --out")
    args.values = args.values or VALUES[args.what]
    if args.what == "prior" and not set(args.values) <= set(PRIORS):
        raise InputError(f"--values {' '.join(args.values)}: priors are {', '.join(PRIORS)}")
    check_ranges(args, repeats=(1, 1000), mil_epochs=(1, 1e6), mil_weight_decay=(0, 10), folds=(2, 1000))
    return args


def jobs_of(args):
    """[(value or "" where it does not matter, method, run folder, flags of train.py), ...]."""
    base = train.arguments(args.rest)
    out, jobs = Path(args.out or f"runs/sweep_{args.what}_{run_name(base.data)}"), []
    for seed in args.seeds:
        for method in args.methods:
            no_matter = args.what == "prior" and method == "baseline"
            for value in args.values[:1] if no_matter else args.values:
                name = f"{method}_seed{seed}" if no_matter else f"{method}_{value}_seed{seed}"
                flags = [*args.rest, f"--{args.what}", value, "--method", method, "--seed", str(seed),
                         "--run", str(out / name)]
                train.arguments(flags)  # what is wrong is said now, not after hours
                jobs.append(("" if no_matter else value, method, out / name, flags))
    return out, jobs


def eval_flags(settings, folder, kind, args):
    """The command line of eval.py that measures a run: DSMIL on slides, linear on labelled crops."""
    both = ["--data", settings.data, "--checkpoint", str(folder), "--device", settings.device,
            "--workers", str(max(1, settings.workers))]
    if kind == "crops":
        return ["patches", *both, "--linear", "--folds", str(args.folds)]
    mpp = [word for flag in ("mpp", "slide_mpp") if getattr(settings, flag) is not None
           for word in (f"--{flag.replace('_', '-')}", str(getattr(settings, flag)))]
    return ["slides", *both, *mpp, "--tissue", str(settings.tissue), "--prior", settings.prior,
            "--compare", "none", "--repeats", str(args.repeats), "--epochs", str(args.mil_epochs),
            "--mil-weight-decay", str(args.mil_weight_decay)]


def evaluate(folder, flags):
    """Runs eval.py unless it has measured this encoder with these flags; gives its exit code."""
    done = {"encoder": file_stamp(folder / "encoder.pt"), "flags": flags}
    if read_json(folder / "evaluated.json") == done and read_values(folder):
        return 0
    code = subprocess.run([sys.executable, TRAIN.with_name("eval.py"), *flags]).returncode
    if code in (0, 1) and read_values(folder):  # 1: some images were skipped
        write_json(folder / "evaluated.json", done)
        return 0
    return code


def gather(jobs):
    """{(method, value): {measure: values of all seeds and repeats}} of the runs that are measured."""
    out = {}
    for value, method, folder, _ in jobs:
        for (_, measure), repeats in read_values(folder).items() if folder.is_dir() else ():
            out.setdefault((method, value), {}).setdefault(measure, []).extend(repeats)
    return out


def draw(values, found, args):
    """Accuracy and AUC over the values, a line for each method; its bars are the sd over repeats."""
    numbers = args.what == "fraction"
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    for axis, (measure, title) in zip(figure.subplots(1, 2), SHOWN.items()):
        for k, (method, color) in enumerate(zip(METHODS, shared.COLORS)):
            mine = {value: of[measure] for (name, value), of in found.items()
                    if name == method and measure in of}
            if not mine:
                continue
            if "" in mine:
                axis.axhline(np.mean(mine[""]), color=color, ls="--", label=f"{METHODS[method]} (no prior)")
                continue
            there = [value for value in values if value in mine]
            x = [float(v) if numbers else values.index(v) for v in there]
            x = np.array(x) + (0.004 if numbers else 0.08) * (k - 1)  # side by side, so that bars can be told
            axis.errorbar(x, [np.mean(mine[v]) for v in there],
                          [np.std(mine[v], ddof=1) if len(mine[v]) > 1 else 0 for v in there],
                          fmt="o-" if numbers else "o", color=color, capsize=3, lw=1.4, ms=4,
                          label=METHODS[method])
        if numbers:
            axis.set_xlabel("share of the training crops")
        else:
            axis.set_xticks(range(len(values)), values)
            axis.set_xlim(-0.5, len(values) - 0.5)
        axis.set_ylabel(f"{title} (bars: sd over repeats)", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def report(out, jobs, args):
    """Writes sweep.csv and sweep.png of what is measured so far."""
    found = gather(jobs)
    if not found:
        return
    rows = [(args.what, "method", "measure", "mean", "sd", "repeats")]
    for (method, value), measures in found.items():
        rows += [(value, method, measure, np.mean(v), sd_of(v), len(v)) for measure, v in measures.items()]
    shared.save_both(draw(args.values, found, args), rows, out / "sweep.png")


def run(args):
    out, jobs = jobs_of(args)
    base = train.arguments(args.rest)
    failed = []
    for k, (_, _, folder, flags) in enumerate(jobs, 1):
        print(f"--- {k} of {len(jobs)}: {folder}", flush=True)
        code = pre_train(flags, folder)
        if not code:
            settings = train.arguments(flags)
            kind = find_data(base.data, base.mpp, settings.prior, base.split_seed,
                             slide_mpp=base.slide_mpp).kind
            code = evaluate(folder, eval_flags(settings, folder, kind, args))
        if code in (2, 130):
            return code
        if code:
            failed.append(str(folder))
        report(out, jobs, args)
    if failed:
        print(f"sweep: failed: {', '.join(failed)}; see above", file=sys.stderr)
    return int(bool(failed))


def main(argv=None):
    return run_script("sweep", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
