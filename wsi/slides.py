"""Slides (A.1): reading at a target in um/px, tissue, tiles of 224 px.

Levels are chosen by um/px, not by number. Coordinates of tiles and cells on a slide are level-0 px, x first.
"""
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from PIL import Image
from scipy import ndimage

from common.errors import InputError
from common.files import part_of, write_json
from common.parallel import LIMITS

CROP = 224  # px
FORMATS = ("PNG", "JPEG", "TIFF")  # that Pillow may open; others call programs of the system
SLIDE_TYPES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".dcm",
               ".png", ".jpg", ".jpeg"}


def slide_name(path):
    """The name of a slide's crops and cells: its file's stem; of a DICOM series its folder's name."""
    return path.resolve().parent.name if path.suffix.lower() == ".dcm" else path.stem


def find_slides(files):
    """{name: file} of the slides among files; InputError if two have one name.

    The .dcm files of a folder are one series and so one slide, by its first file: openslide finds the others.
    """
    out = {}
    for path in sorted(files):
        if path.suffix.lower() not in SLIDE_TYPES or path.name.startswith(".") or not path.is_file():
            continue
        other = out.setdefault(slide_name(path), path)
        one_series = path.suffix.lower() == ".dcm" and other.parent == path.parent
        if other != path and not one_series:
            raise InputError(f"{path}: has the name of {other}; rename one of the two")
    return out


# ---------------------------------------------------------------- slides

MPP_LIMITS, POWER_LIMITS = (0.05, 20), (0.5, 200)  # um/px; "unknown", 0 and 10^6 count as missing


class NoScale(InputError):
    """A slide records no um/px and none is given."""


def number(text, low, high):
    """A property as a float between low and high, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if low < value < high else None


def recorded_mpp(properties):
    """um/px of level 0 as the file records it, the property that says so, and a warning or "".

    The order is openslide.mpp-x and -y, aperio.MPP, 10 / objective power, TIFF resolution; (None, "", "")
    if there is none. Where mpp and power differ by more than 1.5 times, mpp counts, with a warning.
    ValueError if the px are not square (to 5 %).
    """
    def first(names, limits):
        found = ((number(properties.get(name), *limits), name) for name in names)
        return next((pair for pair in found if pair[0]), (None, ""))

    mpp, name = first(("openslide.mpp-x", "aperio.MPP"), MPP_LIMITS)
    power, power_name = first(("openslide.objective-power", "aperio.AppMag"), POWER_LIMITS)
    if name == "openslide.mpp-x":
        other = number(properties.get("openslide.mpp-y"), *MPP_LIMITS) or mpp
        if not 0.95 < mpp / other < 1 / 0.95:
            raise ValueError(f"its px are not square: {mpp:g} by {other:g} um")
    if mpp:
        warning = ""
        if power and not 1 / 1.5 <= mpp * power / 10 <= 1.5:
            warning = (f"{name} is {mpp:g} um/px, but {power_name} {power:g} would be {10 / power:g}; "
                       f"{mpp:g} is used")
        return mpp, name, warning
    if power:
        return 10 / power, power_name, ""
    unit = {"inch": 25400, "centimeter": 10000}.get(properties.get("tiff.ResolutionUnit", "inch"), 0)  # um
    per_unit = number(properties.get("tiff.XResolution"), 0, 1e9)
    mpp = number(unit / per_unit, *MPP_LIMITS) if per_unit else None
    return mpp, "tiff.XResolution" if mpp else "", ""


def on_white(rgba):
    """RGBA to RGB."""
    alpha = rgba.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return rgba.convert("RGB")
    rgb = Image.new("RGB", rgba.size, "white")
    rgb.paste(rgba, mask=alpha)
    return rgb


class Slide:
    """An open slide, or a plain image taken as one. width, height: level-0 px; mpp: um/px of level 0.

    slide_mpp: um/px to take where none is recorded; said_mpp: to take whatever is recorded. source is where
    mpp is from: a property's name, "--slide-mpp" or "labels.csv"; warning is what is odd about it.
    InputError, with the file's name, if it cannot be read; NoScale if there is no um/px.
    """

    def __init__(self, path, slide_mpp=None, said_mpp=None):
        self.path = Path(path)
        try:
            try:
                self.handle = openslide.OpenSlide(str(path))
            except openslide.OpenSlideUnsupportedFormatError:
                self.handle = openslide.ImageSlide(Image.open(path, formats=FORMATS))
        except (openslide.OpenSlideError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: cannot be opened as a slide ({str(error) or type(error).__name__}); "
                             "is the file whole?") from None
        try:
            self.mpp, self.source, self.warning = recorded_mpp(self.handle.properties)
        except ValueError as error:
            raise InputError(f"{path}: {error}; convert it to square px") from None
        if said_mpp:
            if self.mpp and not 1 / 1.5 <= self.mpp / said_mpp <= 1.5:
                self.warning = f"{self.source} is {self.mpp:g} um/px, labels.csv's {said_mpp:g} is used"
            self.mpp, self.source = said_mpp, "labels.csv"
        if not self.mpp:
            self.mpp, self.source = slide_mpp, "--slide-mpp"
        if not self.mpp:
            raise NoScale(f"{path}: no um/px and no magnification is recorded in it; give it with "
                          "--slide-mpp or a column mpp in labels.csv (0.25 for 40x, 0.5 for 20x)")
        self.width, self.height = self.handle.dimensions

    def check_size(self, gigapixels):
        """InputError if it claims more than so many px (--max-gigapixels): a broken file may claim any."""
        if self.width * self.height > gigapixels * 1e9:
            raise InputError(f"{self.path}: {self.width} x {self.height} px are more than --max-gigapixels "
                             f"{gigapixels:g}; raise it if the slide is that large")

    def check_target(self, mpp):
        """InputError if the slide is too coarse for tiles at mpp um/px."""
        if self.mpp > 1.25 * mpp:
            raise InputError(f"{self.path}: recorded at {self.mpp:g} um/px, too coarse for {mpp:g}; "
                             "give a larger --mpp")

    def level_for(self, mpp):
        """The coarsest level that is still as fine as mpp (5 % coarser is allowed), and its downsample."""
        downs = self.handle.level_downsamples
        fine = [i for i, down in enumerate(downs) if down * self.mpp <= mpp * 1.05]
        level = max(fine, key=lambda i: downs[i], default=0)
        return level, downs[level]

    def read_rgba(self, level, x, y, width, height):
        """RGBA image of a box of a level, in px of that level; transparent outside the slide."""
        down = self.handle.level_downsamples[level]
        try:
            return self.handle.read_region((round(x * down), round(y * down)), level, (width, height))
        except (openslide.OpenSlideError, OSError) as error:
            raise InputError(f"{self.path}: cannot be read at {x},{y} of level {level} ({error}); "
                             "is the file whole?") from None

    def read_level(self, level, x, y, width, height):
        """The same as RGB, white outside the slide."""
        return on_white(self.read_rgba(level, x, y, width, height))

    def picture(self, mpp):
        """The whole slide at about mpp um/px: uint8 (h, w, 3), and how many level-0 px one of its px is.

        A whole number of a level's px is averaged, block by block: memory stays flat on one-level slides.
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
TISSUE_FLOOR = 0.04  # optical density of magenta over grey below which there is no tissue


def tissue_mask(picture, mpp):
    """Tissue of an H&E picture uint8 (h, w, 3) at mpp um/px: bool (h, w).

    Haematoxylin and eosin both absorb green most: tissue is where green's optical density exceeds the mean
    of red's and blue's. White, grey dust, coverslip edges and black, blue or green ink do not.
    """
    density = -np.log((picture.astype(np.float32) + 1) / 256)
    r, g, b = (ndimage.gaussian_filter(density[..., i], TISSUE_SMOOTH / mpp / 2) for i in range(3))
    ink = (r > 1.1 * g) | (b > 0.8 * g) & (g > 0.5) & (r < 0.3 * g)  # blue or green; red
    return (g - (r + b) / 2 > np.maximum(TISSUE_FLOOR, 0.08 * g)) & ~ink  # black is grey but for noise


def tissue_shares(picture, mpp, x_edges, y_edges):
    """Share of tissue in each box of a grid, (len(y_edges) - 1, len(x_edges) - 1).

    picture uint8 (h, w, 3) at mpp um/px; edges in px of the picture.
    """
    mask = tissue_mask(picture, mpp)
    total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # summed-area table

    def bounds(edges, size):
        low = np.minimum(edges[:-1].astype(int), size - 1)
        return low, np.clip(edges[1:].round().astype(int), low + 1, size)
    (x0, x1), (y0, y1) = bounds(x_edges, mask.shape[1]), bounds(y_edges, mask.shape[0])
    upper = total[np.ix_(y0, x1)] - total[np.ix_(y0, x0)]
    count = total[np.ix_(y1, x1)] - total[np.ix_(y1, x0)] - upper
    return count / np.outer(y1 - y0, x1 - x0)


BLOCK = 2560  # px a side, at least, that are read at once: large, so that few file tiles are decoded twice


@dataclass
class Block:
    """columns x rows whole tiles that are read at once; left and top in px of the level that is read."""

    image: Image.Image  # RGBA
    left: int
    top: int
    i: int  # column and row of the first tile on the slide
    j: int
    columns: int
    rows: int


def read_blocks(slide, mpp, tissue):
    """Yields Blocks of CROP px tiles at mpp um/px that cover the slide's tissue.

    Tile i, j has its level-0 corner at (i, j) * CROP * mpp / slide.mpp. Where a coarse level shows clearly
    less tissue than asked for, nothing is read; a slide without such a level is decoded whole.
    """
    level, down = slide.level_for(mpp)
    side = CROP * mpp / slide.mpp  # level-0 px of a tile
    nx, ny = int(slide.width / side + 1e-9), int(slide.height / side + 1e-9)
    maybe = np.ones((ny, nx), bool)
    if maybe.size and slide.level_for(MASK_MPP)[1] >= 4 * down:
        picture, unit = slide.picture(MASK_MPP)
        edges = (np.arange(n + 1) * side / unit for n in (nx, ny))
        maybe = tissue_shares(picture, unit * slide.mpp, *edges) >= tissue / 2
    k = int(np.ceil(BLOCK * down / side))
    for j0 in range(0, ny, k):
        for i0 in range(0, nx, k):
            j, i = np.nonzero(maybe[j0: j0 + k, i0: i0 + k])
            if not len(i):
                continue
            i, j, columns, rows = i0 + i.min(), j0 + j.min(), np.ptp(i) + 1, np.ptp(j) + 1
            left, top = int(i * side / down), int(j * side / down)
            right, bottom = int(np.ceil((i + columns) * side / down)), int(np.ceil((j + rows) * side / down))
            yield Block(slide.read_rgba(level, left, top, right - left, bottom - top), left, top,
                        i, j, columns, rows)


def write_tiles(block, slide_mpp, down, mpp, tissue, folder):
    """Resamples and writes the tiles of a block with at least that share of tissue; gives their number.

    down: level-0 px of a px of the block.
    """
    image, side = on_white(block.image), CROP * mpp / slide_mpp
    x = np.arange(block.i, block.i + block.columns + 1) * side / down - block.left  # borders, px of the block
    y = np.arange(block.j, block.j + block.rows + 1) * side / down - block.top
    factor = max(1, int(MASK_MPP / (slide_mpp * down)))
    small = np.asarray(image.reduce(factor))
    kept = np.argwhere(tissue_shares(small, slide_mpp * down * factor, x / factor, y / factor) >= tissue)
    for j, i in kept:
        box = (x[i], y[j], min(x[i + 1], image.width), min(y[j + 1], image.height))
        tile = image.resize((CROP, CROP), Image.BICUBIC, box=box)
        tile.save(folder / f"{round((block.i + i) * side)}_{round((block.j + j) * side)}.jpg", quality=90)
    return len(kept)


def file_identity(path):
    """What tells a replaced file from the original: its name and its size in bytes."""
    return {"file_name": Path(path).name, "file_bytes": Path(path).stat().st_size}


def cut_tiles(path, crops, mpp, slide_mpp, tissue, said_mpp=None, gigapixels=LIMITS.gigapixels):
    """Writes a slide's tiles to crops/<slide>/<x>_<y>.jpg and, last, crops/<slide>.json; gives the Slide.

    The JSON holds what they were cut from and how. mpp: um/px of the tiles; slide_mpp, said_mpp: as Slide
    takes them. One thread reads blocks, another resamples and writes them; at most three blocks are held, so
    memory stays flat.
    """
    slide = Slide(path, slide_mpp, said_mpp)
    slide.check_size(gigapixels)
    slide.check_target(mpp)
    name, down = slide_name(Path(path)), slide.level_for(mpp)[1]
    part, count, waiting = part_of(crops / name), 0, deque()
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        with ThreadPoolExecutor(1) as writer:
            for block in read_blocks(slide, mpp, tissue):
                waiting.append(writer.submit(write_tiles, block, slide.mpp, down, mpp, tissue, part))
                while len(waiting) > 2:
                    count += waiting.popleft().result()
            count += sum(job.result() for job in waiting)
        if not count:
            raise InputError(f"{path}: no tile of {CROP} px at {mpp:g} um/px with {tissue:.0%} tissue; "
                             "lower --tissue or --mpp")
        shutil.rmtree(crops / name, ignore_errors=True)
        part.rename(crops / name)
        write_json(crops / f"{name}.json", {
            "slide": name, **file_identity(path), "mpp": mpp, "slide_mpp": slide.mpp,
            "mpp_source": slide.source, "tissue": tissue, "tiles": count, "width": slide.width,
            "height": slide.height})
    except OSError as error:
        raise InputError(f"{crops / name}: cannot be written ({error.strerror}); "
                         "make room or run where you may write") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return slide
