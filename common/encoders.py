"""Encoders and what comes out of them: devices, encoder.pt, features f, aggregated attention."""
from pathlib import Path

import torch
from tqdm import tqdm

import dirl
from common.errors import InputError, one_line
from common.files import load_tensors, save_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


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


# ---------------------------------------------------------------- encoder.pt

def find_encoder(checkpoint, name=""):
    """encoder.pt of --checkpoint (a file or its run), else of the newest run (of data set name, if given)."""
    if checkpoint:
        path = Path(checkpoint)
        path = path / "encoder.pt" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"--checkpoint {path}: is not there")
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
    needed = {"encoder", "arch", "method", "data", "mpp", "step", "trained_on"}
    if not isinstance(about, dict) or not needed <= about.keys() or about["arch"] not in dirl.ARCHS:
        raise InputError(f"{path}: is not an encoder.pt of this version; pre-train again")
    encoder = dirl.ARCHS[about["arch"]]()
    try:
        encoder.load_state_dict(about.pop("encoder"))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights are not {about['arch']}'s ({one_line(error)})") from None
    if not all(weight.isfinite().all() for weight in encoder.state_dict().values()):
        raise InputError(f"{path}: has weights that are not finite; use another one, or pre-train again")
    return encoder.eval(), about


def save_encoder(path, encoder, **about):
    """encoder.pt: weights, and arch, method, data, mpp, step, trained_on (data.what_was_seen) in about."""
    save_tensors(path, {"encoder": encoder.state_dict(), "mean": list(MEAN), "std": list(STD), **about})


def random_encoder(arch, seed):
    """An encoder before any pre-training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dirl.ARCHS[arch]().eval()


# ---------------------------------------------------------------- features and attention

def normalize(images):
    """RGB (.., 3, H, W) of 0 to 1, normalised by ImageNet's mean and standard deviation for the encoder."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return images.sub(mean).div_(std)


def represent(encoder, images, bf16=False):
    """f = the mean of the n tokens of T_L: uint8 images (B, 3, H, W) to (B, d) float32."""
    device = next(encoder.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        tokens = encoder(normalize(images.to(device).float() / 255))  # (B, n, d)
    return tokens.float().mean(1)


def attention_of(encoder, images):
    """Aggregated attention of uint8 images (B, 3, H, W), (B, n); the n values of an image sum to n."""
    device = next(encoder.parameters()).device
    return dirl.aggregated_attention(encoder.last_attention(normalize(images.to(device).float() / 255)))


@torch.no_grad()
def in_batches(function, images, batch, what=""):
    """function over images (N, ...), a batch at a time: (N, ...) on the CPU; what names the progress bar."""
    starts = tqdm(range(0, len(images), batch), what, leave=False, disable=not what)
    return torch.cat([function(images[i: i + batch]).cpu() for i in starts])
