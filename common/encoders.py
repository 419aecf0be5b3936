"""Encoders and what comes out of them: devices, encoder.pt, features f, aggregated attention."""
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm

import dirl
from common.errors import InputError, one_line
from common.files import load_tensors, save_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
MAX_DEPTH = 100  # blocks of an encoder


# ---------------------------------------------------------------- devices

def check_device(device):
    """InputError if this machine does not have the device of --device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device {device}: cpu, cuda or cuda:1 is expected") from None
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: runs on cpu and cuda only")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch finds no CUDA device here; use --device cpu")


def use_bf16(precision, device):
    """Whether to compute in bf16; precision "auto": if the device has it natively, as emulation is slow."""
    if precision != "auto":
        return precision == "bf16"
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    tests = [getattr(torch.cpu, name, None) for name in names]
    return any(test() for test in tests if test)


# ---------------------------------------------------------------- encoders before training

def make_encoder(arch, mean, std, depth=None, drop_path=0.0):
    """The encoder of an --arch for pixels normalised by mean and std; depth: another number of blocks."""
    blocks = {} if depth is None else {"depth": depth}
    return dirl.ARCHS[arch](drop_path=drop_path, mean=mean, std=std, **blocks)


def random_encoder(arch, seed, mean, std, depth=None):
    """An encoder before any pre-training, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_encoder(arch, mean, std, depth).eval()


# ---------------------------------------------------------------- encoder.pt

def find_encoder(checkpoint, name=""):
    """encoder.pt of --checkpoint (a file or its run), else of the newest run (of data set name, if given)."""
    if checkpoint:
        path = Path(checkpoint)
        path = path / "encoder.pt" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"--checkpoint {path}: is missing; give an encoder.pt, or the folder of its run")
        return path
    pattern = f"{name}_vit_*/encoder.pt" if name else "*/encoder.pt"
    runs = sorted(Path("runs").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"no run {f'of {name} ' if name else ''}in runs/; first: python train.py"
                         + (f" --data {name}" if name else ""))
    return runs[-1]


def load_encoder(path):
    """The encoder of an encoder.pt, in eval mode, and the file's other values."""
    about = load_tensors(path)
    needed = {"encoder", "arch", "method", "data", "mpp", "step", "trained_on", "mean", "std"}
    if not isinstance(about, dict) or not needed <= about.keys() or about["arch"] not in dirl.ARCHS:
        raise InputError(f"{path}: is not an encoder.pt of this version; pre-train again (weights of other "
                         "programs are for train.py --init)")
    depth = about.get("depth")  # None: the --arch's own
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
    """Three floats, the mean or std of R, G, B that an encoder.pt records; InputError if they are damaged."""
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: mean and std of its pixels are damaged ({one_line(error)})") from None
    return red, green, blue


def weights_of(state):
    """The encoder's weights in a loaded encoder.pt or state dict of timm or DINO, in timm's names.

    DINO keeps student and teacher apart (the teacher is taken) and puts "module." and "backbone." before the
    names. ValueError if there is none.
    """
    for key in ("encoder", "teacher", "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError("no state dict")
    return {name.removeprefix("module.").removeprefix("backbone."): value for name, value in state.items()
            if isinstance(value, torch.Tensor)}


def fit_positions(positions, like):
    """A position embedding (1, N, d) without class token, interpolated to the grid of like (1, n, d)."""
    side, want = int(positions.shape[1] ** 0.5), int(like.shape[1] ** 0.5)
    if positions.shape[1] - side * side > 5:  # class, distillation or register tokens are fewer
        raise ValueError(f"a position embedding of {positions.shape[1]} tokens is of no square grid")
    grid = positions[:, -side * side:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if side != want:
        grid = torch.nn.functional.interpolate(grid, size=(want, want), mode="bicubic", antialias=False)
    return grid.flatten(2).transpose(1, 2)


def fit_weights(encoder, path):
    """({name: tensor} of another file for all weights of an encoder, names of those that are left).

    InputError if the file has none of the encoder's weights, not all of them, or of another size. Other
    programs keep their flags in it, such as DINO's argparse.Namespace.
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
    """Loads the weights of another file into an encoder and prints what was taken and what was left."""
    weights, left = fit_weights(encoder, path)
    encoder.load_state_dict(weights)
    print(f"--init {path}: took {len(weights)} tensors" + (f", left {', '.join(left)}" if left else ""))


def save_encoder(path, encoder, **about):
    """encoder.pt: weights, mean and std of pixels, and in about arch, method, data, mpp, step, trained_on."""
    save_tensors(path, {"encoder": encoder.state_dict(), "mean": list(encoder.mean),
                        "std": list(encoder.std), **about})


# ---------------------------------------------------------------- features and attention

def stats_of_crops(images):
    """Mean and std of R, G, B over uint8 images (N, 3, H, W), of 0 to 1 and to four digits."""
    pixels = images.transpose(0, 1).flatten(1).double() / 255
    mean = pixels.mean(1).mul(1e4).round().div(1e4)
    std = pixels.std(1).clamp(min=0.01).mul(1e4).round().div(1e4)
    return tuple(mean.tolist()), tuple(std.tolist())


def normalize(images, mean, std):
    """RGB (.., 3, H, W) of 0 to 1, less the mean and divided by the standard deviation."""
    mean = torch.tensor(mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(std, device=images.device).view(3, 1, 1)
    return images.sub(mean).div_(std)


def inputs_of(encoder, images):
    """uint8 images (B, 3, H, W) as an encoder takes them, on its device."""
    device = next(encoder.parameters()).device
    return normalize(images.to(device).float() / 255, encoder.mean, encoder.std)


def represent(encoder, images, bf16=False):
    """f = the mean of the n tokens of T_L: uint8 images (B, 3, H, W) to (B, d) float32."""
    inputs = inputs_of(encoder, images)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        tokens = encoder(inputs)  # (B, n, d)
    return tokens.float().mean(1)


def attention_of(encoder, images):
    """Aggregated attention of uint8 images (B, 3, H, W), (B, n); the n values of an image sum to n."""
    return dirl.aggregated_attention(encoder.last_attention(inputs_of(encoder, images)))


@torch.no_grad()
def in_batches(function, images, batch, what=""):
    """function over images (N, ...), a batch at a time: (N, ...) on the CPU; what names the progress bar."""
    starts = tqdm(range(0, len(images), batch), what, leave=False, disable=not what)
    return torch.cat([function(images[i: i + batch]).cpu() for i in starts])
