"""The flags of train.py, which the experiments also pass on to it."""
import argparse
import os
import sys

import torch

import dirl
from common.datasets import DATASETS, PRIORS, run_name
from common.encoders import MEAN, STD, check_device
from common.errors import InputError, Parser, check_mpp, check_ranges
from common.parallel import add_limits, limits_of

# The demo has to learn within minutes on two CPU cores; everything else starts from the paper's settings.
# --stats data is what lets it: with ImageNet's mean all tissue is one pink, and f hardly differs between
# crops. Views of 64 px at the scale that crops have in eval.py make steps cheap. Some hundred steps are few:
# hence a fast and sharp teacher and a centre that follows at once; the last layers stay as they are, so that
# the outputs cannot all become the same; colour varies less than in DINO, which drowns what differs.
DEMO = dict(arch="vit_t4", stats="data", batch=32, out_dim=1024, disentangled_dim=256, local_crops=0,
            global_size=64, global_scale=(0.1, 0.5), lr=4e-3, momentum=0.99, teacher_temp=0.02,
            center_momentum=0.3, freeze_last_layer=100, drop_path=0.0, jitter=0.7, greyscale=0.0,
            solarize=0.0, blur=0.3)


def arguments(argv):
    parser = Parser(
        prog="python train.py", allow_abbrev=False,
        description="Pre-trains DiRL; the same command again resumes a stopped run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="demo", help=f"{', '.join(DATASETS)}, or a folder with slides or crops")
    add("--arch", default="vit_t", choices=list(dirl.ARCHS), help="vit_s if the data has 10^5 crops or more")
    add("--method", default="dirl", choices=list(dirl.METHODS),
        help="baseline is DINO; cellback is DiRL without its block")
    add("--init", metavar="FILE",
        help="the encoder starts from other weights: an encoder.pt, a state dict in timm's or DINO's names, "
             "or DINO's checkpoint.pth (vit_tiny, vit_small, patch 16); with some thousand crops better than "
             "from nothing")
    add("--save-every", type=int, metavar="EPOCHS",
        help="also keeps encoder_<epoch>.pt every so many epochs, for curves over the training")
    add("--plot", nargs="+", metavar="RUN",
        help="trains nothing and draws the curves of these runs: losses, entropies, attention, 20-NN")
    add("--benchmark", type=int, metavar="STEPS",
        help="trains nothing and prints what each part of a step takes with these flags on this machine")
    add("--run", help="folder of the run, to keep several apart (runs/<data>_<arch>_<method>)")
    add("--mpp", type=float,
        help="um/px of the crops, of ready-cut ones in their files; a folder needs it (2.0 is 5x, 1.0 10x, "
             "0.5 20x)")
    add("--slide-mpp", type=float, help="um/px of slides and images that record none")
    add("--tissue", type=float, default=0.5, help="least share of tissue in a tile; lower for thin biopsies")
    add("--split-seed", type=int, default=0,
        help="seed of the split, when it is first made; after that datasets/<data>/split.csv is used")
    add("--prior", default="auto", choices=PRIORS,
        help="whose cells P_c is made from (Table 7): files in cells/<prior>/ or cells/; auto: the user's "
             "own if there are any, else the built-in detector's")
    add("--shuffle-prior", action="store_true",
        help="a control: as many cell patches, at random places of each crop")
    add("--probe",
        help="a folder of images with labels.csv (image,label,split): attention bins and 20-nearest-"
             "neighbour accuracy on it in log.csv, to see when something is learned and when attention goes "
             "sparse")
    add("--probe-epochs", type=int, default=1, help="epochs between two probes; more if an epoch is short")
    add("--probe-images", type=int, default=500,
        help="most images used of its training part and of its test part; more is steadier and slower")
    add("--fraction", type=float, default=1.0, help="share of the training crops that is used (Fig. 6)")
    add("--epochs", type=int,
        help="default: the paper's for the data set, 100 for a folder; more for few crops")
    add("--batch", type=int, default=256, help="crops per step; lower it if memory runs out")
    add("--accumulate", type=int, default=1,
        help="parts in which a batch goes through the network, one after the other; more if memory runs out. "
             "The same for the baseline; a part without a pair of views of a region adds nothing to its loss")
    add("--local-crops", type=int, default=8, help="local views of a crop; 0 is the two-view setting, faster")
    add("--global-scale", type=float, nargs=2, default=(0.4, 1.0),
        help="area of the global views, share of the crop; 0.14 1 with --local-crops 0")
    add("--local-scale", type=float, nargs=2, default=(0.05, 0.4), help="area of the local views")
    add("--global-size", type=int, default=224,
        help="px of the global views, a multiple of 16; 112 is 4 times faster, and coarser")
    add("--local-size", type=int, default=96, help="px of the local views, a multiple of 16")
    add("--stats", default="imagenet", choices=["imagenet", "data"],
        help="mean and standard deviation that pixels are normalised by: ImageNet's, as DINO (for --init "
             "with ImageNet's weights), or the training crops' own, by which small runs on H&E learn sooner")
    add("--jitter", type=float, default=1.0,
        help="colour jitter, a factor on its strengths and probability: 1 is DINO's, 0 none; lower if a "
             "head's outputs stay uniform")
    add("--greyscale", type=float, default=1.0, help="the same for turning grey (DINO: one view in 5)")
    add("--solarize", type=float, default=1.0, help="the same for solarising (DINO: 1 in 5 second views)")
    add("--blur", type=float, default=1.0,
        help="the same for blur (DINO: every first, 1 in 10 second, half of the local views)")
    add("--out-dim", type=int, default=65536,
        help="outputs of the heads of f, f_c, f_b; fewer for small data")
    add("--disentangled-dim", type=int, default=4096, help="outputs of the four disentangled heads")
    add("--lambda-1", type=float, default=0.5, help="weight of L_c and L_b in eq. 9")
    add("--lambda-2", type=float, default=0.1 / 4, help="weight of L_cc, L_bb, L_cb, L_bc in eq. 9")
    add("--empty-regions", default="skip", choices=["skip", "zeros"],
        help="views without a cell, or with nothing else: skip leaves them out of that region's loss; zeros "
             "counts them, as a control; what is pooled to zeros has very large gradients at the start")
    add("--lr", type=float, default=5e-4,
        help="learning rate for a batch of 256; it is scaled by batch / 256")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end")
    add("--warmup-epochs", type=int,
        help="epochs of linear warm-up (10, the demo 1, at most a third); more if the loss blows up early")
    add("--weight-decay", type=float, default=0.04, help="at the start; none on biases and norms")
    add("--weight-decay-end", type=float, default=0.4, help="at the end")
    add("--clip", type=float, default=3.0, help="largest gradient norm of a parameter; 0 is off")
    add("--drop-path", type=float, default=0.1, help="stochastic depth of the student's encoder")
    add("--momentum", type=float, default=0.996,
        help="of the teacher at the start, 1 at the end; higher for small batches")
    add("--student-temp", type=float, default=0.1, help="temperature of the student")
    add("--teacher-temp", type=float, default=0.04,
        help="of the teacher; lower if loss_f, or loss_c and loss_b, stay at ln(out_dim)")
    add("--warmup-teacher-temp", type=float, default=0.04,
        help="of the teacher at the start of its warm-up; lower if the loss does not fall")
    add("--warmup-teacher-temp-epochs", type=int, default=0,
        help="epochs of warm-up, linear to --teacher-temp; DINO's recipes take 30 of 100 to 800, to 0.07")
    add("--norm-last-layer", action=argparse.BooleanOptionalAction, default=True,
        help="the prototypes' norms stay 1; --no-norm-last-layer learns them: for ViT-S DINO found it "
             "better, but less stable")
    add("--center-momentum", type=float, default=0.9, help="of each head's centre")
    add("--freeze-last-layer", type=int, default=1, help="epochs in which the heads' last layers are frozen")
    add("--pack", action="store_true",
        help="first writes all crops into one uncompressed file (150 KB a crop) and reads them from there; "
             "if decoding JPEG cannot keep up with the GPU, as --benchmark shows")
    add("--compile", action="store_true", help="torch.compile; minutes at the start, for long runs on a GPU")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"],
        help="auto: bf16 if the device has it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that cut tiles and read crops")
    add_limits(add)
    add("--save-minutes", type=float, default=10,
        help="time between checkpoints within an epoch; at an epoch's end one minute is enough")
    add("--max-steps", type=int,
        help="stop after this many steps in this call; the next call resumes")
    add("--seed", type=int, default=0, help="of everything but the split; the same seed gives the same run")
    for word in sys.argv[1:] if argv is None else argv:
        if word.endswith("=--"):  # argparse gives an empty list for it
            raise InputError(f"{word}: a value is expected")
    if parser.parse_known_args(argv)[0].data == "demo":
        parser.set_defaults(**DEMO)
    return complete(parser.parse_args(argv))


def complete(args):
    """Fills in the defaults that depend on other flags; InputError for a flag out of its range."""
    if args.epochs is None:
        args.epochs = DATASETS.get(args.data, (None, None))[1] or 100
    if args.warmup_epochs is None:
        args.warmup_epochs = min(1 if args.data == "demo" else 10, args.epochs // 3)
    args.run, args.pixels = args.run or default_run(args), (MEAN, STD)
    check_ranges(args, fraction=(1e-9, 1), tissue=(0, 1), epochs=(1, 1e6), batch=(1, 1e6),
                 accumulate=(1, args.batch), local_crops=(0, 100), out_dim=(2, 1e7),
                 disentangled_dim=(2, 1e7), drop_path=(0, 0.99),
                 momentum=(0, 1), lr=(0, 10), workers=(0, 1024), clip=(0, 1e9), probe_epochs=(1, 1e6),
                 probe_images=(20, 1e6), weight_decay=(0, 10), weight_decay_end=(0, 10), min_lr=(0, 10),
                 lambda_1=(0, 100), lambda_2=(0, 100), warmup_epochs=(0, args.epochs - 1),
                 student_temp=(1e-4, 100), teacher_temp=(1e-4, 100), warmup_teacher_temp=(1e-4, 100),
                 center_momentum=(0, 1),
                 seed=(0, 2 ** 31), split_seed=(0, 2 ** 31), global_size=(16, 4096), local_size=(16, 4096),
                 warmup_teacher_temp_epochs=(0, 1e6), save_minutes=(0, 1e6), jitter=(0, 1),
                 greyscale=(0, 1), solarize=(0, 1), blur=(0, 1))
    limits_of(args)  # checks them
    for name, low in (("max_steps", 1), ("save_every", 1), ("benchmark", 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= 1e9:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least {low:g} is needed")
    if args.benchmark and (args.compile or args.accumulate > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        raise InputError("--benchmark: times the parts of one process's whole step; leave out --compile, "
                         "--accumulate and torchrun, and read crops a second from the run itself")
    for name in ("global_size", "local_size"):
        if getattr(args, name) % 16:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {getattr(args, name)}: has to be a multiple of 16 px")
    for name in ("global_scale", "local_scale"):
        if not 0 < getattr(args, name)[0] <= getattr(args, name)[1] <= 1:
            raise InputError(f"--{name.replace('_', '-')}: two shares, 0 < low <= high <= 1")
    check_mpp(args.mpp, "--mpp")
    check_mpp(args.slide_mpp, "--slide-mpp")
    check_device(args.device)
    return args


def default_run(args):
    return f"runs/{run_name(args.data)}_{args.arch}_{args.method}"
