"""Sanity checks of a slide's colours and nucleus size at its um/px, and of the scale and places of its cells.

Findings are warnings, never errors.
"""
import numpy as np
from scipy import ndimage

from prior import DENSITY, HAEMATOXYLIN, TISSUE, WORK_MPP, otsu
from wsi.cells import cell_format, hovernet_mag, read_cells
from wsi.pixels import is_grey
from wsi.segment import read_box, working_grid
from wsi.slides import MASK_MPP, NoScale, Slide, tissue_mask

NUCLEUS = (4, 10)  # um: nucleus_size of tissue at its true um/px; half or twice the true um/px is outside
USUAL = sum(NUCLEUS) / 2  # um: the nucleus that suggests a scale, and that is drawn to compare
WHITE = 190  # of 255: background is at least that bright
CAST = 45  # of 255: and its channels differ by at most that much
H_AND_E = 0.5  # least share of what is not white that has the colours of H&E
SQUARE = 250  # um: the side of the squares of tissue that should each hold a cell
EMPTY = 0.3  # share of such squares without a cell: 0 for true cells of 38 images, 0.7 for a third of a slide
MISPLACED = 0.08  # share of cells outside of the slide or on glass: up to 0.038 for true cells (docs/data.md)
REGIONS = 4  # the regions with most tissue that are measured
REGION = 1024  # their side in px at about WORK_MPP


def nucleus_size(images, mpp):
    """Returns the median diameter in um of the dark blue blobs in RGB images (H, W, 3), weighted by area.

    Blobs are haematoxylin above Otsu's threshold, with their holes. Clumps do not count: the largest circle
    in a blob has to have half of its area. Nor do blobs that are mostly hole, such as a gland. mpp only
    scales the result. NaN for fewer than 20 blobs.
    """
    sizes = [np.zeros(0)]
    for image in images:
        density = sum(weight * DENSITY[image[..., i]] for i, weight in enumerate(HAEMATOXYLIN))
        density = ndimage.gaussian_filter(density.clip(0, 2), 1.0)
        tissue = density[density > TISSUE]
        if not len(tissue):
            continue
        dark = density > otsu(tissue)
        blobs, count = ndimage.label(ndimage.binary_fill_holes(dark))
        inside = blobs > 0
        blob = blobs[inside] - 1  # of each px
        area = np.bincount(blob)
        filled = area > 2 * np.bincount(blob, dark[inside])
        radius = np.zeros(count)
        np.maximum.at(radius, blob, ndimage.distance_transform_edt(inside)[inside])  # ndimage.maximum sorts
        single = (np.pi * np.square(radius) > area / 2) & (area >= 20) & ~filled
        sizes.append(2 * np.sqrt(area[single] / np.pi) * mpp)
    sizes = np.sort(np.concatenate(sizes))
    if len(sizes) < 20:
        return float("nan")
    area_so_far = np.cumsum(sizes ** 2)
    return float(sizes[np.searchsorted(area_so_far, area_so_far[-1] / 2)])


def odd_colors(picture, mask):
    """Returns what is odd in the colours of a picture (H, W, 3) with its tissue mask, a list of texts."""
    if is_grey(picture):
        return ["it has no colour, so no tile is cut; H&E is needed"]
    odd = []
    darkness = 255 - picture.min(2)
    background = picture[~mask & (darkness < 128)]
    if len(background) > 0.02 * mask.size:
        color = np.median(background, axis=0)
        if color.mean() < WHITE or np.ptp(color) > CAST:
            values = ", ".join(f"{value:.0f}" for value in color)
            odd.append(f"its background is not white (red, green, blue: {values})")
    not_white = darkness > 50
    share = mask[not_white].mean() if not_white.any() else 0
    if share < H_AND_E:
        odd.append(f"{share:.0%} of what is not white has the colours of H&E")
    return odd


def tissue_regions(slide, mask, unit):
    """Returns the REGIONS images with most tissue, and their um/px; unit: level-0 px in a px of the mask."""
    level, factor, px, down = working_grid(slide, WORK_MPP)
    side = max(1, round(REGION * down / unit))  # px of the mask
    rows, columns = (max(1, n // side) for n in mask.shape)
    shares = []
    for row, column in np.ndindex(rows, columns):
        region = mask[row * side: (row + 1) * side, column * side: (column + 1) * side]
        shares.append((region.mean(), column, row))
    best = sorted(shares, reverse=True)[:REGIONS]
    images = [read_box(slide, level, factor, column * REGION, row * REGION, REGION, REGION)
              for share, column, row in best if share > 0]
    return images, px


def what_is_odd(slide):
    """Returns what is odd about an open Slide, a list of texts: its um/px, colours, and size of nuclei."""
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp))
    mask = tissue_mask(picture, unit * slide.mpp)
    odd = odd_colors(picture, mask)
    if slide.warning:
        odd.insert(0, slide.warning)
    regions, px = tissue_regions(slide, mask, unit)
    size = nucleus_size(regions, px)
    if size < NUCLEUS[0] or size > NUCLEUS[1]:  # NaN, of too few nuclei, is neither
        odd.append(f"its nuclei measure {size:.1f} um, where {NUCLEUS[0]} to {NUCLEUS[1]} are usual: "
                   f"are {slide.mpp:g} um/px (by {slide.source}) right?")
    return odd


def places_of_cells(xy, slide):
    """Returns where cells (K, 2), in level-0 px, lie: the shares outside of a Slide, on its glass, and empty.

    empty: the share of the tissue, in squares of SQUARE um, that has no cell.
    """
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp))
    mask = tissue_mask(picture, unit * slide.mpp)
    inside = ((xy >= 0) & (xy < (slide.width, slide.height))).all(1)
    rows, columns = mask.shape
    x, y = np.minimum(xy[inside] / unit, (columns - 1, rows - 1)).astype(int).T
    side = max(1, round(SQUARE / (unit * slide.mpp)))  # px of the mask
    tissue = np.zeros((-(-rows // side), -(-columns // side)))
    cells = tissue.copy()
    np.add.at(tissue, tuple(index // side for index in np.nonzero(mask)), 1)
    np.add.at(cells, (y // side, x // side), 1)
    filled = tissue >= side ** 2 / 2
    empty = float((cells[filled] == 0).mean()) if filled.any() else 0.0
    if not len(xy):
        return 0.0, 0.0, empty
    return float((~inside).mean()), float((~mask[y, x]).sum() / len(xy)), empty


def assumed_power(path, power, slide_mpp):
    """Returns a warning if HoVer-Net's cells are converted without a recorded objective power, else ""."""
    if power or cell_format(path) != "hovernet":
        return ""
    mag = hovernet_mag(path)
    if mag is None:
        return ""
    return (f"its cells are px at {mag:g}x, and the slide records no objective power: {10 / slide_mpp:g}x is "
            f"assumed, from {slide_mpp:g} um/px")


def where_cells_are_odd(outside, on_glass, empty):
    """Returns a warning about cells with these shares (places_of_cells), or ""."""
    if outside + on_glass > MISPLACED:
        return (f"{outside:.0%} of the cells lie outside of the slide and {on_glass:.0%} on its glass: wrong "
                "scale, um instead of px, x and y exchanged, or the file of another slide?")
    if empty > EMPTY:
        return (f"{empty:.0%} of the tissue has no cell, so that it counts as background: is the file empty, "
                "or was only part of the slide segmented?")
    return ""


def read_slide_cells(file, slide):
    """Returns the cells (K, 2) of an open Slide in level-0 px, whatever the format of the file.

    Also returns a warning if their scale is assumed, if many lie outside of the slide or on its glass, or if
    much of the tissue has none, else "".
    """
    xy = read_cells(file, slide.mpp, (slide.width, slide.height), slide.power, slide.bounds)
    odd = [assumed_power(file, slide.power, slide.mpp), where_cells_are_odd(*places_of_cells(xy, slide))]
    warning = "; ".join(filter(None, odd))
    return xy, f"{warning} (python data.py look SLIDE --cells FILE shows them)" if warning else ""


def suggested_scale(path, gigapixels):
    """Returns a text with the size of a slide's nuclei in level-0 px, and the um/px that this suggests.

    The um/px are USUAL over the median size of the nuclei. On images of known um/px that was 1.0 to 1.4 times
    the truth for a whole group, and 0.6 to 2.5 times for single images: docs/data.md.
    """
    slide = Slide(path, None, 1.0, gigapixels)  # 1 um/px, so that um are px
    picture, unit = slide.picture(max(MASK_MPP, max(slide.width, slide.height) / 2000))
    regions, px = tissue_regions(slide, tissue_mask(picture, unit), unit)
    size = nucleus_size(regions, px)
    if np.isnan(size):
        return "too few nuclei were found to suggest it"
    return f"nuclei are {size:.1f} px wide; at {USUAL:g} um that is {USUAL / size:.2f} um/px"


def open_slide(path, slide_mpp, said_mpp, gigapixels):
    """Returns the Slide of a file; if it has no um/px, the error has suggested_scale."""
    try:
        return Slide(path, slide_mpp, said_mpp, gigapixels)
    except NoScale as error:
        raise NoScale(f"{error}; {suggested_scale(path, gigapixels)}") from None
