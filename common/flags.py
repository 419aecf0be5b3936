"""What the flags of several scripts share: ranges as argparse types, and the flags of how a script runs."""
import argparse
import os

import torch

import dirl

MAX_GIGAPIXELS = 40  # of a slide; broken files claim more


def between(low, high, kind=float):
    """An argparse type: a number from low to high; NaN is refused, because it lies in no range."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} has to lie between {low:,} and {high:,}")
        return value
    parse.__name__ = kind.__name__  # argparse prints it if the text is not a number
    return parse


def whole(low=1, high=2 ** 31):
    """An argparse type: a whole number from low to high."""
    return between(low, high, int)


MPP = between(0.05, 20)  # um/px: 0.5 is 20x
SHARE = between(0, 1)
SEED = whole(0)


def side(text):
    """An argparse type: px of a view, a multiple of the patch size."""
    value = whole(16, 4096)(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"{text} has to be a multiple of 16 px")
    return value


def words_of(flags):
    """Returns {name: value} of flags as one would type them, with commas between them."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        words.append(" ".join([f"--{name.replace('_', '-')}", *map(str, values)]))
    return ", ".join(words)


def add_max_gigapixels(add):
    """Adds the flag of a script that reads slides."""
    add("--max-gigapixels", type=between(1e-6, 1e6), default=MAX_GIGAPIXELS,
        help="skips a slide that claims more gigapixels, as a broken file may")


def add_shard(add):
    """Adds the flag of a script whose work several machines share."""
    add("--shard", metavar="I/N",
        help="works only on shard I of N of the slides, I from 0 to N - 1; for an array job on a cluster")


def add_machine(add):
    """The flags that say which hardware a script uses."""
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--workers", type=whole(0, 1024), default=min(8, os.cpu_count() or 1),
        help="processes that cut tiles, read images and (without a GPU) train DSMIL; fewer if memory runs "
             "out")


def add_encoder(add, batch, help="images at a time; lower it if memory runs out"):
    """The flags of a script that applies an encoder; batch and help: the default and the help of --batch."""
    add("--checkpoint", help="an encoder.pt, or the folder of its run; default: the newest run. With --arch "
                             "also a state dict with timm's or DINO's names, such as ImageNet's weights")
    add("--arch", choices=list(dirl.ARCHS),
        help="architecture of a state dict, or of patches' --encoder random; an encoder.pt records its own")
    add("--batch", type=whole(1, 10 ** 6), default=batch, help=help)
    add("--precision", default="fp32", choices=["auto", "bf16", "fp32"],
        help="auto takes bf16, which is faster, if the device has it natively")
    add_machine(add)


def add_mil_optimizer(add):
    """The flags of DSMIL's optimiser."""
    add("--mil-lr", type=between(0, 10), default=2e-4,
        help="DSMIL's learning rate, by default the paper's; raise it for few slides, since an epoch "
             "then has few steps")
    add("--mil-weight-decay", type=between(0, 10), default=5e-2,
        help="DSMIL's weight decay, by default the paper's; lower it for few slides, where it evens out the "
             "attention over the instances")


def add_dsmil(add):
    """The flags of DSMIL's training."""
    add("--repeats", type=whole(1, 10 ** 4), default=5,
        help="how often DSMIL is trained, each time with another seed; more for steadier numbers")
    add("--epochs", type=whole(1, 10 ** 6), default=200,
        help="DSMIL epochs; fewer if there are thousands of slides")
    add_mil_optimizer(add)
    add("--standardize", action=argparse.BooleanOptionalAction, default=False,
        help="standardises features with the training slides' mean and sd before DSMIL; helps with few "
             "slides, and when features share a large offset")
    add("--class-weights", action="store_true",
        help="weights slides inversely to the size of their class in training; for a rare class")
    add("--seed", type=SEED, default=0, help="seed of DSMIL's first training")


def running_flags():
    """Returns a parser of the flags that say how training runs; they may change when it is resumed."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("how it runs", "these may change when a run is resumed").add_argument
    add("--run", help="folder of the run, to keep several apart (runs/<data>_<arch>_<method>)")
    add("--save-every", type=whole(), metavar="EPOCHS",
        help="also keeps encoder_<epoch>.pt every EPOCHS epochs, to measure how a network develops")
    add("--save-minutes", type=between(0, 1e6), default=10,
        help="minutes between checkpoints within an epoch; at an epoch's end one minute is enough")
    add("--max-steps", type=whole(), help="stops after this many steps; the next call resumes")
    add("--probe",
        help="a folder of images with labels.csv (image,label,split): its attention bins and 20-nearest-"
             "neighbour accuracy go into log.csv; they show when something is learned, and when attention "
             "becomes sparse")
    add("--probe-epochs", type=whole(), default=1,
        help="epochs between two probes; more if an epoch is short")
    add("--probe-images", type=whole(20), default=500,
        help="largest number of images from each of the probe's two splits; more is steadier and slower")
    add("--compile", action="store_true",
        help="uses torch.compile, which takes minutes at the start; for long runs on a GPU")
    add_machine(add)
    add_max_gigapixels(add)
    return parser


RUNNING = frozenset(vars(running_flags().parse_args([])))
