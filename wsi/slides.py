"""Slides (A.1): reading them at a given um/px, the tissue mask, and cutting tiles of 224 px.

Levels are chosen by um/px, not by number. Coordinates on a slide are level-0 px, x before y.
"""
import hashlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import openslide
from PIL import Image
from scipy import ndimage

from common.errors import InputError
from common.files import not_written, temp_path, write_json
from wsi.headers import UM, dicom_series, hamamatsu_images, tiff_properties
from wsi.pixels import PIXELS, is_grey, on_white, read_image

CROP = 224  # px
PLAIN_TYPES = {".png", ".jpg", ".jpeg"}
SLIDE_TYPES = PLAIN_TYPES | {
    ".svs", ".tif", ".tiff", ".btf", ".qptiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif",
    ".dcm", ".czi", ".avs"}
PACKED_TYPES = {".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
OTHER_TYPES = {  # of other scanners and microscopes, and image types that are not read
    ".vsi", ".isyntax", ".i2syntax", ".kfb", ".sdpc", ".mds", ".tmap", ".afi", ".lif", ".lsm", ".nd2", ".zvi",
    ".oib", ".oir", ".ims", ".bmp", ".gif", ".webp", ".jp2", ".j2k", ".jpx", ".jxl"}
NAME_LIMIT = 200  # bytes of a slide's name: we add up to 31, and file systems allow 255


def slide_name(path):
    """Returns the name of a slide's crops and cells: its file's stem, or a DICOM series' folder name."""
    return path.resolve().parent.name if path.suffix.lower() == ".dcm" else path.stem


def find_slides(files):
    """Returns {name: file} of the slides among files.

    The .dcm files of a folder are one slide, listed by the first file: openslide finds the others. The images
    that a .vms or .vmu names are not slides themselves. InputError if two slides have the same name, or a
    folder holds two DICOM series.
    """
    files = [path for path in sorted(files) if path.suffix.lower() in SLIDE_TYPES
             and not path.name.startswith(".") and path.is_file()]
    hamamatsu = set()
    for path in files:
        if path.suffix.lower() in (".vms", ".vmu"):
            hamamatsu |= hamamatsu_images(path)
    slides = {}
    series = {}
    for path in files:
        if path in hamamatsu:
            continue
        other = slides.setdefault(slide_name(path), path)
        is_dicom = path.suffix.lower() == ".dcm"
        if other != path and not (is_dicom and other.parent == path.parent):
            raise InputError(f"{path}: has the same name as {other}; rename one of them")
        uid = dicom_series(path) if is_dicom else None
        if series.setdefault(other, uid) != uid:
            raise InputError(f"{path}: belongs to another DICOM series than {other.name}; "
                             "put each series into its own folder")
    return slides


def why_not_read(path):
    """Returns why a file that looks like a slide is not read, and what to do; "" for any other file."""
    ending = path.suffix.lower()
    if ending in SLIDE_TYPES or ending == ".dat":  # MIRAX's data
        return ""
    if ending == ".partial":  # gdc-client's
        return "unfinished; run gdc-client download again"
    if ending in PACKED_TYPES:
        return "is not unpacked; unpack or remove it"
    if ending in OTHER_TYPES:
        return f"{ending} is not read; convert it to TIFF (pyramidal, if it is a slide), or remove it"
    vendor = openslide.OpenSlide.detect_format(path)
    if not vendor:
        return ""
    ending = ".dcm" if vendor == "dicom" else ".tif"
    return f"its content is a slide ({vendor}); rename it to {ending}, or remove it"


# ---------------------------------------------------------------- slides

MPP_LIMITS = (0.05, 20)  # um/px; "unknown", 0 and 10^6 count as missing
POWER_LIMITS = (0.5, 200)
POWER_NAMES = ("openslide.objective-power", "aperio.AppMag")


class NoScale(InputError):
    """A slide records no um/px and none is given."""


def number(text, low, high):
    """Returns a property as a float, or None if it is not a number between low and high."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if low < value < high else None


OTHER_AXIS = {"openslide.mpp-x": "openslide.mpp-y", "OME.PhysicalSizeX": "OME.PhysicalSizeY"}
RECORDS = ("openslide.mpp-x", "aperio.MPP", "OME.PhysicalSizeX", "openslide.objective-power", "aperio.AppMag",
           "tiff.XResolution", "tiff.ResolutionUnit")


def check_square(x, y):
    """ValueError if px of x by y um are not square (to 5 %); y is None if unknown."""
    if y and not 0.95 < x / y < 1 / 0.95:
        raise ValueError(f"its px are not square: {x:g} by {y:g} um")


def mpp_by_resolution(properties, axis):
    """Returns the um/px of the TIFF's resolution tags, or None."""
    unit = UM.get(properties.get("tiff.ResolutionUnit", "inch"), 0)
    per_unit = number(properties.get(f"tiff.{axis}Resolution"), 0, 1e9)
    return number(unit / per_unit, *MPP_LIMITS) if per_unit else None


def first_number(properties, names, limits):
    """Returns the first of the named properties within limits, and its name; (None, "") if there is none."""
    for name in names:
        value = number(properties.get(name), *limits)
        if value is not None:
            return value, name
    return None, ""


def recorded_mpp(properties):
    """Returns the um/px of level 0 that a file records, the property it was read from, and a warning or "".

    The order is openslide.mpp-x and -y, aperio.MPP, OME's PhysicalSizeX, 10 / objective power, TIFF
    resolution; (None, "", "") if none is recorded. Where mpp and power differ by more than 1.5 times, mpp
    is used, with a warning. ValueError if the px are not square (to 5 %).
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
    """Returns where QuPath's image of a slide begins, (x, y) in level-0 px; (0, 0) if none is recorded."""
    x, y = (number(properties.get(f"openslide.bounds-{axis}"), -1e9, 1e9) for axis in "xy")
    return int(x or 0), int(y or 0)


def matching_levels(sizes):
    """Returns the levels, of sizes (width, height), that have the proportions of level 0 (to 1 % and one px).

    A level of other proportions shows something else, such as a macro image that is marked as a level.
    """
    width, height = sizes[0]
    return [level for level, (w, h) in enumerate(sizes)
            if abs(w * height - h * width) <= 0.01 * w * height + width + height]


class Slide:
    """An open slide, or a plain image treated as a slide.

    Parameters: slide_mpp, the um/px of level 0 if the file records none; said_mpp, the um/px of level 0
    whatever it records; gigapixels, --max-gigapixels, which is checked when a slide is first opened.
    Attributes: width and height of level 0 in px; mpp, its um/px; source, where mpp comes from (a property's
    name, "--slide-mpp" or "labels.csv"); warning, what is suspicious about mpp or the levels, or ""; power,
    the objective power that the file records, or None; bounds, see recorded_bounds; levels, the usable ones.

    InputError if the file cannot be read or claims more px than gigapixels, as a broken file may; NoScale if
    it has no um/px.
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
                             "is the file complete?") from None
        self.width, self.height = self.handle.dimensions
        properties = dict(self.handle.properties)
        self.power = first_number(properties, POWER_NAMES, POWER_LIMITS)[0]
        self.bounds = recorded_bounds(properties)
        self.mpp, self.source, self.warning = self.scale(properties, slide_mpp, said_mpp)
        if self.width * self.height > most:
            raise InputError(f"{path}: {self.width:,} x {self.height:,} px are more than {limit}")
        sizes = self.handle.level_dimensions
        self.levels = matching_levels(sizes)
        others = [f"{w} x {h}" for level, (w, h) in enumerate(sizes) if level not in self.levels]
        if others:
            unused = (f"its levels of {', '.join(others)} px are not used, since level 0 has other "
                      "proportions: is one a picture of the whole glass?")
            self.warning = f"{self.warning}; {unused}" if self.warning else unused

    def scale(self, properties, slide_mpp, said_mpp):
        """Returns mpp, source and warning (see the class); NoScale if the file records no um/px."""
        try:
            mpp, source, warning = recorded_mpp(properties)
            if not mpp and not said_mpp:
                properties = properties | tiff_properties(self.path, self.width)
                mpp, source, warning = recorded_mpp(properties)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}; convert it to square px") from None
        if said_mpp:
            if mpp and not 1 / 1.5 <= mpp / said_mpp <= 1.5:
                warning = f"{source} is {mpp:g} um/px, labels.csv's {said_mpp:g} is used"
            return said_mpp, "labels.csv", warning
        if mpp:
            if slide_mpp and not 1 / 1.01 <= mpp / slide_mpp <= 1.01:
                unused = (f"--slide-mpp {slide_mpp:g} is not used, since {source} is {mpp:g} um/px; a column "
                          "mpp in labels.csv comes first")
                warning = f"{warning}; {unused}" if warning else unused
            return mpp, source, warning
        if slide_mpp:
            return slide_mpp, "--slide-mpp", warning
        found = ", ".join(f"{name} {properties[name]}" for name in RECORDS if name in properties)
        raise NoScale(f"{self.path}: no um/px and no magnification is recorded "
                      f"(found: {found or 'nothing'}); give its um/px with --slide-mpp or a column mpp in "
                      "labels.csv (0.25 for 40x, 0.5 for 20x)")

    def check_target(self, mpp):
        """InputError if the slide is too coarse for tiles at mpp um/px."""
        if self.mpp > 1.25 * mpp:
            raise InputError(f"{self.path}: recorded at {self.mpp:g} um/px, too coarse for {mpp:g}; "
                             "give a larger --mpp")

    def level_for(self, mpp):
        """Returns the coarsest usable level that is as fine as mpp (or 5 % coarser), and its downsample."""
        downs = self.handle.level_downsamples
        fine = [i for i in self.levels if downs[i] * self.mpp <= mpp * 1.05]
        level = max(fine, key=lambda i: downs[i], default=0)
        return level, downs[level]

    def read_level(self, level, x, y, width, height):
        """Returns a box, in px of a level, as RGB, white outside the slide; InputError if it is broken."""
        down = self.handle.level_downsamples[level]
        try:
            rgba = self.handle.read_region((round(x * down), round(y * down)), level, (width, height))
        except (openslide.OpenSlideError, OSError) as error:
            raise InputError(f"{self.path}: cannot be read at {x},{y} of level {level} ({error}); "
                             "is the file complete?") from None
        return on_white(rgba)

    def picture(self, mpp):
        """Returns the whole slide at about mpp um/px, uint8 (h, w, 3), and the side of its px in level-0 px.

        factor x factor px of a level are averaged, block by block, so that memory stays flat on slides of one
        level.
        """
        level, down = self.level_for(mpp)
        factor = max(1, int(mpp / (self.mpp * down)))
        width, height = self.handle.level_dimensions[level]
        out = np.full((max(1, height // factor), max(1, width // factor), 3), 255, np.uint8)
        step = max(1, 4096 // factor)
        for y in range(0, out.shape[0], step):
            for x in range(0, out.shape[1], step):
                h = min(step, out.shape[0] - y)
                w = min(step, out.shape[1] - x)
                block = self.read_level(level, x * factor, y * factor, w * factor, h * factor)
                out[y: y + h, x: x + w] = np.asarray(block.reduce(factor) if factor > 1 else block)
        return out, down * factor


# ---------------------------------------------------------------- tissue and tiles

MASK_MPP = 8.0  # um/px of the picture that the tissue mask is computed from
TISSUE_SMOOTH = 16.0  # um: narrower gaps count as tissue
TISSUE_FLOOR = 0.04  # least optical density of tissue's magenta over grey


def tissue_mask(picture, mpp):
    """Returns where an H&E picture, uint8 (h, w, 3) at mpp um/px, shows tissue: bool (h, w).

    Haematoxylin and eosin both absorb green most, so tissue is where green's optical density exceeds the mean
    of red's and blue's. It does not in white, grey dust, coverslip edges, or black, blue or green ink.
    """
    density = -np.log((picture.astype(np.float32) + 1) / 256)
    r, g, b = (ndimage.gaussian_filter(density[..., i], TISSUE_SMOOTH / mpp / 2) for i in range(3))
    blue_or_green = r > 1.1 * g
    red = (b > 0.8 * g) & (g > 0.5) & (r < 0.3 * g)
    magenta = g - (r + b) / 2 > np.maximum(TISSUE_FLOOR, 0.08 * g)  # black is grey plus noise: hence 0.08 g
    return magenta & ~(blue_or_green | red)


def tissue_shares(picture, mpp, x_edges, y_edges):
    """Returns the share of tissue in each box of a grid, (len(y_edges) - 1, len(x_edges) - 1).

    picture uint8 (h, w, 3) at mpp um/px; edges in px of the picture.
    """
    mask = tissue_mask(picture, mpp)
    total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # summed-area table

    def bounds(edges, size):  # whole px, at least one per box
        low = np.minimum(edges[:-1].astype(int), size - 1)
        return low, np.clip(edges[1:].round().astype(int), low + 1, size)
    x0, x1 = bounds(x_edges, mask.shape[1])
    y0, y1 = bounds(y_edges, mask.shape[0])
    upper = total[np.ix_(y0, x1)] - total[np.ix_(y0, x0)]
    count = total[np.ix_(y1, x1)] - total[np.ix_(y1, x0)] - upper
    return count / np.outer(y1 - y0, x1 - x0)


BLOCK = 2560  # least side in px of what is read at once: large, so that few file tiles are decoded twice


def read_blocks(slide, mpp, tissue):
    """Yields blocks of CROP px tiles at mpp um/px that cover the slide's tissue: (image, x, y).

    x, y: the tiles' borders in level-0 px; tile i, j has its corner at (i, j) * CROP * mpp / slide.mpp. Where
    a coarse level shows clearly less tissue than required, nothing is read; a slide without such a level is
    decoded whole.
    """
    level, down = slide.level_for(mpp)
    side = CROP * mpp / slide.mpp  # of a tile, in level-0 px
    columns = int(slide.width / side + 1e-9)
    rows = int(slide.height / side + 1e-9)
    maybe = np.ones((rows, columns), bool)
    if maybe.size and slide.level_for(MASK_MPP)[1] >= 4 * down:
        picture, unit = slide.picture(MASK_MPP)
        x_edges = np.arange(columns + 1) * side / unit
        y_edges = np.arange(rows + 1) * side / unit
        maybe = tissue_shares(picture, unit * slide.mpp, x_edges, y_edges) >= tissue / 2
    k = int(np.ceil(BLOCK * down / side))
    for j0 in range(0, rows, k):
        for i0 in range(0, columns, k):
            j, i = np.nonzero(maybe[j0: j0 + k, i0: i0 + k])
            if len(i):
                x = np.arange(i0 + i.min(), i0 + i.max() + 2) * side
                y = np.arange(j0 + j.min(), j0 + j.max() + 2) * side
                left = int(x[0] / down)
                top = int(y[0] / down)
                width = int(np.ceil(x[-1] / down)) - left
                height = int(np.ceil(y[-1] / down)) - top
                yield slide.read_level(level, left, top, width, height), x, y


def write_tiles(image, level0_x, level0_y, slide_mpp, down, tissue, folder):
    """Writes the tiles of a block with enough tissue; returns their number. down: level-0 px of its px."""
    x = level0_x / down - int(level0_x[0] / down)  # the tiles' borders in px of the image
    y = level0_y / down - int(level0_y[0] / down)
    factor = max(1, int(MASK_MPP / (slide_mpp * down)))
    small = np.asarray(image.reduce(factor))
    kept = np.argwhere(tissue_shares(small, slide_mpp * down * factor, x / factor, y / factor) >= tissue)
    for j, i in kept:
        box = (x[i], y[j], min(x[i + 1], image.width), min(y[j + 1], image.height))
        tile = image.resize((CROP, CROP), Image.BICUBIC, box=box)
        tile.save(folder / f"{round(level0_x[i])}_{round(level0_y[j])}.jpg", quality=90)
    return len(kept)


SAMPLE = 1 << 14  # bytes read at a file's start, middle and end


def file_identity(path):
    """Returns inputs of common.files.stamp by which a replaced image file differs from the original.

    They are its name, size in bytes and sample_hash, and the version of our decoding.
    """
    path = Path(path)
    status = path.stat()
    return {"file_name": path.name, "file_bytes": status.st_size,
            "file_hash": sample_hash(path, status.st_size, status.st_mtime_ns), "pixels": PIXELS}


@lru_cache(maxsize=None)  # each process reads a file once, unless the file changes
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


def cut_tiles(slide, crops, mpp, tissue):
    """Writes a Slide's tiles at mpp um/px to crops/<slide>/<x>_<y>.jpg and then crops/<slide>.json.

    The JSON records the file and the settings that they were cut with. One thread reads blocks while another
    resamples and writes them; at most three blocks are in memory. InputError if no tile has enough tissue.
    """
    slide.check_target(mpp)
    name = slide_name(slide.path)
    down = slide.level_for(mpp)[1]
    temp = temp_path(crops / name)
    count = 0
    jobs = []
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        with ThreadPoolExecutor(1) as writer:
            for block in read_blocks(slide, mpp, tissue):
                jobs.append(writer.submit(write_tiles, *block, slide.mpp, down, tissue, temp))
                while len(jobs) > 2:
                    count += jobs.pop(0).result()
            count += sum(job.result() for job in jobs)
        if not count and is_grey(slide.picture(max(MASK_MPP, slide.mpp))[0]):
            raise InputError(f"{slide.path}: has no colour; H&E is needed")
        if not count:
            raise InputError(f"{slide.path}: no tile of {CROP} px at {mpp:g} um/px with {tissue:.0%} tissue; "
                             "lower --tissue or --mpp")
        shutil.rmtree(crops / name, ignore_errors=True)
        temp.rename(crops / name)
        write_json(crops / f"{name}.json", {
            "slide": name, **file_identity(slide.path), "mpp": mpp, "slide_mpp": slide.mpp,
            "mpp_source": slide.source, "tissue": tissue, "tiles": count, "width": slide.width,
            "height": slide.height, "power": slide.power, "bounds": slide.bounds})
    except OSError as error:
        raise not_written(crops / name, error) from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)
