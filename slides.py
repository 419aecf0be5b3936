"""Slides (A.1): reading at a target in um/px, tissue, tiles of 224 px, cells by region.

Levels are never counted. Coordinates of tiles and cells on a slide are level-0 px, x before y.
"""
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openslide
from PIL import Image
from scipy import ndimage

import prior
from prior import InputError

CROP = 224  # px


@contextmanager
def renamed(path):
    """A temporary name beside path to write to; it takes path's name when the block ends without an error."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.part")
    try:
        temp.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        os.replace(temp, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room or run where you may write") from None
    finally:
        temp.unlink(missing_ok=True)


# ---------------------------------------------------------------- slides

def number(text):
    """A property as a positive finite float, or None: "unknown", 0 and inf count as missing."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if 0 < value < float("inf") else None


def recorded_mpp(properties):
    """um/px of level 0 as the file records it: its mpp, or 10 / objective power; None where neither is there."""
    mpp = number(properties.get("openslide.mpp-x")) or number(properties.get("aperio.MPP"))
    if mpp and 0.05 < mpp < 20:
        return mpp
    power = number(properties.get("openslide.objective-power")) or number(properties.get("aperio.AppMag"))
    return 10 / power if power and 0.5 < power < 200 else None


class Slide:
    """An open slide, or a plain image taken as one. width, height: level-0 px; mpp: um/px of level 0.

    InputError, with the file's name, where it cannot be read or no um/px is recorded and slide_mpp is None.
    """

    def __init__(self, path, slide_mpp=None):
        self.path = Path(path)
        try:
            self.handle = openslide.open_slide(str(path))
        except (openslide.OpenSlideError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: cannot be opened as a slide ({str(error) or type(error).__name__}); "
                             "is the file whole?") from None
        self.mpp = recorded_mpp(self.handle.properties) or slide_mpp
        if not self.mpp:
            raise InputError(f"{path}: no um/px and no magnification is recorded in it; say it with --slide-mpp "
                             "(0.25 for 40x, 0.5 for 20x)")
        self.width, self.height = self.handle.dimensions

    def level_for(self, mpp):
        """The coarsest level that is still as fine as mpp (a twentieth is forgiven), and its downsample."""
        downs = self.handle.level_downsamples
        level = max((i for i, d in enumerate(downs) if d * self.mpp <= mpp * 1.05), key=lambda i: downs[i], default=0)
        return level, downs[level]

    def read_level(self, level, x, y, width, height):
        """RGB image of a box of a level, in px of that level; what lies outside the slide is white."""
        down = self.handle.level_downsamples[level]
        try:
            rgba = self.handle.read_region((round(x * down), round(y * down)), level, (width, height))
        except (openslide.OpenSlideError, OSError) as error:
            raise InputError(f"{self.path}: cannot be read at {x},{y} of level {level} ({error}); "
                             "is the file whole?") from None
        rgb = Image.new("RGB", rgba.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        return rgb

    def read(self, x, y, width, height, mpp):
        """RGB image at mpp um/px of width x height px, its corner at x, y in level-0 px; one resampling."""
        level, down = self.level_for(mpp)
        scale = mpp / self.mpp / down  # px of the level a px of the result
        left, top = x / down, y / down
        x0, y0 = int(left), int(top)
        x1, y1 = int(np.ceil(left + width * scale)), int(np.ceil(top + height * scale))
        image = self.read_level(level, x0, y0, x1 - x0, y1 - y0)
        box = (left - x0, top - y0, left - x0 + width * scale, top - y0 + height * scale)
        return image.resize((width, height), Image.BICUBIC, box=box)

    def picture(self, mpp):
        """The whole slide at about mpp um/px: uint8 (h, w, 3), and the level-0 px of one of its px.

        Whole multiples of a level's px are averaged, block by block: memory stays flat on one-level slides.
        """
        level, down = self.level_for(mpp)
        factor = max(1, int(mpp / (self.mpp * down)))
        width, height = self.handle.level_dimensions[level]
        out = np.full((max(1, height // factor), max(1, width // factor), 3), 255, np.uint8)
        step = max(1, 4096 // factor)
        for y in range(0, out.shape[0], step):
            for x in range(0, out.shape[1], step):
                h, w = min(step, out.shape[0] - y), min(step, out.shape[1] - x)
                block = self.read_level(level, x * factor, y * factor, w * factor, h * factor)
                out[y: y + h, x: x + w] = np.asarray(block.reduce(factor) if factor > 1 else block)
        return out, down * factor


# ---------------------------------------------------------------- tissue and tiles

MASK_MPP = 8.0  # um/px of the picture that the tissue mask is made of
TISSUE_SMOOTH = 16.0  # um: gaps narrower than this are tissue
TISSUE_FLOOR = 0.04  # optical density of magenta over grey below which there is none


def tissue_mask(picture, mpp):
    """Tissue of an H&E picture uint8 (h, w, 3) at mpp um/px: bool (h, w).

    Haematoxylin and eosin both take up green most: tissue is where green's optical density exceeds the mean
    of red's and blue's. White, grey dust, coverslip edges and black, blue or green ink do not.
    """
    density = -np.log((picture.astype(np.float32) + 1) / 256)
    r, g, b = (ndimage.gaussian_filter(density[..., i], TISSUE_SMOOTH / mpp / 2) for i in range(3))
    ink = (r > 1.1 * g) | (b > 0.8 * g) & (g > 0.5) & (r < 0.3 * g)  # blue or green; red
    return (g - (r + b) / 2 > np.maximum(TISSUE_FLOOR, 0.08 * g)) & ~ink  # black is grey but for noise


def tile_grid(slide, mpp, tissue):
    """Level-0 corners (N, 2) int64, row by row, of the CROP px tiles at mpp with at least that share of tissue."""
    picture, unit = slide.picture(MASK_MPP)
    mask = tissue_mask(picture, unit * slide.mpp)
    total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side = CROP * mpp / slide.mpp  # level-0 px
    corners = []
    for j in range(int(slide.height / side + 1e-9)):
        for i in range(int(slide.width / side + 1e-9)):
            x0, y0 = int(i * side / unit), int(j * side / unit)
            x1, y1 = max(x0 + 1, round((i + 1) * side / unit)), max(y0 + 1, round((j + 1) * side / unit))
            x1, y1 = min(x1, mask.shape[1]), min(y1, mask.shape[0])
            count = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
            if count >= tissue * max(1, (x1 - x0) * (y1 - y0)):
                corners.append((round(i * side), round(j * side)))
    return np.array(corners, np.int64).reshape(-1, 2)


def cut_tiles(path, crops, mpp, slide_mpp, tissue):
    """Writes a slide's tiles to crops/<slide>/<x>_<y>.jpg and, last, crops/<slide>.json; gives their number.

    Tiles that touch in a row are read and resampled in one piece, at most 16 at a time.
    """
    slide = Slide(path, slide_mpp)
    if slide.mpp > 1.25 * mpp:
        raise InputError(f"{path}: recorded at {slide.mpp:g} um/px, too coarse for {mpp:g}; give a larger --mpp")
    corners = tile_grid(slide, mpp, tissue)
    if not len(corners):
        raise InputError(f"{path}: no tile of {CROP} px at {mpp:g} um/px with {tissue:.0%} tissue; "
                         "lower --tissue or --mpp")
    name = Path(path).stem
    part = crops / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        side, start = CROP * mpp / slide.mpp, 0
        for end in range(1, len(corners) + 1):
            last = corners[end - 1]
            if end < len(corners) and end - start < 16 and corners[end][1] == last[1] and corners[end][0] - last[0] < side + 1:
                continue
            strip = slide.read(*corners[start], (end - start) * CROP, CROP, mpp)
            for k, (x, y) in enumerate(corners[start: end]):
                strip.crop((k * CROP, 0, (k + 1) * CROP, CROP)).save(part / f"{x}_{y}.jpg", quality=90)
            start = end
        shutil.rmtree(crops / name, ignore_errors=True)
        part.rename(crops / name)
        info = {"slide": name, "file": str(path), "mpp": mpp, "slide_mpp": slide.mpp, "tissue": tissue,
                "tiles": len(corners), "width": slide.width, "height": slide.height}
        with renamed(crops / f"{name}.json") as temp:
            temp.write_text(json.dumps(info))
    except OSError as error:
        raise InputError(f"{crops / name}: cannot be written ({error.strerror}); make room or run elsewhere") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(corners)


# ---------------------------------------------------------------- cells of a whole slide

REGION = 2048  # px of the detector's working size
MARGIN = 24.0  # um around a region: more than the detector sees, so that seams agree


def cell_regions(path, slide_mpp, tiles):
    """The regions of a slide that hold tiles (their (N, 2) corners and side in level-0 px), for detect_region.

    Gives [(path, slide_mpp, parameters, (x, y, w, h)), ...]; boxes are in px of the level that is read.
    """
    slide, (corners, side) = Slide(path, slide_mpp), tiles
    level, down = slide.level_for(prior.WORK_MPP)
    width, height = slide.handle.level_dimensions[level]
    size = REGION * prior.work_factor(slide.mpp * down)
    first, last = (corners / down // size).astype(int), ((corners + side) / down // size).astype(int)
    used = {(i, j) for a, b in zip(first, last) for i in range(a[0], b[0] + 1) for j in range(a[1], b[1] + 1)}
    boxes = [(i * size, j * size, min(size, width - i * size), min(size, height - j * size)) for i, j in sorted(used)]
    boxes = [box for box in boxes if box[2] > 0 and box[3] > 0]
    spread = boxes[:: max(1, len(boxes) // 4)][:4]  # the stain is judged once a slide, on a few of its regions
    sample = [np.asarray(slide.read_level(level, x, y, min(w, 1024), min(h, 1024))) for x, y, w, h in spread]
    parameters = prior.adapt(sample, slide.mpp * down)
    return [(path, slide_mpp, parameters, box) for box in boxes]


def detect_region(path, slide_mpp, parameters, box):
    """Cells (K, 2), level-0 px, whose centroid lies in the box; read with a margin, so none is cut by a seam."""
    slide = Slide(path, slide_mpp)
    level, down = slide.level_for(prior.WORK_MPP)
    factor = prior.work_factor(slide.mpp * down)
    margin = int(np.ceil(MARGIN / (slide.mpp * down) / factor)) * factor  # whole working px: the same grid everywhere
    x, y, w, h = box
    x0, y0 = max(0, x - margin), max(0, y - margin)
    limit = slide.handle.level_dimensions[level]
    x1, y1 = min(limit[0], x + w + margin), min(limit[1], y + h + margin)
    image = np.asarray(slide.read_level(level, x0, y0, x1 - x0, y1 - y0))
    xy = prior.segment_nuclei(image, slide.mpp * down, parameters) + [x0, y0]
    inside = ((xy + 0.5 >= [x, y]) & (xy + 0.5 < [x + w, y + h])).all(1)
    return (xy[inside] + 0.5) * down - 0.5
