"""Studies of several pre-trainings: each lists its runs, checks all flags, pre-trains, measures and shows.

    python -m experiments.study claim --data FOLDER     4.1, 4.2 on labelled patches: arms with several seeds
    python -m experiments.study show [--out runs/claim] the tables and the figure of claim, so far
    python -m experiments.study fraction --data lung    Fig. 6: less data, 50 epochs; measured by eval.py
    python -m experiments.study prior --data lung       Table 7: other segmenters, in the same way
    python -m experiments.study folds --data lung --splits FOLDER --checkpoint RUN     Table 4: HIPT's folds

All other flags of claim, fraction and prior are train.py's, the same for every run. Stop a study whenever you
like: the same command resumes it. A failed run is named at the end, and the others are still compared. folds
trains DSMIL only (experiments/folds.py).
"""
import argparse
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import dirl
import train
from common import encoders
from common.checkpoint import check_config
from common.errors import InputError, Parser, run_script
from common.files import file_stamp, read_json, stamp, write_json
from common.flags import RUNNING, SEED, add_mil_optimizer, whole
from common.log import is_finished
from experiments import compare, folds, measures, show, table
from wsi.datasets import PRIORS, run_name, split_flags
from wsi.folders import find_folder
from wsi.splits import find_patches

# The arms of claim: flags of train.py, or of experiments.compare, which trains those with --ssl. "random" is
# an untrained encoder; "shuffled" and those after it are controls and comparisons. byol, simclr and selfpatch
# have their own views, epochs, batch and momentum (compare.DEFAULTS) unless the command gives these flags.
ARMS = {
    "random": [],
    "baseline": ["--method", "baseline"],
    "cellback": ["--method", "cellback"],
    "dirl": ["--method", "dirl"],
    "shuffled": ["--method", "dirl", "--shuffle-prior"],
    "lambda_2_0.25": ["--method", "dirl", "--lambda-2", "0.25"],
    "two_views": ["--method", "dirl", "--local-crops", "0", "--global-scale", "0.14", "1"],
    "baseline_two_views": ["--method", "baseline", "--local-crops", "0", "--global-scale", "0.14", "1"],
    "zeros": ["--method", "dirl", "--empty-regions", "zeros"],
    "two_heads": ["--ssl", "dino", "--heads", "12", "12"],  # the number of heads without regions
    "registers": ["--ssl", "registers"],  # the usual cure for sparse attention
    "evenness": ["--ssl", "evenness"],  # even attention without regions
    "13_blocks": ["--ssl", "dino", "--depth", "13", "--method", "baseline"],  # Table 6
    "13_blocks*": ["--ssl", "dino", "--depth", "13", "--heads", "12", "13"],
    "4_blocks": ["--ssl", "dino", "--depth", "4", "--method", "baseline"],
    "4_blocks_dirl": ["--ssl", "dino", "--depth", "4", "--method", "dirl"],
}
for ssl in ("byol", "simclr"):  # Table 8
    ARMS[ssl] = ["--ssl", ssl, "--method", "baseline"]
    ARMS[f"{ssl}_cellback"] = ["--ssl", ssl, "--method", "cellback"]
    ARMS[f"{ssl}_dirl"] = ["--ssl", ssl, "--method", "dirl"]
ARMS |= {ssl: ["--ssl", ssl] for ssl in ("esvit", "selfpatch", "imix", "lsup")}  # Tables 3 and 9, Fig. 9
BASELINE_OF = {"two_views": "baseline_two_views"}  # the others: "baseline"
SWEEPS = {  # flag of train.py: its values, what they show
    "fraction": (["0.2", "0.4", "0.6", "0.8", "1"], "Fig. 6: methods over shares of the training crops; "
                 "--epochs is 50 as in the paper, except for the demo"),
    "prior": (["histomicstk", "cellpose", "hovernet"],
              "Table 7: methods over segmenters (the baseline has no prior and runs once)")}
SET_BY = {"claim": ("--probe", "--shuffle-prior"), "fraction": ("--fraction",), "prior": ("--prior",)}


# ---------------------------------------------------------------- flags

def argument_parser():
    parser = Parser(prog="python -m experiments.study", description="Studies of several pre-trainings.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help):
        trains = name in ("claim", *SWEEPS)
        sub = commands.add_parser(
            name, help=help, description=help, allow_abbrev=False,
            epilog="All other flags are train.py's, the same for every run: --mpp, --epochs, --batch, ..."
            if trains else None)
        if trains:
            sub.add_argument("--seeds", type=SEED, nargs="+", default=[0],
                             help="seeds of pre-training; several tell an effect from luck")
        return sub.add_argument

    add = command("claim", "pre-trains arms and measures them on labelled patches")
    add("--data", required=True,
        help="a folder of patches with labels.csv: image,label,split[,patient or source_tile]")
    add("--arms", nargs="+", default=["random", "baseline", "cellback", "dirl", "shuffled"],
        choices=list(ARMS), metavar="ARM",
        help=f"{', '.join(ARMS)}; those from shuffled on are controls and comparisons (experiments.compare), "
             "and set their own flags")
    add("--folds", type=whole(2, 1000), default=5,
        help="folds of the training split, for logistic regression and fine-tuning")
    add("--tune-epochs", type=whole(0, 10 ** 4), default=0,
        help="epochs of fine-tuning (see eval.py patches; 40 in the paper); 0 leaves it out")
    add("--tune-folds", type=whole(1, 1000), default=5, help="folds that are fine-tuned; fewer save time")
    add("--bag-groups", type=whole(1, 10 ** 4), default=4, help="source tiles in a synthetic slide for DSMIL")
    add("--bag-seeds", type=whole(0, 1000), default=3, help="trainings of DSMIL; 0 leaves it out")
    add("--out", default="runs/claim", help="folder of the study; another one for other settings")

    add = command("show", "prints the tables of claim, draws the bins and the map, lists what is missing")
    add("--out", default="runs/claim", help="folder of the study")
    add("--pair", nargs=2, metavar="CLASS",
        help="adds the accuracy and AUC between two classes, from the same scores")

    for name, (values, help) in SWEEPS.items():
        add = command(name, help)
        add("--values", nargs="+", default=values, choices=PRIORS if name == "prior" else None,
            help=f"values of --{name}")
        add("--methods", nargs="+", default=list(table.METHODS), choices=list(dirl.METHODS),
            help="methods to compare; fewer save time")
        add("--repeats", type=whole(1, 1000), default=5, help="trainings of DSMIL for each run")
        add("--mil-epochs", type=whole(1, 10 ** 6), default=200, help="DSMIL epochs (see eval.py)")
        add_mil_optimizer(add)
        add("--folds", type=whole(2, 1000), default=5,
            help="folds of labelled crops, which are classified linearly")
        add("--out", help=f"folder of the runs; default: runs/sweep_{name}_<data>")

    folds.add_flags(command("folds", "Table 4: DSMIL on the features of runs, by published split files"))
    return parser


def arguments(argv):
    """Returns the flags of a command line, train.py's as a list in .rest; InputError where two clash."""
    parser = argument_parser()
    args, args.rest = parser.parse_known_args(argv)
    if args.command in ("show", "folds"):
        if args.rest:
            parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
        return args
    given = {word.split("=")[0] for word in args.rest}
    for flag in ("--run", "--seed", "--method", *SET_BY[args.command]):
        if flag in given:
            raise InputError(f"{flag}: the study sets it; use --arms, --methods, --values, --seeds or --out")
    if args.command == "fraction" and train.arguments(args.rest).data != "demo":
        args.rest = ["--epochs", "50", *args.rest]  # A.1.2, on lung; --epochs on the command line comes last
    return args


# ---------------------------------------------------------------- the runner

@dataclass
class Job:
    """One run of a study: an arm (or method) with a value and a seed."""

    arm: str
    value: str  # of the flag that a sweep varies; "" where the arm does not depend on it
    folder: Path
    flags: list  # of train.py or experiments.compare
    settings: argparse.Namespace  # the flags, parsed


def job_of(arm, folder, seed, flags, value=""):
    """Returns a Job; InputError if its flags are wrong, before any job runs."""
    flags = [*flags, "--run", str(folder), "--seed", str(seed)]
    return Job(arm, value, folder, flags, script_of(flags).arguments(flags))


def script_of(flags):
    """Returns the module that trains with these flags."""
    return compare if "--ssl" in flags else train


def run_jobs(jobs, measure):
    """Pre-trains and measures what is not done yet; returns the exit code.

    0: all jobs are measured. 1: some failed, and all others are measured. 2 (bad flags) and 130 (stopped) end
    the study at once. measure(job) returns an exit code or None, or raises FloatingPointError.
    """
    failed = []
    for k, job in enumerate(jobs, 1):
        print(f"--- {k} of {len(jobs)}: {job.folder}", flush=True)
        try:
            code = pre_train(job) or measure(job)
        except FloatingPointError as error:
            print(f"study: {job.folder}: {error}", file=sys.stderr)
            code = 1
        if code in (2, 130):
            return code
        if code:
            failed.append(str(job.folder))
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are measured.")
    if failed:
        print(f"study: failed: {', '.join(failed)}; see above, and use other settings with another --out",
              file=sys.stderr)
    return int(bool(failed))


def pre_train(job):
    """Trains or resumes a job's encoder; returns 0 if it is finished, 130 if stopped, else an exit code."""
    encoder = job.folder / "encoder.pt"
    if job.arm == "random":
        return 0 if encoder.is_file() else save_untrained(encoder, job.settings)
    if is_finished(job.folder) and encoder.is_file() and not (job.folder / "checkpoint.pt").is_file():
        return 0  # the checkpoint is large, and may be deleted when a run is done
    if job.settings.compile:
        torch.compiler.reset()  # graphs of earlier jobs count towards torch's limit
    code = script_of(job.flags).main(job.flags)
    if is_finished(job.folder) and code in (0, 1):  # 1: some images were skipped
        return 0
    return code or 130


def save_untrained(path, settings):
    """Writes the encoder.pt of an untrained encoder, normalised as the other arms are; returns 0."""
    mean, std = encoders.MEAN, encoders.STD
    if settings.stats == "data":
        crops = train.training_crops(settings)
        mean, std = crops.mean, crops.std
    encoder = encoders.random_encoder(settings.arch, settings.seed, mean, std, settings.depth)
    data = run_name(settings.data)
    encoders.save_encoder(path, encoder, arch=settings.arch, depth=settings.depth, method="none", data=data,
                          mpp=settings.mpp, step=0, trained_on={"data": data, "images": {}, "patients": []})
    return 0


# ---------------------------------------------------------------- claim

def claim(args):
    """Pre-trains and measures the arms; each run's claim.npz has each test image's attention and scores."""
    shared = ["--data", args.data, "--probe", args.data, *args.rest]
    jobs = [job_of(arm, Path(args.out) / f"{arm}_seed{seed}", seed, [*shared, *ARMS[arm]])
            for seed in args.seeds for arm in args.arms]

    # Whatever is wrong with flags or labels is reported now, not after hours.
    settings = train.arguments(shared)
    found = find_patches(args.data, settings.split_seed, settings.mpp, settings.prior)
    measures.divide(found, list(found.labels), args)
    training_crops = round(settings.fraction * len(found.split("train", "val")))
    batch = max(job.settings.batch for job in jobs)
    if training_crops < batch:
        raise InputError(f"--batch {batch}: there are only {training_crops} training crops; lower --batch")
    labels_stamp = stamp(**found.labels)
    keep_settings(Path(args.out) / "settings.json", settings, labels_stamp)
    for job in jobs:
        job.folder.mkdir(exist_ok=True)  # show lists those that are not measured yet

    patches = cache(lambda: measures.load_patches(found, args, settings.workers))  # only if one is measured
    code = run_jobs(jobs, lambda job: measures.measure(job.folder, args, job.settings, labels_stamp, patches))
    if code in (0, 1):
        print(f"Next: python -m experiments.study show --out {args.out}")
    return code


def keep_settings(path, settings, labels_stamp):
    """Writes the settings that all arms of a study share; InputError if it was started with others."""
    own = {*RUNNING, "seed", "method"}  # these may differ between arms
    shared = {name: value for name, value in vars(settings).items() if name not in own}
    shared |= {"data": run_name(settings.data), "labels": labels_stamp}
    if path.is_file():
        check_config(path, shared)
    write_json(path, shared)


def show_runs(args):
    return show.show_claim(args.out, list(ARMS), BASELINE_OF, args.pair)


# ---------------------------------------------------------------- fraction, prior

def sweep_jobs(args):
    """Returns the folder and the jobs of a sweep: each method with each value (if it matters) and seed."""
    folder = Path(args.out or f"runs/sweep_{args.command}_{run_name(train.arguments(args.rest).data)}")
    jobs = []
    for seed in args.seeds:
        for method in args.methods:
            has_values = args.command == "fraction" or method != "baseline"
            values = args.values if has_values else args.values[:1]
            for value in values:
                name = f"{method}_{value}_seed{seed}" if has_values else f"{method}_seed{seed}"
                flags = [*args.rest, "--method", method]
                if has_values:
                    flags += [f"--{args.command}", value]
                jobs.append(job_of(method, folder / name, seed, flags, value if has_values else ""))
    return folder, jobs


def sweep(args):
    """Pre-trains methods over the values of a flag and measures each run by eval.py."""
    folder, jobs = sweep_jobs(args)

    def measure(job):
        code = evaluate(job.folder, eval_flags(job, args))
        table.write_sweep(jobs, args.command, args.values, folder)
        return code
    return run_jobs(jobs, measure)


def eval_flags(job, args):
    """Returns eval.py's command line for a job: DSMIL on slides, a linear classifier on labelled crops."""
    settings = job.settings
    kind = find_folder(settings.data).kind
    flags = ["--data", settings.data, "--checkpoint", str(job.folder), "--device", settings.device,
             "--workers", str(max(1, settings.workers))]
    if kind == "crops":
        return ["patches", *flags, "--linear", "--folds", str(args.folds)]
    for flag, value in ("--mpp", settings.mpp), ("--slide-mpp", settings.slide_mpp):
        if value is not None:
            flags += [flag, str(value)]
    flags += split_flags(settings.split, settings.drop_shared)
    return ["slides", *flags, "--tissue", str(settings.tissue), "--prior", settings.prior,
            "--compare", "none", "--repeats", str(args.repeats), "--epochs", str(args.mil_epochs),
            "--mil-lr", str(args.mil_lr), "--mil-weight-decay", str(args.mil_weight_decay)]


def evaluate(folder, flags):
    """Runs eval.py unless it has measured this encoder with these flags; returns its exit code."""
    done = {"encoder": file_stamp(folder / "encoder.pt"), "flags": flags}
    if read_json(folder / "evaluated.json") == done and table.read_values(folder):
        return 0
    script = Path(train.__file__).with_name("eval.py")
    code = subprocess.run([sys.executable, script, *flags]).returncode
    if code in (0, 1) and table.read_values(folder):  # 1: some images were skipped
        write_json(folder / "evaluated.json", done)
        return 0
    return code


# ---------------------------------------------------------------- script

COMMANDS = {"claim": claim, "show": show_runs, "fraction": sweep, "prior": sweep, "folds": folds.run}


def main(argv=None):
    def command():
        args = arguments(argv)
        return COMMANDS[args.command](args)
    return run_script("study", command, again="the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
