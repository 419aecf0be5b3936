"""Encoders: devices, encoder.pt, weights of other programs, features f, aggregated attention."""
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dirl
from common.errors import InputError, one_line
from common.files import load_tensors, save_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
MAX_DEPTH = 100  # blocks of an encoder


# ---------------------------------------------------------------- devices

def check_device(device):
    """InputError if this machine lacks the device of --device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device {device}: cpu, cuda or cuda:1 is expected") from None
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: runs on cpu and cuda only")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch finds no CUDA device here; use --device cpu")


def use_bf16(precision, device):
    """Whether to compute in bf16; with precision "auto" only if the device has it natively."""
    if precision != "auto":
        return precision == "bf16"
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # emulation is slow
    # Private functions of torch, whose names come and go with its version: a missing one counts as no.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    tests = [getattr(torch.cpu, name, None) for name in names]
    return any(test() for test in tests if test)


# ---------------------------------------------------------------- encoders before training

def make_encoder(arch, mean, std, depth=None, drop_path=0.0):
    """Returns the encoder of an --arch for pixels that are normalised with mean and std.

    depth: the number of blocks, if it is not the architecture's own.
    """
    blocks = {} if depth is None else {"depth": depth}
    return dirl.ARCHS[arch](drop_path=drop_path, mean=mean, std=std, **blocks)


def random_encoder(arch, seed, mean, std, depth=None):
    """Returns an untrained encoder in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_encoder(arch, mean, std, depth).eval()


# ---------------------------------------------------------------- encoder.pt

def find_encoder(checkpoint, name=""):
    """Returns the path of --checkpoint's encoder.pt (checkpoint is the file or its run's folder).

    Without a checkpoint it is the newest run's, of the data set name if one is given. InputError without one.
    """
    if checkpoint:
        path = Path(checkpoint)
        if path.is_dir():
            path = path / "encoder.pt"
        if not path.is_file():
            raise InputError(f"--checkpoint {path}: is missing; give an encoder.pt, or the folder of its run")
        return path
    if name:
        pattern = f"{name}_vit_*/encoder.pt"
        advice = f"no run of {name} in runs/; first: python train.py with the same --data"
    else:
        pattern = "*/encoder.pt"
        advice = "no run in runs/; first: python train.py"
    runs = sorted(Path("runs").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(advice)
    return runs[-1]


def load_encoder(path):
    """Returns the encoder of an encoder.pt, in eval mode, and the file's other values.

    InputError if the file is damaged, or of another program.
    """
    about = load_tensors(path)
    needed = {"encoder", "arch", "method", "data", "mpp", "step", "trained_on", "mean", "std"}
    if not isinstance(about, dict) or not needed <= about.keys() or about["arch"] not in dirl.ARCHS:
        raise InputError(f"{path}: is not an encoder.pt of this version; pre-train again (weights of other "
                         "programs are for train.py --init)")
    depth = about.get("depth")  # None: the architecture's own
    if depth is not None and not (type(depth) is int and 1 <= depth <= MAX_DEPTH):
        raise InputError(f"{path}: its depth is damaged; pre-train again")
    mean, std = pixel_values(path, about["mean"]), pixel_values(path, about["std"])
    if not min(std) > 0:
        raise InputError(f"{path}: mean and std of its pixels are damaged (std {std}); pre-train again")
    encoder = make_encoder(about["arch"], mean, std, depth)
    try:
        encoder.load_state_dict(about.pop("encoder"))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights are not {about['arch']}'s ({one_line(error)})") from None
    if not all(weight.isfinite().all() for weight in encoder.state_dict().values()):
        raise InputError(f"{path}: has weights that are not finite; use another one, or pre-train again")
    return encoder.eval(), about


def pixel_values(path, values):
    """Returns the mean or std of R, G, B that an encoder.pt records; InputError if it is damaged."""
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: mean and std of its pixels are damaged ({one_line(error)})") from None
    return red, green, blue


def weights_of(state):
    """Returns {timm's name: tensor} of a loaded encoder.pt, or of a state dict of timm's or DINO's.

    DINO keeps student and teacher (the teacher is taken) and puts "module." and "backbone." before the names.
    ValueError if there is no state dict.
    """
    for key in ("encoder", "teacher", "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError("no state dict")
    weights = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            weights[name.removeprefix("module.").removeprefix("backbone.")] = value
    return weights


def fit_positions(positions, like):
    """Interpolates a position embedding (1, N, d) to the grid of like (1, n, d).

    Tokens before the square grid (class, distillation, registers) are dropped. ValueError if they are many.
    """
    side = int(positions.shape[1] ** 0.5)
    wanted = int(like.shape[1] ** 0.5)
    if positions.shape[1] - side * side > 5:
        raise ValueError(f"a position embedding of {positions.shape[1]} tokens has no square grid")
    grid = positions[:, -side * side:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, d, side, side)
    if side != wanted:
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=False)
    return grid.flatten(2).transpose(1, 2)


def fit_weights(encoder, path):
    """Returns {name: tensor} for all weights of an encoder, from another file, and the names that it ignores.

    InputError if one of the encoder's weights is missing in the file or has another size. DINO's files also
    hold their flags, as an argparse.Namespace, which is therefore allowed.
    """
    own = encoder.state_dict()
    try:
        given = weights_of(load_tensors(path, allowed=[Namespace]))
        positions, like = given.get("pos_embed"), own.get("pos_embed")
        if None not in (positions, like) and positions.ndim == 3 and positions.shape[-1] == like.shape[-1]:
            given["pos_embed"] = fit_positions(positions, like)
        missing = sorted(own.keys() - given.keys())
        other = [name for name in own if name in given and given[name].shape != own[name].shape]
        if missing or other:
            raise ValueError(f"{len(missing)} of its {len(own)} weights are missing and {len(other)} have "
                             f"another size, such as {(missing + other)[0]}")
    except ValueError as error:
        raise InputError(f"--init {path}: does not fit --arch ({error}); another --arch, or a file of "
                         "vit_tiny or vit_small with patches of 16 px") from None
    return {name: given[name].float() for name in own}, sorted(given.keys() - own.keys())


def init_encoder(encoder, path):
    """Loads the weights of another file into an encoder; prints what was taken and what was ignored."""
    weights, ignored = fit_weights(encoder, path)
    encoder.load_state_dict(weights)
    rest = f", ignored {', '.join(ignored)}" if ignored else ""
    print(f"--init {path}: took {len(weights)} tensors{rest}")


def save_encoder(path, encoder, **about):
    """Writes encoder.pt; about: arch, depth, method, ssl, data, mpp, step and trained_on."""
    save_tensors(path, {"encoder": encoder.state_dict(), "mean": list(encoder.mean),
                        "std": list(encoder.std), **about})


# ---------------------------------------------------------------- features and attention

def stats_of_crops(images):
    """Mean and std of R, G, B over uint8 images (N, 3, H, W), scaled to 0 to 1 and rounded to four digits."""
    pixels = images.transpose(0, 1).flatten(1).double() / 255
    mean = pixels.mean(1).mul(1e4).round().div(1e4)
    std = pixels.std(1).clamp(min=0.01).mul(1e4).round().div(1e4)
    return tuple(mean.tolist()), tuple(std.tolist())


def normalize(images, mean, std):
    """Subtracts the mean from RGB images (.., 3, H, W) in 0 to 1 and divides by the standard deviation."""
    mean = torch.tensor(mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(std, device=images.device).view(3, 1, 1)
    return images.sub(mean).div_(std)


def inputs_of(encoder, images):
    """Returns uint8 images (B, 3, H, W) as the encoder takes them: float, normalised, on its device."""
    device = next(encoder.parameters()).device
    return normalize(images.to(device).float() / 255, encoder.mean, encoder.std)


def represent(encoder, images, bf16=False):
    """f, the mean of the n tokens of T_L: uint8 images (B, 3, H, W) -> (B, d) float32."""
    inputs = inputs_of(encoder, images)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        tokens = encoder(inputs)  # (B, n, d)
    return tokens.float().mean(1)


def attention_of(encoder, images):
    """Aggregated attention (4.2): uint8 images (B, 3, H, W) -> (B, n); the values of an image sum to n."""
    return dirl.aggregated_attention(encoder.last_attention(inputs_of(encoder, images)))


@torch.no_grad()
def in_batches(function, images, batch, title=""):
    """Applies a function to images (N, ...) batch by batch; returns (N, ...) on the CPU.

    title: of a progress bar, "" for none.
    """
    starts = tqdm(range(0, len(images), batch), title, leave=False, disable=not title)
    return torch.cat([function(images[i: i + batch]).cpu() for i in starts])
