"""Decodes plain images (PNG, JPEG, TIFF) into 8-bit RGB: slides without levels, crops, labelled patches."""
import os

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION

from common.errors import InputError, one_line

PIXELS = 2  # version of the decoding; raise it with every change, so that tiles and cells are recomputed
FORMATS = ("PNG", "JPEG", "TIFF")  # Pillow may open no others, since some of them start system programs
DEPTHS = (8, 10, 12, 14, 16)  # bits of a 16-bit number that cameras and scanners use
INTEGERS = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes for grey of more than 8 bits
COLOR = 4  # of 255: an image whose channels never differ by more counts as grey
CROP_PIXELS = 2 ** 27  # about Pillow's own limit
CROP_LIMIT = "a crop may have; put it in slides/ to have it cut into tiles"
WAY_OUT = "save it as 8-bit RGB"
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit, of the whole process: check_size has ours


def read_image(path, most=CROP_PIXELS, limit=CROP_LIMIT):
    """Returns a plain image as 8-bit RGB, turned upright as its EXIF orientation says.

    most: the largest number of px allowed; limit: how the message names that number. InputError if the image
    is larger or cannot be read.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: is missing")
    try:
        with Image.open(path, formats=FORMATS) as image:
            check_size(path, image, most, limit)
            return to_rgb(path, image)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types for a broken file
        raise InputError(
            f"{path}: cannot be read as an image ({one_line(error)}); is the file complete? Plain images are "
            "PNG, JPEG or TIFF of a usual compression, preferably 8-bit RGB") from None


def check_size(path, image, most, limit):
    """InputError for more px than allowed, or than fit in memory: Pillow needs 4 bytes per px."""
    size = f"{image.width:,} x {image.height:,} px"
    count = image.width * image.height
    if count > most:
        raise InputError(f"{path}: {size} are more than {limit}")
    has_sysconf = hasattr(os, "sysconf")  # not on Windows
    if has_sysconf and 4 * count > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise InputError(f"{path}: {size} take {4 * count / 2 ** 30:.0f} GiB, more than this machine has, "
                         "since a plain image is decoded whole; convert it to a tiled TIFF with levels")


def to_rgb(path, image):
    """Returns an opened image as 8-bit RGB: transparent px become white, 16 bits are scaled by their range.

    The range is the smallest of DEPTHS that holds the largest value, since 12 bits often come in 16-bit
    numbers; scaling by the image's own minimum and maximum would change the stain from crop to crop. Of
    16-bit colour Pillow keeps the upper 8 bits only, so an image that uses 14 bits or fewer is refused.
    """
    if image.mode == "F":
        raise InputError(f"{path}: its px are floating-point numbers without a known range; {WAY_OUT}")
    color16 = has_color16(image)
    if color16 and image.format == "TIFF" and image.tag_v2.get(PLANAR_CONFIGURATION) == 2:
        raise InputError(f"{path}: its 16-bit channels are separate planes, which Pillow cannot read; "
                         f"{WAY_OUT}")
    ImageOps.exif_transpose(image, in_place=True)  # also decodes the image
    if image.mode in INTEGERS:
        return scaled(path, np.asarray(image))
    if color16 and max(high for _, high in image.getextrema()[:3]) < 64:
        raise InputError(f"{path}: uses at most 14 of its 16 bits; scale it to 16, or {WAY_OUT}")
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        return on_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def has_color16(image):
    """Returns whether the file of an opened image holds RGB or RGBA with 16 bits per channel."""
    if image.mode not in ("RGB", "RGBA"):
        return False
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITSPERSAMPLE, (8,))) > 8
    return ";16" in str(image.tile)  # the raw mode of a PNG, such as RGB;16B


def scaled(path, grey):
    """Returns grey integer px (H, W) as an 8-bit RGB image."""
    white = next((2 ** bits - 1 for bits in DEPTHS if grey.max() < 2 ** bits), None)
    if white is None or grey.min() < 0:
        raise InputError(f"{path}: its px are {grey.min()} to {grey.max()}, no range of 8 to 16 bits; "
                         f"{WAY_OUT}")
    return Image.fromarray((grey * np.float32(255 / white)).round().astype(np.uint8)).convert("RGB")


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
