"""Slides (A.1): reading at a target in um/px, tissue, tiles of 224 px.

Levels are chosen by um/px, not by number. Coordinates of tiles and cells on a slide are level-0 px, x first.
"""
import hashlib
import math
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import openslide
from PIL import Image
from scipy import ndimage

from common.errors import InputError
from common.files import part_of, write_json
from common.flags import MAX_GIGAPIXELS
from wsi.headers import UM, dicom_series, parts_of, tiff_properties
from wsi.pixels import PIXELS, is_grey, on_white, read_image

CROP = 224  # px
PLAIN_TYPES = {".png", ".jpg", ".jpeg"}
SLIDE_TYPES = PLAIN_TYPES | {
    ".svs", ".tif", ".tiff", ".btf", ".qptiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif",
    ".dcm", ".czi", ".avs"}
PACKED_TYPES = {".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
OTHER_TYPES = {  # of other scanners and microscopes, and images that are not read
    ".vsi", ".isyntax", ".i2syntax", ".kfb", ".sdpc", ".mds", ".tmap", ".afi", ".lif", ".lsm", ".nd2", ".zvi",
    ".oib", ".oir", ".ims", ".bmp", ".gif", ".webp", ".jp2", ".j2k", ".jpx", ".jxl"}
NAME_LIMIT = 200  # bytes of a slide's name: what is written adds up to 31, and a file system takes 255


def slide_name(path):
    """The name of a slide's crops and cells: its file's stem; of a DICOM series its folder's name."""
    return path.resolve().parent.name if path.suffix.lower() == ".dcm" else path.stem


def find_slides(files):
    """{name: file} of the slides among files; InputError if two have one name.

    The .dcm files of a folder are one series and so one slide, by its first file: openslide finds the others.
    InputError for two series in a folder. The images that a .vms or .vmu names are no slides themselves.
    """
    files = [path for path in sorted(files) if path.suffix.lower() in SLIDE_TYPES
             and not path.name.startswith(".") and path.is_file()]
    parts = set()
    for path in files:
        parts |= parts_of(path) if path.suffix.lower() in (".vms", ".vmu") else set()
    out, series = {}, {}
    for path in files:
        if path in parts:
            continue
        other = out.setdefault(slide_name(path), path)
        is_dicom = path.suffix.lower() == ".dcm"
        if other != path and not (is_dicom and other.parent == path.parent):
            raise InputError(f"{path}: has the name of {other}; rename one of the two")
        uid = dicom_series(path) if is_dicom else None
        if series.setdefault(other, uid) != uid:
            raise InputError(f"{path}: is of another DICOM series than {other.name}; "
                             "put each series into a folder of its own")
    return out


def why_not_read(path):
    """Returns why a file that looks like a slide is not read, with the way out; "" for any other file."""
    ending = path.suffix.lower()
    if ending in SLIDE_TYPES or ending in (".dat", ".partial"):  # MIRAX's data; downloads have their own line
        return ""
    if ending in PACKED_TYPES:
        return "is not unpacked; unpack it, or take it out"
    if ending in OTHER_TYPES:
        return f"{ending} is not read; convert it to a pyramidal TIFF, or take it out"
    vendor = openslide.OpenSlide.detect_format(path)
    ending = ".dcm" if vendor == "dicom" else ".tif"
    return f"is a slide ({vendor}) by its content; rename it to {ending}, or take it out" if vendor else ""


# ---------------------------------------------------------------- slides

MPP_LIMITS, POWER_LIMITS = (0.05, 20), (0.5, 200)  # um/px; "unknown", 0 and 10^6 count as missing
POWER_NAMES = ("openslide.objective-power", "aperio.AppMag")
BOUNDS_NAMES = ("openslide.bounds-x", "openslide.bounds-y")


class NoScale(InputError):
    """A slide records no um/px and none is given."""


def number(text, low, high):
    """A property as a float between low and high, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if low < value < high else None


OTHER_AXIS = {"openslide.mpp-x": "openslide.mpp-y", "OME.PhysicalSizeX": "OME.PhysicalSizeY"}
RECORDS = ("openslide.mpp-x", "aperio.MPP", "OME.PhysicalSizeX", "openslide.objective-power", "aperio.AppMag",
           "tiff.XResolution", "tiff.ResolutionUnit")


def check_square(x, y):
    """ValueError if px of x um by y um are not square; y is None if it is not known."""
    if y and not 0.95 < x / y < 1 / 0.95:
        raise ValueError(f"its px are not square: {x:g} by {y:g} um")


def mpp_by_resolution(properties, axis):
    """Returns the um/px of the TIFF's resolution tags, or None."""
    unit = UM.get(properties.get("tiff.ResolutionUnit", "inch"), 0)
    per_unit = number(properties.get(f"tiff.{axis}Resolution"), 0, 1e9)
    return number(unit / per_unit, *MPP_LIMITS) if per_unit else None


def first_number(properties, names, limits):
    """Returns the first of the named properties that is a number within limits, and its name; or None, ""."""
    for name in names:
        value = number(properties.get(name), *limits)
        if value is not None:
            return value, name
    return None, ""


def recorded_mpp(properties):
    """um/px of level 0 as the file records it, the property that says so, and a warning or "".

    The order is openslide.mpp-x and -y, aperio.MPP, OME's PhysicalSizeX, 10 / objective power, TIFF
    resolution; (None, "", "") if there is none. Where mpp and power differ by more than 1.5 times, mpp
    counts, with a warning. ValueError if the px are not square (to 5 %).
    """
    mpp, name = first_number(properties, ("openslide.mpp-x", "aperio.MPP", "OME.PhysicalSizeX"), MPP_LIMITS)
    power, power_name = first_number(properties, POWER_NAMES, POWER_LIMITS)
    if name in OTHER_AXIS:
        check_square(mpp, number(properties.get(OTHER_AXIS[name]), *MPP_LIMITS))
    if mpp:
        warning = ""
        if power and not 1 / 1.5 <= mpp * power / 10 <= 1.5:
            warning = (f"{name} is {mpp:g} um/px, but {power_name} {power:g} would be {10 / power:g}; "
                       f"{mpp:g} is used")
        return mpp, name, warning
    if power:
        return 10 / power, power_name, ""
    mpp = mpp_by_resolution(properties, "X")
    if mpp:
        check_square(mpp, mpp_by_resolution(properties, "Y"))
    return mpp, "tiff.XResolution" if mpp else "", ""


def recorded_bounds(properties):
    """Returns where QuPath's picture of a slide begins, (x, y) in level-0 px; (0, 0) if none is recorded."""
    x, y = (number(properties.get(name), -1e9, 1e9) for name in BOUNDS_NAMES)
    return int(x or 0), int(y or 0)


def matching_levels(sizes):
    """Returns the levels of these (width, height) that are level 0 reduced: one ratio, to 1 % and one px.

    A level of other proportions is another picture, such as a macro image that is marked as a level.
    """
    width, height = sizes[0]
    return [level for level, (w, h) in enumerate(sizes)
            if abs(w * height - h * width) <= 0.01 * w * height + width + height]


class Slide:
    """An open slide, or a plain image taken as one. width, height: level-0 px; mpp: um/px of level 0.

    slide_mpp: um/px to take where none is recorded; said_mpp: to take whatever is recorded. source is where
    mpp is from: a property's name, "--slide-mpp" or "labels.csv"; warning is what is odd about it.
    power: the objective power that the file records, or None, whatever mpp is. bounds: see recorded_bounds.
    InputError, with the file's name, if it cannot be read or it claims more px than gigapixels
    (--max-gigapixels), as a broken file may (whoever opens a slide again need not check that); NoScale if
    there is no um/px.
    """

    def __init__(self, path, slide_mpp=None, said_mpp=None, gigapixels=math.inf):
        self.path = Path(path)
        if len(os.fsencode(slide_name(self.path))) > NAME_LIMIT:
            raise InputError(f"{path}: its name has more than {NAME_LIMIT} bytes; rename it")
        most = gigapixels * 1e9
        limit = f"--max-gigapixels {gigapixels:g}; raise it if the slide is that large"
        try:
            self.handle = openslide.OpenSlide(str(path))
        except openslide.OpenSlideUnsupportedFormatError:
            self.handle = openslide.ImageSlide(read_image(path, most, limit))
        except (openslide.OpenSlideError, OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be opened as a slide ({str(error) or type(error).__name__}); "
                             "is the file whole?") from None
        self.width, self.height = self.handle.dimensions
        properties = dict(self.handle.properties)
        try:
            self.mpp, self.source, self.warning = recorded_mpp(properties)
            if not self.mpp and not said_mpp:
                properties |= tiff_properties(path, self.width)
                self.mpp, self.source, self.warning = recorded_mpp(properties)
        except ValueError as error:
            raise InputError(f"{path}: {error}; convert it to square px") from None
        if said_mpp:
            if self.mpp and not 1 / 1.5 <= self.mpp / said_mpp <= 1.5:
                self.warning = f"{self.source} is {self.mpp:g} um/px, labels.csv's {said_mpp:g} is used"
            self.mpp, self.source = said_mpp, "labels.csv"
        if not self.mpp:
            self.mpp, self.source = slide_mpp, "--slide-mpp"
        if not self.mpp:
            found = ", ".join(f"{name} {properties[name]}" for name in RECORDS if name in properties)
            raise NoScale(f"{path}: no um/px and no magnification is recorded in it "
                          f"(found: {found or 'nothing'}); give it with "
                          "--slide-mpp or a column mpp in labels.csv (0.25 for 40x, 0.5 for 20x)")
        if self.width * self.height > most:
            raise InputError(f"{path}: {self.width:,} x {self.height:,} px are more than {limit}")
        self.levels = matching_levels(self.handle.level_dimensions)
        others = [size for level, size in enumerate(self.handle.level_dimensions) if level not in self.levels]
        if others:
            sizes = ", ".join(f"{w} x {h}" for w, h in others)
            unused = f"its levels of {sizes} px are not used: level 0 has other proportions"
            self.warning = f"{self.warning}; {unused}" if self.warning else unused
        self.power = first_number(properties, POWER_NAMES, POWER_LIMITS)[0]
        self.bounds = recorded_bounds(properties)

    def check_target(self, mpp):
        """InputError if the slide is too coarse for tiles at mpp um/px."""
        if self.mpp > 1.25 * mpp:
            raise InputError(f"{self.path}: recorded at {self.mpp:g} um/px, too coarse for {mpp:g}; "
                             "give a larger --mpp")

    def level_for(self, mpp):
        """The coarsest level that is still as fine as mpp (5 % coarser is allowed), and its downsample.

        Only matching_levels count.
        """
        downs = self.handle.level_downsamples
        fine = [i for i in self.levels if downs[i] * self.mpp <= mpp * 1.05]
        level = max(fine, key=lambda i: downs[i], default=0)
        return level, downs[level]

    def read_rgba(self, level, x, y, width, height):
        """RGBA image of a box of a level, in px of that level; transparent outside the slide."""
        down = self.handle.level_downsamples[level]
        try:
            return self.handle.read_region((round(x * down), round(y * down)), level, (width, height))
        except (openslide.OpenSlideError, OSError, Image.DecompressionBombError) as error:
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


SAMPLE = 1 << 14  # bytes at a file's start, middle and end that are compared


def file_identity(path):
    """Returns what tells a replaced file from the original: its name, size in bytes and hash of samples.

    pixels: the version of ours that decodes it.
    """
    status = Path(path).stat()
    return {"file_name": Path(path).name, "file_bytes": status.st_size,
            "file_hash": sample_hash(Path(path), status.st_size, status.st_mtime_ns), "pixels": PIXELS}


@lru_cache(maxsize=None)  # each file is read once in a process, unless it changes
def sample_hash(path, size, changed):
    """Returns 16 hex digits of the SHA-256 of a file's size, start, middle and end; "" if unreadable."""
    digest = hashlib.sha256(str(size).encode())
    try:
        with open(path, "rb") as file:
            for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
                file.seek(max(0, start))
                digest.update(file.read(SAMPLE))
    except OSError:
        return ""
    return digest.hexdigest()[:16]


def cut_tiles(path, crops, mpp, slide_mpp, tissue, said_mpp=None, gigapixels=MAX_GIGAPIXELS):
    """Writes a slide's tiles to crops/<slide>/<x>_<y>.jpg and, last, crops/<slide>.json; gives the Slide.

    The JSON holds what they were cut from and how. mpp: um/px of the tiles; slide_mpp, said_mpp: as Slide
    takes them. One thread reads blocks, another resamples and writes them; at most three blocks are held, so
    memory stays flat.
    """
    slide = Slide(path, slide_mpp, said_mpp, gigapixels)
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
        if not count and is_grey(slide.picture(max(MASK_MPP, slide.mpp))[0]):
            raise InputError(f"{path}: has no colour; H&E is needed")
        if not count:
            raise InputError(f"{path}: no tile of {CROP} px at {mpp:g} um/px with {tissue:.0%} tissue; "
                             "lower --tissue or --mpp")
        shutil.rmtree(crops / name, ignore_errors=True)
        part.rename(crops / name)
        write_json(crops / f"{name}.json", {
            "slide": name, **file_identity(path), "mpp": mpp, "slide_mpp": slide.mpp,
            "mpp_source": slide.source, "tissue": tissue, "tiles": count, "width": slide.width,
            "height": slide.height, "power": slide.power, "bounds": slide.bounds})
    except OSError as error:
        raise InputError(f"{crops / name}: cannot be written ({error.strerror}); "
                         "make room or run where you may write") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return slide
