"""Sanity checks: of a slide's colors and nuclei at its um/px, and of where its cells lie.

Findings are warnings, never errors.
"""
from contextlib import contextmanager

import numpy as np
from scipy import ndimage

from prior import DENSITY, HAEMATOXYLIN, TISSUE, WORK_MPP, otsu
from wsi.segment import read_box, working_grid
from wsi.slides import MASK_MPP, NoScale, Slide, tissue_mask

NUCLEUS = (4, 10)  # um: what nucleus_size gives for tissue at its true um/px; half or twice it is outside
USUAL = sum(NUCLEUS) / 2  # um: the nucleus that suggests a scale, and that is drawn to compare
WHITE, CAST = 190, 45  # of 255: background is brighter than that, and its channels no farther apart
H_AND_E = 0.5  # least share of what is not white that has the colours of H&E
MISPLACED = 0.08  # share of cells outside of the slide or on glass: up to 0.038 for true cells (docs/data.md)
REGION, REGIONS = 1024, 4  # px a side at about WORK_MPP, and how many regions with most tissue are looked at


def nucleus_size(images, mpp):
    """Median diameter in um of the dark blue blobs in RGB images (H, W, 3), each px counted; NaN if few.

    Blobs are haematoxylin above Otsu's threshold; clumps are left out: a blob counts if the largest circle
    in it has half of its area. Nothing in it depends on mpp, which only scales the answer.
    """
    sizes = []
    for image in images:
        density = sum(weight * DENSITY[image[..., i]] for i, weight in enumerate(HAEMATOXYLIN))
        density = ndimage.gaussian_filter(density.clip(0, 2), 1.0)
        tissue = density[density > TISSUE]
        if not len(tissue):
            continue
        blobs, count = ndimage.label(ndimage.binary_fill_holes(density > otsu(tissue)))
        if not count:
            continue
        inside = blobs > 0
        which, radius = blobs[inside] - 1, np.zeros(count)
        area = np.bincount(which)
        np.maximum.at(radius, which, ndimage.distance_transform_edt(inside)[inside])  # ndimage.maximum sorts
        single = (np.pi * np.square(radius) > area / 2) & (area >= 20)
        sizes.append(2 * np.sqrt(area[single] / np.pi) * mpp)
    sizes = np.sort(np.concatenate(sizes)) if sizes else np.zeros(0)
    if len(sizes) < 20:
        return float("nan")
    share = np.cumsum(sizes ** 2)
    return float(sizes[np.searchsorted(share, share[-1] / 2)])


def odd_colours(picture, mask):
    """What is odd in the colours of a picture (H, W, 3) of a slide with its tissue mask: a list of texts."""
    out = []
    darkness = 255 - picture.min(2)
    background = picture[~mask & (darkness < 128)]
    if len(background) > 0.02 * mask.size:
        colour = np.median(background, axis=0)
        if colour.mean() < WHITE or np.ptp(colour) > CAST:
            named = ", ".join(f"{value:.0f}" for value in colour)
            out.append(f"its background is not white (red, green, blue: {named})")
    coloured = darkness > 50
    share = mask[coloured].mean() if coloured.any() else 0
    if share < H_AND_E:
        out.append(f"{share:.0%} of what is not white has the colours of H&E")
    return out


def tissue_regions(slide, mask, unit):
    """REGIONS images of the slide where the mask has most tissue, and their um/px; unit: level-0 px a px."""
    level, factor, px, down = working_grid(slide, WORK_MPP)
    side = max(1, round(REGION * down / unit))  # px of the mask
    rows, columns = (max(1, n // side) for n in mask.shape)
    shares = [(mask[j * side: (j + 1) * side, i * side: (i + 1) * side].mean(), i, j)
              for j in range(rows) for i in range(columns)]
    best = sorted(shares, reverse=True)[:REGIONS]
    return [read_box(slide, level, factor, i * REGION, j * REGION, REGION, REGION)
            for share, i, j in best if share > 0], px


def what_is_odd(slide):
    """What is odd about an open Slide, a list: its um/px, its colours, the size of its nuclei for them."""
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp))
    mask = tissue_mask(picture, unit * slide.mpp)
    odd = ([slide.warning] if slide.warning else []) + odd_colours(picture, mask)
    regions, px = tissue_regions(slide, mask, unit)
    size = nucleus_size(regions, px)
    if size < NUCLEUS[0] or size > NUCLEUS[1]:  # NaN, of too few, is neither
        odd.append(f"its nuclei measure {size:.1f} um, where {NUCLEUS[0]} to {NUCLEUS[1]} are usual: "
                   f"are {slide.mpp:g} um/px (by {slide.source}) right?")
    return odd


def misplaced(xy, slide):
    """Returns the shares of cells (K, 2), in level-0 px, that lie outside of a Slide and on its glass."""
    if not len(xy):
        return 0.0, 0.0
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp))
    mask = tissue_mask(picture, unit * slide.mpp)
    inside = ((xy >= 0) & (xy < (slide.width, slide.height))).all(1)
    rows, columns = mask.shape
    x, y = np.minimum(xy[inside] / unit, (columns - 1, rows - 1)).astype(int).T
    return float((~inside).mean()), float((~mask[y, x]).sum() / len(xy))


def where_cells_are_odd(outside, on_glass, file):
    """Returns a warning about the file of cells that has these shares misplaced, or ""."""
    if outside + on_glass <= MISPLACED:
        return ""
    return (f"{outside:.0%} of the cells in {file} lie outside of the slide and {on_glass:.0%} on its glass: "
            "wrong scale, um instead of px, x and y exchanged, or the file of another slide?")


def suggested_scale(path, gigapixels):
    """Returns what the nuclei of a slide without um/px suggest, as a text: their size in px, and um/px.

    The um/px is USUAL over the median size of the nuclei, counted in px of level 0. It was 1.1 to 1.4 times
    the truth on images of known um/px taken together, 0.6 to 2.5 times on single ones: docs/data.md.
    """
    slide = Slide(path, None, 1.0, gigapixels)  # 1 um/px, so that um are px
    picture, unit = slide.picture(max(MASK_MPP, max(slide.width, slide.height) / 2000))
    regions, px = tissue_regions(slide, tissue_mask(picture, unit), unit)
    size = nucleus_size(regions, px)
    if np.isnan(size):
        return "too few nuclei were found to suggest it"
    return f"nuclei are {size:.1f} px wide; at {USUAL:g} um that is {USUAL / size:.2f} um/px"


@contextmanager
def scale_suggested(path, gigapixels):
    """Adds what the nuclei suggest to the refusal, within the block, of a slide without um/px."""
    try:
        yield
    except NoScale as error:
        raise NoScale(f"{error}; {suggested_scale(path, gigapixels)}") from None
