"""The centroids of label images (3.2), such as Cellpose's masks: px of 1, 2, ... belong to cell 1, 2, ..."""
import numpy as np
import tifffile
from PIL import Image

from common.errors import InputError
from wsi.pixels import FORMATS  # wsi.pixels also lifts Pillow's limit

BAND = 256  # rows of a label image that are counted at once
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and big, both byte orders


def mask_cells(path, slide_size):
    """Returns the cells (K, 2) of a label image, scaled to slide_size (width, height).

    InputError for other proportions than the slide's, or labels that have wrapped.
    """
    labels = read_labels(path)
    if labels.dtype == np.uint8 and labels.any() and labels[labels > 0].min() == 255:
        raise ValueError("a mask of 0 and 255, where a label image is needed")
    height, width = labels.shape
    slide_width, slide_height = slide_size or (width, height)
    scale = (slide_width / width, slide_height / height)
    if min(scale) < 1 or not 0.99 <= scale[0] / scale[1] <= 1.01:
        raise InputError(f"{path}: is {width} x {height} px, its slide {slide_width} x {slide_height}; masks "
                         "of the whole slide are needed, at its size or of a smaller copy")
    if has_wrapped(labels):
        bits = 8 * labels.itemsize
        largest = np.iinfo(labels.dtype).max
        raise InputError(f"{path}: cells share labels, because the labels wrap at {largest}, the largest "
                         f"number of {bits} bits; save the masks with {2 * bits} bits (as cellpose's "
                         "--save_tif does)")
    return label_centroids(labels) * scale


def read_labels(path):
    """Returns the label image (H, W) of a PNG or TIFF, of integers; ValueError for other images."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"\x93NUM":
        raise InputError(f"{path}: is a pickle, which can run any program; save the masks with cellpose's "
                         "--save_tif or --save_png, or with cellpose.io.save_masks, and use "
                         f"{path.stem.removesuffix('_seg')}_cp_masks.tif or .png")
    if head in TIFF:
        with tifffile.TiffFile(path) as tiff:
            page, image = tiff.pages[0], tiff.series[0]
            paletted = page.photometric == tifffile.PHOTOMETRIC.PALETTE
            if image.ndim != 2 or image.dtype.kind not in "iu" or paletted:
                raise ValueError(f"an image {image.shape} of {image.dtype}, where a label image is needed")
            if page.compression != tifffile.COMPRESSION.LZW:  # tifffile needs another package for LZW
                return image.asarray()
    with Image.open(path, formats=FORMATS) as image:
        if image.mode not in ("L", "I", "I;16", "I;16B"):
            raise ValueError(f"an image of mode {image.mode}, where a label image is needed")
        return np.asarray(image)


def has_wrapped(labels):
    """Returns whether labels (H, W) of 8 or 16 bits start over at 1, or are capped at the largest number.

    Only labels that reach the largest number can do so. A label that cells share is spread much wider than a
    cell: the variance of its px over their count is 20 or more if three cells share it, 0.16 in a disc, and 1
    in a line twelve times as long as wide. Up to 2 % may be that wide, since a segmenter may err.
    """
    largest = np.iinfo(labels.dtype).max
    if labels.itemsize > 2 or not labels.size or labels.max() < 0.98 * largest:
        return False
    count, *sums = label_sums(labels)
    x, y, xx, yy = sums / count
    variance = xx - x ** 2 + yy - y ** 2
    return (variance > 10 * count).mean() > 0.02 or count[-1] > 20 * np.median(count)


def label_sums(labels):
    """Returns (5, K) of the labels above 0 of an image (H, W), in order: count, sums of x, y, x^2, y^2."""
    found = [labels[:0].ravel()]
    sums = [np.zeros((5, 0))]
    for top in range(0, len(labels), BAND):
        band = labels[top: top + BAND]
        row, column = np.nonzero(band > 0)
        label, index = np.unique(band[row, column], return_inverse=True)
        x = column + 0.5
        y = row + top + 0.5
        found.append(label)
        sums.append([np.bincount(index, weights) for weights in (None, x, y, x ** 2, y ** 2)])
    label, index = np.unique(np.concatenate(found), return_inverse=True)  # a label may lie in several bands
    return np.stack([np.bincount(index, values, len(label)) for values in np.concatenate(sums, 1)])


def label_centroids(labels):
    """Returns the centroids (K, 2) of an image's labels (H, W) above 0, in their order; gaps are allowed."""
    count, x, y, *_ = label_sums(labels)
    return np.stack([x / count, y / count], 1)
