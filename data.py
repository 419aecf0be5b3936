"""Crops with their cells, and views with their priors (3.2, 3.5, A.1).

    python data.py manifest --data lung    the list of slides for gdc-client, labels.csv and the split
    python data.py check --data NAME       what exists, what is missing and where to get it
    python data.py look SLIDE              draws a slide: tissue, tiles, cells; or all slides of a folder
    python data.py prepare --data NAME     cuts tiles and finds cells, as train.py does before it trains

Views are DINO's (Caron et al. 2021), computed on the device for a whole batch; the cells go through the same
crop and flip as the pixels. Two details of the pixels differ from DINO, for speed: crops are resampled
bilinearly without antialiasing (DINO: bicubic, antialiased), and colour jitter is one affine map of RGB
(`jitter_matrix`), in which hue turns about the grey axis and only the result is clipped.
"""
import hashlib
import math
import sys
from array import array
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.encoders import MEAN, STD, normalize
from common.files import stamp
from prior import view_prior
from wsi.cache import describe_cells, read_crop
from wsi.cli import main
from wsi.crops import crops_of
from wsi.slides import CROP

PATCH = 16  # px: the side of a token

# ---------------------------------------------------------------- crops with their cells

class Crops(torch.utils.data.Dataset):
    """The crops of some slides, or ready-cut crops: item i is (uint8 (3, 224, 224), its cells (K, 2) in px).

    files[i], owner[i] (its slide), corners[i] (level-0 px) and cells(i) describe crop i. Images that could
    not be prepared are skipped. with_cells=False: crops without cells, so none have to be prepared.
    shuffle_seed: moves each crop's cells by shuffle_places, as a control.
    """

    def __init__(self, data, names, with_cells=True, shuffle_seed=None):
        self.files = []
        self.owner = []
        corners = array("q")
        counts = [0]
        cells = array("f")
        for name, file, corner, xy in crops_of(data, names, with_cells):
            if shuffle_seed is not None:
                xy = shuffle_places(xy, np.random.default_rng([shuffle_seed, len(self.files)]))
            self.files.append(file)
            self.owner.append(name)
            corners.extend(corner)
            counts.append(len(xy))
            cells.frombytes(xy.astype(np.float32).tobytes())
        # Flat arrays: worker processes share them without a copy. Crop i has xy[start[i]: start[i + 1]].
        self.corners = np.frombuffer(corners, np.int64).reshape(-1, 2)
        self.start = np.cumsum(counts)
        self.xy = np.frombuffer(cells, np.float32).reshape(-1, 2)

    def __len__(self):
        return len(self.files)

    def cells(self, i):
        return self.xy[self.start[i]: self.start[i + 1]]

    def inside(self):
        """Returns which of the cells xy lie in their crop, bool (K,)."""
        return ((self.xy >= 0) & (self.xy < CROP)).all(1)

    def describe(self, mpp):
        """Returns a text on the number of cells, at mpp um/px, with a warning if it is unusual."""
        inside = int(self.inside().sum())
        share = self.priors().mean().item()
        return describe_cells(inside, len(self), share, mpp, outside=len(self.xy) - inside)

    def stamp(self):
        """Returns a stamp of the places of the crops and their cells; it changes if one of them does."""
        arrays = self.corners, self.start, self.xy
        return stamp(arrays=[hashlib.sha256(values.tobytes()).hexdigest() for values in arrays])

    def priors(self):
        """Returns P_c of every whole crop, (N, n)."""
        grid = CROP // PATCH
        inside = self.inside()
        column, row = (self.xy[inside] // PATCH).astype(np.int64).T
        crop = np.repeat(np.arange(len(self)), np.diff(self.start))[inside]  # of each cell
        out = torch.zeros(len(self), grid * grid)
        out[crop, row * grid + column] = 1
        return out

    def __getitem__(self, i):
        image, _ = read_crop(self.files[i])
        pixels = torch.from_numpy(np.array(image))
        return pixels.permute(2, 0, 1), torch.from_numpy(self.cells(i))


def shuffle_places(xy, rng):
    """Permutes the patches of a crop, each with its cells (K, 2): the number of cell patches is unchanged.

    Cells outside the crop stay where they are.
    """
    grid = CROP // PATCH
    column, row = (np.clip(xy, 0, CROP - 1) // PATCH).astype(int).T
    place = rng.permutation(grid * grid)[row * grid + column]
    moved = np.stack([place % grid, place // grid], 1) * PATCH + xy % PATCH
    inside = ((xy >= 0) & (xy < CROP)).all(1, keepdims=True)
    return np.where(inside, moved, xy)


def share_of(crops, fraction, seed):
    """Draws a share of the crops (Fig. 6); returns them, and the owner of each."""
    if fraction == 1:
        return crops, crops.owner
    order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = sorted(order[: max(1, round(fraction * len(crops)))])
    return torch.utils.data.Subset(crops, kept), [crops.owner[i] for i in kept]


def spread(count, wanted):
    """Returns up to wanted of count indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def images_of(crops, indices):
    """Returns these crops, uint8 (N, 3, 224, 224)."""
    bar = tqdm(indices, "crops", leave=False, disable=len(indices) < 200)
    return torch.stack([crops[int(i)][0] for i in bar])


def collate(items):
    """Returns crops uint8 (B, 3, H, W) and their cells (B, K, 2), padded with NaN."""
    cells = torch.nn.utils.rnn.pad_sequence([xy for _, xy in items], True, float("nan"))
    return torch.stack([image for image, _ in items]), cells


# ---------------------------------------------------------------- views with their priors

TRIES = 10  # boxes drawn per view; this and the next are torchvision's
ASPECT = (3 / 4, 4 / 3)  # width over height of a box
JITTER, GREYSCALE, FLIP = 0.8, 0.2, 0.5  # probabilities
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1  # strengths
BLUR_SIGMA = (0.1, 2.0)  # px
LUMA = (0.299, 0.587, 0.114)  # weights of RGB in grey, as in Pillow's "L"
GLOBAL_1 = {"blur": 1.0, "solarize": 0.0}  # probabilities in each kind of view
GLOBAL_2 = {"blur": 0.1, "solarize": 0.2}
LOCAL = {"blur": 0.5, "solarize": 0.0}


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn; the defaults are DINO's.

    Scales are shares of the crop's area, sizes are px. greyscale, solarize and blur are factors on DINO's
    probabilities; jitter is a factor on its strengths of colour jitter and, below 1, on the probability. mean
    and std (RGB in 0 to 1) and patch_size, px, are the encoder's.
    """

    local_crops: int = 8
    global_scale: tuple = (0.4, 1.0)
    local_scale: tuple = (0.05, 0.4)
    global_size: int = 224
    local_size: int = 96
    jitter: float = 1.0
    greyscale: float = 1.0
    solarize: float = 1.0
    blur: float = 1.0
    mean: tuple = MEAN
    std: tuple = STD
    patch_size: int = 16


class Draws:
    """Random numbers for one shard of a batch (a batch is divided over processes and --accumulate).

    Draws numbers for the whole batch and keeps the shard's, so that a crop's views do not depend on how the
    batch is divided. All come from the generator, on its device; shard is (index, count).
    """

    def __init__(self, generator, shard=(0, 1)):
        self.generator = generator
        self.device = generator.device
        self.index, self.count = shard

    def uniform(self, shape, low, high):
        """Returns uniform numbers of this shape (B, ..), where B is the number of crops in the shard."""
        B = shape[0]
        whole = torch.empty((self.count * B, *shape[1:]), device=self.device)
        whole.uniform_(low, high, generator=self.generator)
        return whole[self.index * B: (self.index + 1) * B]

    def chance(self, B, probability):
        """Returns bool (B,), each true with this probability."""
        return self.uniform((B,), 0, 1) < probability


def random_boxes(count, size, scale, draws):
    """Draws random resized crops of a size x size image: (count, 4) as left, top, width, height in whole px.

    The share of the area is uniform in scale, the log of the aspect ratio uniform in ASPECT. The first of
    TRIES boxes that fits into the image is taken; if none fits, the whole image.
    """
    area = draws.uniform((count, TRIES), *scale) * size * size
    aspect = draws.uniform((count, TRIES), math.log(ASPECT[0]), math.log(ASPECT[1])).exp()
    widths = (area * aspect).sqrt().round()
    heights = (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= size) & (heights > 0) & (heights <= size)
    first = fits.float().argmax(1, keepdim=True)
    any_fits = fits.any(1)
    w = torch.where(any_fits, widths.gather(1, first).squeeze(1), size)
    h = torch.where(any_fits, heights.gather(1, first).squeeze(1), size)

    def corner(side):
        room = size - side
        return ((room + 1) * draws.uniform((count,), 0, 1)).floor().clamp(max=room)
    left = corner(w)
    top = corner(h)
    return torch.stack([left, top, w, h], 1)


def resample(images, boxes, flip, size):
    """Resamples boxes of images (B, 3, H, W) to (B, 3, size, size), bilinearly; mirrored where flip (B,)."""
    B, _, H, W = images.shape
    left, top, w, h = boxes.unbind(1)
    sign = 1 - 2 * flip.float()
    theta = torch.zeros(B, 2, 3, device=images.device)  # maps view to image coordinates, both -1 to 1
    theta[:, 0, 0] = sign * w / W
    theta[:, 0, 2] = (2 * left + w) / W - 1
    theta[:, 1, 1] = h / H
    theta[:, 1, 2] = (2 * top + h) / H - 1
    grid = F.affine_grid(theta, (B, 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def affine(matrix, offset=None):
    """Returns rgb -> matrix rgb + offset as (B, 4, 4), from matrix (B, 3, 3) and offset (B, 3)."""
    out = torch.eye(4, device=matrix.device).repeat(len(matrix), 1, 1)
    out[:, :3, :3] = matrix
    if offset is not None:
        out[:, :3, 3] = offset
    return out


def hue_matrix(turn):
    """Returns matrices (B, 3, 3) that turn RGB about YIQ's grey axis; turn (B,): shares of a full circle."""
    yiq = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], device=turn.device)
    cos = torch.cos(2 * math.pi * turn)
    sin = torch.sin(2 * math.pi * turn)
    rotation = torch.eye(3, device=turn.device).repeat(len(turn), 1, 1)
    rotation[:, 1, 1] = cos
    rotation[:, 1, 2] = sin
    rotation[:, 2, 1] = -sin
    rotation[:, 2, 2] = cos
    return torch.linalg.inv(yiq) @ rotation @ yiq


def jitter_matrix(mean, brightness, contrast, saturation, hue, grey, order):
    """Returns colour jitter and grey as one affine map of RGB: (B, 3, 4), rgb -> A rgb + b.

    mean (B, 3): each image's mean colour. brightness, contrast, saturation (B,): factors as in Pillow's
    ImageEnhance, 1 for no change; hue (B,): turn about the grey axis as a share of a circle; grey (B,) bool,
    applied last. order (B, 4): in which order 0 brightness, 1 contrast, 2 saturation, 3 hue are applied.
    """
    B = len(mean)
    device = mean.device
    eye = torch.eye(3, device=device)
    luma = torch.tensor(LUMA, device=device)
    to_grey = luma.expand(3, 3)
    mean = torch.cat([mean, torch.ones(B, 1, device=device)], 1).unsqueeze(-1)  # (B, 4, 1)
    contrast = contrast[:, None, None]
    brighten = affine(brightness[:, None, None] * eye)
    saturate = affine(to_grey + saturation[:, None, None] * (eye - to_grey))
    turn_hue = affine(hue_matrix(hue))
    total = affine(eye.expand(B, 3, 3))
    for step in range(4):
        mean_grey = (total @ mean)[:, :3, 0] @ luma  # of the image so far: contrast pivots on it
        offset = (1 - contrast[:, 0]) * mean_grey[:, None]
        contrasted = affine(contrast * eye, offset.expand(B, 3))
        choices = torch.stack([brighten, contrasted, saturate, turn_hue], 1)  # (B, 4 operations, 4, 4)
        total = choices[torch.arange(B, device=device), order[:, step]] @ total
    total = torch.where(grey[:, None, None], affine(to_grey[None]) @ total, total)
    return total[:, :3]


def random_jitter(images, draws, jitter=1.0, greyscale=1.0):
    """Jitters the colours of images (B, 3, H, W) with probability JITTER, then makes some grey (GREYSCALE).

    jitter multiplies the strengths and, below 1, the probability; greyscale multiplies that of grey.
    """
    B = len(images)
    jittered = draws.chance(B, JITTER * min(1, jitter)).float()

    def change(strength):
        return jittered * draws.uniform((B,), -strength * jitter, strength * jitter)
    brightness = 1 + change(BRIGHTNESS)
    contrast = 1 + change(CONTRAST)
    saturation = 1 + change(SATURATION)
    hue = change(HUE)
    grey = draws.chance(B, GREYSCALE * greyscale)
    order = draws.uniform((B, 4), 0, 1).argsort(1)
    matrix = jitter_matrix(images.mean((2, 3)), brightness, contrast, saturation, hue, grey, order)
    flat = torch.baddbmm(matrix[:, :, 3:], matrix[:, :, :3], images.flatten(2))
    return flat.clamp_(0, 1).view_as(images)


def blur(images, sigma):
    """Gaussian blur of images (B, 3, H, W), sigma (B,) px, edges replicated."""
    B, C, H, W = images.shape
    radius = math.ceil(3 * BLUR_SIGMA[1])
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)[:, None]  # (B * 3, 1, 13)
    flat = F.pad(images.reshape(1, B * C, H, W), [radius] * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=B * C)
    return F.conv2d(flat, kernel[:, :, :, None], groups=B * C).view_as(images)


def solarize(images):
    """Inverts values of a half and above: x -> 1 - x."""
    return torch.where(images >= 0.5, 1 - images, images)


def make_view(images, cells, kind, size, scale, draws, augmentation, counts):
    """Images (B, 3, S, S) in 0 to 1 -> a normalised view of each (B, 3, size, size), and its P_c (B, n).

    kind: GLOBAL_1, GLOBAL_2 or LOCAL; scale: smallest and largest share of the area; counts: see view_prior.
    """
    B = len(images)
    boxes = random_boxes(B, images.shape[-1], scale, draws)
    flip = draws.chance(B, FLIP)
    x = resample(images, boxes, flip, size)
    x = random_jitter(x, draws, augmentation.jitter, augmentation.greyscale)
    sigma = draws.uniform((B,), *BLUR_SIGMA)
    blurred = draws.chance(B, kind["blur"] * augmentation.blur)
    x = apply_where(blurred, blur, x, sigma)
    solarized = draws.chance(B, kind["solarize"] * augmentation.solarize)
    x = apply_where(solarized, solarize, x)
    x = normalize(x, augmentation.mean, augmentation.std)
    return x, view_prior(cells, boxes, flip, size, augmentation.patch_size, counts)


def make_views(crops, cells, generator, augmentation=Augmentation(), shard=(0, 1), counts=False):
    """Draws the global views, then the local views, of uint8 crops (B, 3, S, S) with cells (B, K, 2).

    Returns views [(2, B, 3, 224, 224), (local, B, 3, 96, 96)] and priors [(2, B, 196), (local, B, 36)], the
    global ones alone if local_crops is 0, on the device of the generator, which draws all random numbers.
    shard: (index, count) of these crops in their batch, whose shards are equally large. counts: returns cells
    per patch instead of P_c (view_prior). ValueError for other dtypes or shapes.
    """
    if crops.dtype != torch.uint8 or crops.shape[-1] != crops.shape[-2] or cells.dim() != 3:
        raise ValueError("make_views takes square uint8 crops (B, 3, S, S), 0 to 255, and cells (B, K, 2), "
                         f"not {crops.dtype} {tuple(crops.shape)} and {tuple(cells.shape)}")
    draws = Draws(generator, shard)
    images = crops.to(draws.device).float() / 255
    cells = cells.to(draws.device)
    groups = [([GLOBAL_1, GLOBAL_2], augmentation.global_size, augmentation.global_scale),
              ([LOCAL] * augmentation.local_crops, augmentation.local_size, augmentation.local_scale)]
    views, priors = [], []
    for kinds, size, scale in groups:
        with torch.autocast(draws.device.type, enabled=False):  # fp32, wherever it is called
            group = [make_view(images, cells, kind, size, scale, draws, augmentation, counts)
                     for kind in kinds]
        if group:
            views.append(torch.stack([view for view, _ in group]))
            priors.append(torch.stack([prior for _, prior in group]))
    return views, priors


def apply_where(chosen, function, images, *values):
    """Returns function(images, *values) where chosen (B,) is true, the images elsewhere; values (B,).

    On CUDA, applies to all and selects: boolean indexing would force a sync. On a CPU, works in place.
    """
    if images.is_cuda:
        return torch.where(chosen[:, None, None, None], function(images, *values), images)
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        images[rows] = function(images[rows], *(value[rows] for value in values))
    return images


if __name__ == "__main__":  # manifest, check, prepare, look: wsi/cli.py
    sys.exit(main())
