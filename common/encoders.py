"""Encoders: devices, encoder.pt, weights of other programs, where results go, features f, attention."""
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import dirl
from common.errors import InputError, one_line
from common.files import file_stamp, load_tensors, read_json, save_tensors, write_json

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
    """Returns an --arch's encoder for pixels normalised with mean and std; depth: blocks, if not its own."""
    blocks = {} if depth is None else {"depth": depth}
    return dirl.ARCHS[arch](drop_path=drop_path, mean=mean, std=std, **blocks)


def random_encoder(arch, seed, mean, std, depth=None):
    """Returns an untrained encoder in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_encoder(arch, mean, std, depth).eval()


class RegisterViT(dirl.VisionTransformer):
    """An encoder with registers (Darcet et al. 2024): learned tokens with the n patches in all its blocks.

    T_L is of the patches alone, and last_attention is that among them. As in DINOv2 and timm (reg_tokens=4,
    no_embed_class=True) registers come first, start near 0 and have no position embedding.
    """

    def __init__(self, encoder, count):
        p = encoder.patch_size
        with torch.random.fork_rng(devices=[]):  # later random numbers are those without registers
            super().__init__(encoder.embed_dim, 0, encoder.num_heads, p, encoder.grid * p, mean=encoder.mean,
                             std=encoder.std)
            self.reg_token = nn.Parameter(1e-6 * torch.randn(1, count, encoder.pos_embed.shape[-1]))
        self.patch_embed = encoder.patch_embed
        self.pos_embed = encoder.pos_embed
        self.blocks = encoder.blocks
        self.norm = encoder.norm

    def embed(self, images):
        patches = super().embed(images)  # (B, n, d)
        return torch.cat([self.reg_token.expand(len(patches), -1, -1), patches], 1)

    def forward(self, images):
        return super().forward(images)[:, self.reg_token.shape[1]:]

    def last_attention(self, images):
        return among_patches(super().last_attention(images), self.reg_token.shape[1])


def among_patches(attention, others):
    """Attention (B, heads, N, N) -> (B, heads, n, n) without the other tokens, which come first.

    Every row sums to 1 again, so the even share of a patch is 1 whatever the other tokens draw.
    """
    attention = attention[..., others:, others:]
    return attention / attention.sum(-1, keepdim=True)


# ---------------------------------------------------------------- encoder.pt

def find_encoder(checkpoint, name="", flag="--checkpoint"):
    """Returns the path of a flag's encoder.pt (checkpoint, its value, is the file or its run's folder).

    Without a checkpoint it is the newest run's, of the data set name if one is given. InputError without one.
    """
    if checkpoint:
        path = Path(checkpoint)
        if path.is_dir():
            path = path / "encoder.pt"
        if not path.is_file():
            raise InputError(f"{flag} {path}: is missing; give an encoder.pt, or the folder of its run")
        if path.name == "checkpoint.pt" and path.with_name("encoder.pt").is_file():
            raise InputError(f"{flag} {path}: is what training resumes from; give the encoder.pt next to it")
        return path
    pattern = f"{name}_vit_*/encoder.pt" if name else "*/encoder.pt"
    runs = sorted(Path("runs").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not runs:
        of_data, same = (f" of {name}", " with the same --data and --split") if name else ("", "")
        raise InputError(f"no run{of_data} in runs/; first: python train.py{same}, or give another run with "
                         "--checkpoint")
    return runs[-1]


def prior_of(path, data):
    """Returns the --prior of the run of an encoder.pt, if it was trained on this data set, else "auto"."""
    config = read_json(path.parent / "config.json")
    return config.get("prior", "auto") if config.get("data") == data else "auto"


def load_encoder(path):
    """Returns the encoder of an encoder.pt, in eval mode, and its other values; InputError if damaged."""
    about = load_tensors(path)
    needed = {"encoder", "arch", "method", "data", "mpp", "step", "trained_on", "mean", "std"}
    if not isinstance(about, dict) or not needed <= about.keys() or about["arch"] not in dirl.ARCHS:
        raise InputError(f"{path}: is not an encoder.pt of this version; pre-train again (weights of other "
                         "programs, or of a loop of your own: eval.py with --arch, or train.py --init)")
    try:
        mean, std = scale_of(about["mean"], about["std"])
        encoder = make_encoder(about["arch"], mean, std, about.get("depth"))
        weights = about.pop("encoder")
        if "reg_token" in weights:
            encoder = RegisterViT(encoder, weights["reg_token"].shape[1])
        encoder.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: its mean and std, depth or weights are damaged, or not {about['arch']}'s "
                         f"({one_line(error)}); pre-train again") from None
    check_finite(encoder, path)
    return encoder.eval(), about


def scale_of(mean, std):
    """Returns an encoder's mean and std as lists; an error unless both are three numbers, std above 0."""
    mean, std = (torch.as_tensor(values, dtype=torch.float64).view(3).tolist() for values in (mean, std))
    if not (all(map(math.isfinite, mean)) and min(std) > 0):
        raise ValueError(f"mean {mean}, std {std}")
    return mean, std


def check_finite(encoder, path):
    """InputError if a weight of the encoder at path is not finite."""
    if not all(weight.isfinite().all() for weight in encoder.state_dict().values()):
        raise InputError(f"{path}: has weights that are not finite; use another one, or pre-train again")


def save_encoder(path, encoder, **about):
    """Writes encoder.pt; about: arch, depth, method, ssl, data, mpp, step and trained_on."""
    save_tensors(path, {"encoder": encoder.state_dict(), "mean": list(encoder.mean),
                        "std": list(encoder.std), **about})


# ---------------------------------------------------------------- weights of other programs

EMPTY_RECORD = {"data": None, "images": {}, "patients": []}
NO_RECORD = "warning: {}: does not record what it was trained on; make sure it has seen no test image"


class ClassTokenViT(dirl.VisionTransformer):
    """A ViT with a class token, which is f, as in timm and DINO: images (B, 3, H, W) -> that token (B, 1, d).

    last_attention is that among the n patches.
    """

    def __init__(self, embed_dim, depth, num_heads, **kw):
        super().__init__(embed_dim, depth, num_heads, **kw)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))  # its position embedding is added to it

    def embed(self, images):
        patches = super().embed(images)  # (B, n, d)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)

    def forward(self, images):
        return super().forward(images)[:, :1]

    def last_attention(self, images):
        return among_patches(super().last_attention(images), 1)

    def class_attention(self, images):
        """The class token's row of the last block (B, heads, n), as DINO's visualize_attention.py shows it.

        It is without the class token itself, and sums to 1.
        """
        row = super().last_attention(images)[..., 0, 1:]
        return row / row.sum(-1, keepdim=True)


def open_encoder(path, arch=None):
    """Returns what load_encoder does; of another program's weights, if their arch is given.

    Nothing is known of their training: data, mpp and step are None, and the record of it is empty. Pixels are
    normalised by the file's "mean" and "std" (lists), if it has them, else by ImageNet's. InputError if the
    file has weights that would change the features, such as LayerScale's.
    """
    if arch is None:
        return load_encoder(path)
    state = load_tensors(path)
    if isinstance(state, dict) and "trained_on" in state:  # an encoder.pt: its own arch and record count
        return load_encoder(path)
    weights = weights_of(state, path)
    encoder = make_encoder(arch, *(stats_of_file(path, state) or (MEAN, STD)))
    if "cls_token" in weights:
        encoder = ClassTokenViT(encoder.embed_dim, len(encoder.blocks), encoder.num_heads,
                                mean=encoder.mean, std=encoder.std)
    ignored = init_encoder(encoder, path, state)
    other = ("blocks.", "attn_pool.", "reg_token", "dist_token")
    foreign = [name for name in ignored if name.startswith(other)]
    if foreign:
        raise InputError(f"{path}: has {', '.join(foreign[:3])}, which --arch {arch} has not, so its "
                         "features would be others; take another --arch, if it is a plain ViT")
    check_finite(encoder, path)
    print(NO_RECORD.format(path))
    about = {"arch": arch, "method": re.sub(r"[^\w.-]+", "_", path.stem), "data": None, "mpp": None,
             "step": None, "trained_on": EMPTY_RECORD}
    return encoder.eval(), about


def weights_of(state, path):
    """Returns {timm's name: tensor} of a loaded encoder.pt, or of a state dict with timm's or DINO's names.

    DINO keeps student and teacher (the teacher is taken) and puts "module." and "backbone." before the names,
    torch.compile "_orig_mod.".
    InputError if the file at path has no state dict.
    """
    for key in ("encoder", "teacher", "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds no state dict; save the encoder's, with timm's or DINO's names")
    weights = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            name = name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("backbone.")
            weights[name] = value
    return weights


def fit_positions(positions, like):
    """Interpolates a position embedding (1, N, d) to the grid of like (1, n, d).

    Tokens before the square grid (class, distillation, registers) are dropped. ValueError if they are many.
    """
    side = math.isqrt(positions.shape[1])
    wanted = math.isqrt(like.shape[1])
    if positions.shape[1] - side * side > 5:
        raise ValueError(f"a position embedding of {positions.shape[1]} tokens has no square grid")
    grid = positions[:, -side * side:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, d, side, side)
    if side != wanted:
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=False)
    return grid.flatten(2).transpose(1, 2)


def fit_weights(encoder, path, state=None):
    """Returns {name: tensor} for all weights of an encoder, from another file, and the names that it ignores.

    state: the file's content, if it has been read. InputError if one of the encoder's weights is missing in
    it or has another size.
    """
    own = encoder.state_dict()
    given = weights_of(load_tensors(path) if state is None else state, path)
    try:
        positions, like = given.get("pos_embed"), own.get("pos_embed")
        if None not in (positions, like) and positions.ndim == 3 and positions.shape[-1] == like.shape[-1]:
            given["pos_embed"] = fit_positions(positions, like)
            has_class_position = math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]
            if has_class_position and "cls_token" in own:
                given["cls_token"] = given["cls_token"] + positions[:, :1]
        missing = sorted(own.keys() - given.keys())
        other = [name for name in own if name in given and given[name].shape != own[name].shape]
        if missing or other:
            raise ValueError(f"{len(missing)} of its {len(own)} weights are missing and {len(other)} have "
                             f"another size, such as {(missing + other)[0]}")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: does not fit --arch ({error}); another --arch, or a file of vit_tiny or "
                         "vit_small with patches of 16 px") from None
    return {name: given[name].float() for name in own}, sorted(given.keys() - own.keys())


def init_encoder(encoder, path, state=None):
    """Loads the weights of another file into an encoder; prints and returns the names that were ignored."""
    weights, ignored = fit_weights(encoder, path, state)
    encoder.load_state_dict(weights)
    rest = f", ignored {', '.join(ignored)}" if ignored else ""
    print(f"{path}: took {len(weights)} tensors{rest}")
    return ignored


def check_init(init, stats, arch, depth):
    """InputError if the file of --init does not fit an encoder, or lacks what --stats init takes."""
    of_init = None
    if init:
        state = load_tensors(init)
        fit_weights(make_encoder(arch, MEAN, STD, depth), init, state)
        of_init = stats_of_file(init, state)
    if stats == "init" and not of_init:
        raise InputError(f"--stats init: takes the mean and std of --init, and {init or 'no file'} has none")


def stats_of_file(path, state=None):
    """Returns the (mean, std) that a file of weights keeps, or None; state: as in fit_weights."""
    state = load_tensors(path) if state is None else state
    if not isinstance(state, dict) or not {"mean", "std"} & state.keys():
        return None
    try:
        return scale_of(state.get("mean"), state.get("std"))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its mean and std are not two lists of three numbers, std above 0 "
                         f"({one_line(error)}); correct or remove them") from None


def stats_of(stats, init, images):
    """Returns the mean and std of --stats: ImageNet's, those of the file of --init, or the data's own.

    images: a function that returns crops, uint8. Warns if the weights of --init had others.
    """
    mean, std = MEAN, STD
    of_init = stats_of_file(init) if init else None
    if stats == "data":
        mean, std = stats_of_crops(images())
    elif stats == "init":
        return of_init
    if of_init and not np.allclose(of_init, (mean, std)):
        print(f"warning: {init}: its pixels were normalised by another mean and std; --stats init takes them")
    return mean, std


def record_of_file(path):
    """Returns the "trained_on" of a file of weights, for the record of what starts from it.

    An empty one, with a warning, of files without it.
    """
    state = load_tensors(path)
    if isinstance(state, dict) and "trained_on" in state:
        return state["trained_on"]
    print(NO_RECORD.format(path))
    return EMPTY_RECORD


# ---------------------------------------------------------------- where results go

def results_folder(path, about, data, mpp=None):
    """Returns the folder of the results that an encoder has on a data set, so that none overwrites another's.

    path, about: of open_encoder. It is the run of an encoder.pt, encoder_<epoch>/ in it of an
    encoder_<epoch>.pt, on_<data>/ in these for a data set other than the training's, on_<data>_<mpp>um/ for
    slides at other um/px than the training's, and runs/<data>_<file's stem>/ of another program's weights.
    """
    if mpp is not None and about["mpp"] not in (None, mpp):
        data = f"{data}_{mpp:g}um"
    if about["data"] is None:
        return Path("runs") / f"{data}_{about['method']}"
    folder = path.parent if path.name == "encoder.pt" else path.with_suffix("")
    return folder if data == about["data"] else folder / f"on_{data}"


def features_folder(path, about, slides, mpp=None):
    """Returns the folder of features/: like results_folder, but data sets of the same slides share it.

    slides: the name of their folder (wsi.folders.Data.name), "bright" for bright3 and bright6.
    """
    return results_folder(path, about | {"data": about["trained_on"]["data"]}, slides, mpp)


def describe_results(folder, path, about, data, mpp=None):
    """Writes a results_folder's config.json, which experiments.table reads, unless it is the run's own.

    mpp: um/px of slides, or None. InputError if the folder has results of other weights (files of other
    programs may have the same name), or of these at another um/px.
    """
    config = {"data": data, "arch": about["arch"], "method": about["method"]}
    if mpp not in (None, about["mpp"]):
        config["measured_at"] = mpp
    if about["data"] is None:
        config["weights"] = file_stamp(path)
        before = read_json(folder / "config.json")
        if any(before[name] != config.get(name) for name in before):
            raise InputError(f"{folder}: has results of other weights than {path}, or at another um/px; "
                             "rename the file or the folder")
    elif folder == path.parent:
        return
    else:
        config = read_json(path.parent / "config.json") | config | {"steps": about["step"]}
        if data != about["data"]:
            config["pretrained_on"] = about["data"]
        if path.name != "encoder.pt":
            config["checkpoint"] = path.stem
    write_json(folder / "config.json", config)


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
    """Returns images (B, 3, H, W) of 0 to 255 as the encoder takes them: float, normalised, on its device."""
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
    """Applies a function to images (N, ...) in batches; returns (N, ...) on the CPU. title: of its bar."""
    starts = tqdm(range(0, len(images), batch), title, leave=False, disable=not title)
    return torch.cat([function(images[i: i + batch]).cpu() for i in starts])
