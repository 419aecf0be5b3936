"""Crops with their cells, splits, and views with their priors (3.2, 3.5, A.1).

    python data.py manifest --data lung    the list of slides for gdc-client, labels.csv and the split
    python data.py check --data NAME       what is there, what is missing and where to get it
    python data.py look SLIDE              a picture: slide, tissue, tiles, cells; of a folder: all its slides

Views are DINO's (Caron et al. 2021), made on the device for a whole batch, and the cells go through the same
geometry. Two things differ, for speed: crops are resampled bilinearly and without antialiasing (DINO:
bicubic, with), and colour jitter is one affine map of RGB (`jitter_matrix`) in which hue turns about the grey
axis and only the end result is clipped.
"""
import argparse
import math
import os
import re
import sys
from array import array
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.datasets import DATASETS, PRIORS
from common.encoders import MEAN, STD, normalize
from common.errors import InputError, run_script
from common.files import read_csv, write_csv
from common.parallel import add_limits, add_shard, call
from prior import view_prior
from wsi import check, gdc, look
from wsi.folders import SPLITS, find_folder
from wsi.prepare import read_crop, read_crop_cells, ready_cells, run_shard, tile_info, tile_side, tiles_folder
from wsi.slides import CROP

# ---------------------------------------------------------------- crops with their cells

class Crops(torch.utils.data.Dataset):
    """The crops of some slides, or ready-cut ones: item i is (uint8 (3, 224, 224), cells (K, 2) in px of it).

    files[i], owner[i] (the slide), corners[i] (level-0 px) and cells(i) say what it is. What could not be
    prepared is left out; with_cells=False needs no cells. shuffle_seed: for shuffle_places, as a control.
    """

    def __init__(self, data, names, with_cells=True, shuffle_seed=None):
        self.files, self.owner, corners, counts, cells = [], [], array("q"), [], array("f")
        ready_cut = dict.fromkeys(names, np.zeros((0, 2)))
        if data.kind == "crops" and with_cells:
            ready_cut = read_crop_cells(data)
        for name in names:
            if data.kind == "slides":
                found = slide_crops(data, name, with_cells)
            else:
                found = [(data.images[name], (0, 0), ready_cut[name])] if name in ready_cut else []
            for path, corner, xy in found:
                if shuffle_seed is not None:
                    xy = shuffle_places(xy, np.random.default_rng([shuffle_seed, len(self.files)]))
                self.files.append(path)
                self.owner.append(name)
                corners.extend(corner)
                counts.append(len(xy))
                cells.frombytes(xy.astype(np.float32).tobytes())
        self.corners = np.frombuffer(corners, np.int64).reshape(-1, 2)
        self.start = np.cumsum([0] + counts)  # flat arrays: workers share them uncopied
        self.xy = np.frombuffer(cells, np.float32).reshape(-1, 2)

    def __len__(self):
        return len(self.files)

    def cells(self, i):
        return self.xy[self.start[i]: self.start[i + 1]]

    def priors(self):
        """P_c of every crop as a whole, (N, n)."""
        p, grid = 16, CROP // 16
        inside = ((self.xy >= 0) & (self.xy < CROP)).all(1)
        x, y = (self.xy[inside] // p).astype(np.int64).T
        out = torch.zeros(len(self), grid * grid)
        crop = np.repeat(np.arange(len(self)), np.diff(self.start))[inside]  # of each cell
        out[crop, y * grid + x] = 1
        return out

    def __getitem__(self, i):
        image = torch.from_numpy(np.asarray(read_crop(self.files[i])[0]).copy())
        return image.permute(2, 0, 1), torch.from_numpy(self.cells(i))


def slide_crops(data, name, with_cells):
    """[(file, (x, y) in level-0 px, cells (K, 2) in px of the crop), ...] of a slide; [] if skipped."""
    info, xy = tile_info(data, name), ready_cells(data, name) if with_cells else np.zeros((0, 2))
    if info is None or xy is None:
        return []
    side, scale, folder = tile_side(info), info["slide_mpp"] / info["mpp"], str(tiles_folder(data) / name)
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    files = [file for file in files if re.fullmatch(r"\d+_\d+\.jpg", file)]  # not what somebody put there
    corners = np.array([file[:-4].split("_") for file in files]).astype(np.int64).reshape(-1, 2)
    cells = [None] * len(files)
    for y in np.unique(corners[:, 1]):
        row = np.flatnonzero(corners[:, 1] == y)
        band = xy[slice(*np.searchsorted(xy[:, 1], (y, y + side)))]
        band = band[band[:, 0].argsort()]
        for k, ends in zip(row, np.searchsorted(band[:, 0], corners[row, :1] + (0, side))):
            cells[k] = ((band[slice(*ends)] - corners[k]) * scale).astype(np.float32)
    return [(f"{folder}/{file}", *rest) for file, *rest in zip(files, corners.tolist(), cells)]


def shuffle_places(xy, rng, patch_size=16):
    """Cells (K, 2) of a crop with its patches permuted: each cell patch keeps its cells but moves."""
    grid = CROP // patch_size
    column, row = (np.clip(xy, 0, CROP - 1) // patch_size).astype(int).T
    to = rng.permutation(grid * grid)[row * grid + column]
    return np.stack([to % grid, to // grid], 1) * patch_size + xy % patch_size


def collate(items):
    """Crops (B, 3, H, W) uint8 and their cells (B, K, 2), padded with NaN."""
    cells = torch.nn.utils.rnn.pad_sequence([xy for _, xy in items], True, float("nan"))
    return torch.stack([image for image, _ in items]), cells


# ---------------------------------------------------------------- views with their priors

BLUR_SIGMA = (0.1, 2.0)  # px
GREY = (0.299, 0.587, 0.114)  # luma, as Pillow's "L"
GLOBAL_1 = dict(blur=1.0, solarize=0.0)  # probabilities in each kind of view
GLOBAL_2 = dict(blur=0.1, solarize=0.2)
LOCAL = dict(blur=0.5, solarize=0.0)
JITTER, GREYSCALE, FLIP = 0.8, 0.2, 0.5  # probabilities
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1  # strengths


class PartOfBatch(torch.Generator):
    """A generator for a part of a batch, as a process or an accumulated step has it: part = (index, parts).

    The numbers of the whole batch are drawn and the part's are kept, so that a crop's views are the same
    whoever makes them.
    """

    part = 0, 1


def uniform(shape, low, high, generator):
    """Random numbers of shape (B, ..), on the generator's device."""
    index, parts = getattr(generator, "part", (0, 1))
    B = shape[0]
    whole = torch.empty((parts * B, *shape[1:]), device=generator.device)
    return whole.uniform_(low, high, generator=generator)[index * B: (index + 1) * B]


def apply_where(chosen, function, images, *values):
    """function(images, *values) where chosen (B,), else the image as it is; values (B,)."""
    if images.is_cuda:  # of all of them: which are chosen is not asked, for the host would wait
        return torch.where(chosen[:, None, None, None], function(images, *values), images)
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        images[rows] = function(images[rows], *(value[rows] for value in values))
    return images


def random_boxes(count, size, scale, generator, ratio=(3 / 4, 4 / 3), tries=10):
    """Random resized crops of a size x size image: (count, 4) as left, top, width, height in whole px.

    The area is uniform in scale, the log of the aspect ratio uniform; the first of ten tries that fits is
    taken, else the whole image.
    """
    area = uniform((count, tries), *scale, generator) * size * size
    aspect = uniform((count, tries), math.log(ratio[0]), math.log(ratio[1]), generator).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= size) & (h > 0) & (h <= size)
    first = fits.float().argmax(1, keepdim=True)
    any_fits = fits.any(1, keepdim=True)
    w, h = (torch.where(any_fits, side.gather(1, first), size).squeeze(1) for side in (w, h))

    def corner(side):
        room = size - side
        return ((room + 1) * uniform((count,), 0, 1, generator)).floor().clamp(max=room)
    return torch.stack([corner(w), corner(h), w, h], 1)


def resample(images, boxes, flip, size):
    """Boxes of images (B, 3, H, W), resampled to (B, 3, size, size), mirrored where flip (B,); bilinear."""
    B, _, H, W = images.shape
    left, top, w, h = boxes.unbind(1)
    sign = 1 - 2 * flip.float()
    theta = torch.zeros(B, 2, 3, device=images.device)  # from view to image coordinates, both -1 to 1
    theta[:, 0, 0], theta[:, 0, 2] = sign * w / W, (2 * left + w) / W - 1
    theta[:, 1, 1], theta[:, 1, 2] = h / H, (2 * top + h) / H - 1
    grid = F.affine_grid(theta, (B, 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def affine(matrix, offset=None):
    """rgb -> matrix rgb + offset as (B, 4, 4): matrix (B, 3, 3), offset (B, 3)."""
    out = torch.eye(4, device=matrix.device).repeat(len(matrix), 1, 1)
    out[:, :3, :3] = matrix
    if offset is not None:
        out[:, :3, 3] = offset
    return out


def hue_matrix(turn):
    """Colours turned about the grey axis by that share of a circle (B,), in YIQ: (B, 3, 3)."""
    yiq = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], device=turn.device)
    cos, sin = torch.cos(2 * math.pi * turn), torch.sin(2 * math.pi * turn)
    rotation = torch.eye(3, device=turn.device).repeat(len(turn), 1, 1)
    rotation[:, 1, 1], rotation[:, 1, 2], rotation[:, 2, 1], rotation[:, 2, 2] = cos, sin, -sin, cos
    return torch.linalg.inv(yiq) @ rotation @ yiq


def jitter_matrix(mean, brightness, contrast, saturation, hue, grey, order):
    """Colour jitter and grey as one affine map of RGB: (B, 3, 4), rgb -> A rgb + b.

    mean (B, 3): each image's mean colour. brightness, contrast, saturation (B,): factors as Pillow's
    ImageEnhance takes them, 1 changes nothing; hue (B,): turn about the grey axis as a share of a circle;
    grey (B,) bool, done last. order (B, 4): the order of the four, each row a permutation of 0 to 3.
    """
    B, device = len(mean), mean.device
    eye, luma = torch.eye(3, device=device), torch.tensor(GREY, device=device)
    to_grey = luma.expand(3, 3)
    mean = torch.cat([mean, torch.ones(B, 1, device=device)], 1).unsqueeze(-1)  # (B, 4, 1)
    brightness, contrast, saturation = (v[:, None, None] for v in (brightness, contrast, saturation))
    brighten, turn_hue = affine(brightness * eye), affine(hue_matrix(hue))
    saturate = affine(to_grey + saturation * (eye - to_grey))
    total = affine(eye.expand(B, 3, 3))
    for step in range(4):
        mean_grey = (total @ mean)[:, :3, 0] @ luma  # of the image so far: contrast pivots on it
        offset = (1 - contrast[:, 0]) * mean_grey[:, None]
        contrasted = affine(contrast * eye, offset.expand(B, 3))
        choices = torch.stack([brighten, contrasted, saturate, turn_hue], 1)  # (B, 4 operations, 4, 4)
        total = choices[torch.arange(B, device=device), order[:, step]] @ total
    total = torch.where(grey[:, None, None], affine(to_grey[None]) @ total, total)
    return total[:, :3]


def random_jitter(images, generator, jitter=1.0, greyscale=1.0):
    """Brightness and contrast 0.4, saturation 0.2, hue 0.1 with probability 0.8; then grey with 0.2.

    jitter multiplies the strengths and their probability, greyscale that of grey.
    """
    B = len(images)
    on = (uniform((B,), 0, 1, generator) < JITTER * jitter).float()
    brightness, contrast, saturation, hue = (
        on * uniform((B,), -s * jitter, s * jitter, generator)
        for s in (BRIGHTNESS, CONTRAST, SATURATION, HUE))
    brightness, contrast, saturation = 1 + brightness, 1 + contrast, 1 + saturation
    grey = uniform((B,), 0, 1, generator) < GREYSCALE * greyscale
    order = uniform((B, 4), 0, 1, generator).argsort(1)
    matrix = jitter_matrix(images.mean((2, 3)), brightness, contrast, saturation, hue, grey, order)
    flat = torch.baddbmm(matrix[:, :, 3:], matrix[:, :, :3], images.flatten(2))
    return flat.clamp_(0, 1).view_as(images)


def blur(images, sigma):
    """Gaussian blur, sigma (B,) px, edges replicated. (B, 3, H, W)."""
    B, C, H, W = images.shape
    radius = math.ceil(3 * BLUR_SIGMA[1])
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)[:, None]  # (B * 3, 1, 13)
    flat = F.pad(images.reshape(1, B * C, H, W), [radius] * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=B * C)
    return F.conv2d(flat, kernel[:, :, :, None], groups=B * C).view_as(images)


def solarize(images):
    """Inverts values of a half and above: x to 1 - x."""
    return torch.where(images >= 0.5, 1 - images, images)


def make_view(images, cells, kind, size, scale, generator, counts=False):
    """One view of every image (B, 3, S, S) in 0 to 1: (B, 3, size, size) normalised, and its P_c (B, n).

    kind: probabilities of blur and of solarising, random_jitter's factors, mean and std of the pixels.
    """
    B = len(images)
    boxes = random_boxes(B, images.shape[-1], scale, generator)
    flip = uniform((B,), 0, 1, generator) < FLIP
    x = random_jitter(resample(images, boxes, flip, size), generator, kind["jitter"], kind["greyscale"])
    sigma, chance = uniform((B,), *BLUR_SIGMA, generator), uniform((B,), 0, 1, generator)
    x = apply_where(chance < kind["blur"], blur, x, sigma)
    x = apply_where(uniform((B,), 0, 1, generator) < kind["solarize"], solarize, x)
    return normalize(x, kind["stats"]), view_prior(cells, boxes, flip, size, counts=counts)


def make_views(crops, cells, generator, local_crops=8, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4),
               global_size=224, local_size=96, jitter=1.0, greyscale=1.0, solarize=1.0, blur=1.0,
               stats=(MEAN, STD), counts=False):
    """Global views, then local views, of uint8 crops (B, 3, S, S) with cells (B, K, 2).

    Gives views [(2, B, 3, 224, 224), (local, B, 3, 96, 96)] and priors [(2, B, 196), (local, B, 36)], on the
    device of the generator, which all random numbers come from. scale: share of the crop's area; size: px.
    jitter (its strengths, too), greyscale, solarize, blur multiply DINO's probabilities; counts: view_prior.
    """
    def scaled(kind):
        return dict(jitter=jitter, greyscale=greyscale, solarize=kind["solarize"] * solarize,
                    blur=kind["blur"] * blur, stats=stats)
    images, cells = crops.to(generator.device).float() / 255, cells.to(generator.device)
    groups = [[(scaled(kind), global_size, global_scale) for kind in (GLOBAL_1, GLOBAL_2)],
              [(scaled(LOCAL), local_size, local_scale)] * local_crops]
    views, priors = [], []
    for group in groups:
        made = [make_view(images, cells, kind, size, scale, generator, counts) for kind, size, scale in group]
        if made:
            views.append(torch.stack([x for x, _ in made]))
            priors.append(torch.stack([p for _, p in made]))
    return views, priors


# ---------------------------------------------------------------- data sets and their split

def find_data(data, mpp=None, prior="auto", split_seed=0, root="datasets", slide_mpp=None):
    """The data set of a name or a folder with every label's split: a wsi.folders.Data.

    The split is labels.csv's; what that leaves open is in datasets/<name>/split.csv, made once by patient
    with split_seed. InputError in one line for what is missing or if a patient is in two splits.
    """
    found = find_folder(data, mpp, prior, root, slide_mpp)
    complete_split(found.labels, found.kind, found.work / "split.csv", split_seed)
    split_of = {}
    for name, row in found.labels.items():
        other = split_of.setdefault(row["patient"], row["split"])
        if other != row["split"]:
            raise InputError(
                f"{found.source}: patient {row['patient']!r} is in {other} and in {row['split']} ({name}); "
                f"keep a patient in one split, in labels.csv or {found.work}/split.csv")
    return found


def complete_split(labels, kind, path, seed):
    """Fills in the split that labels.csv leaves open, in place: all of it, or the validation part of slides.

    labels: {name: {"label", "patient", "split"}}. Names and patients in the split.csv at path stay where they
    are; new ones are drawn (draw_split) and added to it. The file may be edited.
    """
    given, slides = {row["split"] for row in labels.values()}, kind == "slides"
    if "" in given:
        parts = ["test", "val"] if slides else ["test"]  # ready-cut crops are evaluated in folds
    elif given and "val" not in given and slides:
        parts = ["val"]
    else:
        return
    rows = read_split(path) if path.is_file() else {}
    undecided = {name: row for name, row in labels.items() if row["split"] in ("", "train")}
    kept = {row["patient"]: row["split"] for row in rows.values()}
    kept |= {row["patient"]: rows[name]["split"] for name, row in undecided.items() if name in rows}
    split_of = draw_split(undecided, kept, parts, seed)
    for name, row in undecided.items():
        row["split"] = rows[name]["split"] if name in rows else split_of[row["patient"]]
    new = undecided.keys() - rows.keys()
    if new:
        rows |= {name: labels[name] for name in new}
        write_csv(path, [("name", "patient", "split")] + [
            (name, row["patient"], row["split"]) for name, row in sorted(rows.items())])
        print(f"Wrote {path}: the split of {len(new)} more {kind}, by patient; it may be edited.")


def read_split(path):
    """{name: {"patient", "split"}} of a split.csv."""
    names, rows = read_csv(path)
    if not {"name", "patient", "split"} <= set(names):
        raise InputError(f"{path}: its first line has to name the columns name,patient,split")
    out = {}
    for line, row in rows:
        split, name = SPLITS.get(row.get("split", "").lower()), row["name"]
        if not split or name in out:
            raise InputError(f"{path}: line {line}: one of train, val, test is expected for {name!r}, once")
        out[name] = {"patient": row.get("patient", ""), "split": split}
    return out


def draw_split(rows, kept, parts, seed):
    """{patient: split} of all patients in rows ({name: {"label", "patient"}}), by class and seeded.

    kept {patient: split} stay. Of each class a fifth of the patients goes to the first of parts, a fifth of
    the others to the second (at least one if there are two), the rest to train.
    """
    label_of, rng, out = {}, np.random.default_rng(seed), dict(kept)
    for name in sorted(rows):
        label_of.setdefault(rows[name]["patient"], rows[name]["label"])
    for label in sorted(set(label_of.values())):
        patients = sorted(patient for patient in label_of if label_of[patient] == label)
        undecided = [patient for patient in rng.permutation(patients).tolist() if patient not in out]
        left = len(patients)
        for part in parts:
            wanted = max(1, round(0.2 * left)) if left > 1 else 0
            there = sum(kept.get(patient) == part for patient in patients)
            for _ in range(min(wanted - there, len(undecided))):
                out[undecided.pop()] = part
            left -= wanted
        out |= dict.fromkeys(undecided, "train")
    return out


# ---------------------------------------------------------------- script

def arguments(argv):
    parser = argparse.ArgumentParser(description="What is on disk and what is missing, before training.")
    commands = parser.add_subparsers(dest="command", required=True)
    manifest = commands.add_parser("manifest", help="asks the GDC for the slides of lung or brca; writes "
                                   "manifest.tsv, labels.csv and the split")
    manifest.add_argument("--data", required=True, choices=list(gdc.PROJECTS), help="which TCGA data set")
    gdc.add_arguments(manifest)
    checked = commands.add_parser("check", help="what is there, what is missing, where to get it")
    checked.add_argument("--md5", action="store_true",
                         help="compares with the manifest's md5 sums; reads every byte")
    prepared = commands.add_parser("prepare", help="cuts tiles and finds cells, as train.py does before it "
                                   "trains; for a machine without a GPU, or many machines")
    add_shard(prepared.add_argument)
    looked = commands.add_parser("look", help="a picture of a slide: thumbnail, tissue, tile grid, cells; "
                                 "or of all slides of a folder")
    looked.add_argument("slide", help="a slide or an image, a folder of DICOM files, or a folder of slides")
    looked.add_argument("--cells", help="a segmentation result of this slide; default: the built-in detector")
    looked.add_argument("--tile", nargs="+", metavar="X,Y",
                        help="shows the tiles that hold these points in level-0 px; default: three of them")
    looked.add_argument("--out", help="the picture (look_<slide>.png, look_<folder>.png)")
    for sub in (checked, prepared):
        sub.add_argument("--data", required=True, help=f"{', '.join(DATASETS)}, or a folder")
        sub.add_argument("--prior", default="auto", choices=PRIORS, help="whose cells, as in train.py")
    for sub in (looked, prepared):
        sub.add_argument("--tissue", type=float, default=0.5,
                         help="least share of tissue in a tile, as in train.py")
    for sub in (checked, looked, prepared):
        sub.add_argument("--mpp", type=float, help="um/px of the crops (2.0 is the paper's 5x)")
        sub.add_argument("--slide-mpp", type=float, help="um/px of slides that record none")
        sub.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
        add_limits(sub.add_argument)
    for sub in (manifest, checked, prepared):
        sub.add_argument("--root", default="datasets", help="folder of the data sets")
        sub.add_argument("--split-seed", type=int, default=0, help="seed of the split, when it is first made")
    return parser.parse_args(argv)


def run(args):
    if args.command == "look":
        return look.look(args)
    if args.command == "manifest":
        labels = {slide["slide"]: slide | {"split": ""} for slide in gdc.manifest(
            args.data, args.root, args.limit, args.server, args.timeout, args.force)}
        complete_split(labels, "slides", Path(args.root, args.data, "split.csv"), args.split_seed)
        return 0
    how = args.data, args.mpp, args.prior, args.split_seed, args.root, args.slide_mpp
    if args.command == "prepare":
        return run_shard(find_data(*how), args)
    return check.check(args, *call(find_data, how))


def main(argv=None):
    return run_script("data.py", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
