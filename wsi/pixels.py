"""Decodes plain images (PNG, JPEG, TIFF) into 8-bit RGB: slides without levels, crops, labelled patches."""
import math
import os
from threading import Lock

from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import InputError, one_line

PIXELS = 2  # version of the decoding; raise it with every change, so that tiles and cells are recomputed
FORMATS = ("PNG", "JPEG", "TIFF")  # Pillow may open no others, since some of them start system programs
DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes for grey of more than 8 bits
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
BITS_PER_SAMPLE = 258  # TIFF tag
COLOR = 4  # of 255: an image whose channels never differ by more counts as grey
CROP_PIXELS = 2 ** 27  # about Pillow's own limit
CROP_LIMIT = "a crop may have; put it in slides/ to have it cut into tiles"
OPENING = Lock()


def read_image(path, most=CROP_PIXELS, limit=CROP_LIMIT):
    """Returns a plain image as 8-bit RGB, turned upright as its EXIF orientation says.

    most: the largest number of px allowed; limit: how the message names that number. InputError if the image
    is larger or cannot be read.
    """
    try:
        with open_image(path) as image:
            check_size(path, image, most, limit)
            return to_rgb(path, image)
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: cannot be read as an image of any known format; is the file complete? "
                         "Plain images are PNG, JPEG or TIFF") from None
    except Exception as error:  # Pillow raises many types for a broken file
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)}); is the file complete? "
                         "Plain images are PNG, JPEG or TIFF, preferably 8-bit RGB") from None


def open_image(path):
    """Opens an image of any size without decoding it.

    Pillow's size limit is a global variable, so it is lifted only while the header is read, by one thread at
    a time.
    """
    with OPENING:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(path, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def check_size(path, image, most, limit):
    """InputError for more px than allowed, or than fit in memory: Pillow needs 4 bytes per px."""
    size = f"{image.width:,} x {image.height:,} px"
    count = image.width * image.height
    if count > most:
        raise InputError(f"{path}: {size} are more than {limit}")
    if 4 * count > memory_bytes():
        raise InputError(f"{path}: {size} take {4 * count / 2 ** 30:.0f} GiB, more than this machine has, "
                         "since a plain image is decoded whole; convert it to a tiled TIFF with levels")


def memory_bytes():
    """Returns the size of this machine's memory; infinity where the system does not report it (Windows)."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def to_rgb(path, image):
    """Returns an opened image as 8-bit RGB, with transparent px in white; InputError for more than 8 bits."""
    if image.mode in DEEP or has_color16(image):
        raise InputError(f"{path}: has more than 8 bits per channel; save it as 8-bit RGB")
    ImageOps.exif_transpose(image, in_place=True)  # also decodes the image
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in TRANSPARENT or "transparency" in image.info:
        return on_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def has_color16(image):
    """Returns whether the file of an opened image holds RGB or RGBA with 16 bits per channel."""
    if image.mode not in ("RGB", "RGBA"):
        return False
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8
    return ";16" in str(image.tile)  # the raw mode of a PNG, such as RGB;16B


def on_white(rgba):
    """Returns an RGBA image on a white background, as RGB."""
    alpha = rgba.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return rgba.convert("RGB")
    rgb = Image.new("RGB", rgba.size, "white")
    rgb.paste(rgba, mask=alpha)
    return rgb


def is_grey(pixels):
    """Returns whether a uint8 image (H, W, 3) shows something, but without colour."""
    darkest = pixels.min(2)
    brightest = pixels.max(2)
    return bool((brightest - darkest).max() <= COLOR < brightest.max() - darkest.min())
