"""Synthetic tissue for the lab: drawn, not photographed, so the true position of every nucleus is known.

A slide is pink stroma with spindle cells, glands (a ring of nuclei around a white lumen), clusters of
lymphocytes and fat. A positive slide also has a round focus of tumour: a sheet of large, uneven nuclei
without glands. Colours follow Beer-Lambert. demo/slides.py draws the demo's slides.
"""
import numpy as np
from scipy import ndimage

from prior import STAINS

TILE = 224  # px, the paper's crop


def spots(rng, height, width, step):
    """Returns points (K, 2) as x, y, about step px apart: a grid with jittered points."""
    grid = np.mgrid[step / 2: width: step, step / 2: height: step].reshape(2, -1).T
    return grid + rng.uniform(-0.35, 0.35, grid.shape) * step


def outside(points, circles, margin=0.0):
    """Returns which points (K, 2) lie outside all circles, each (x, y, radius), enlarged by margin."""
    free = np.ones(len(points), bool)
    for x, y, radius in circles:
        free &= np.hypot(points[:, 0] - x, points[:, 1] - y) > radius + margin
    return free


def nuclei_of(rng, xy, long, short, dark, angle=None):
    """Returns nuclei (K, 6) at xy: x, y, half axes in px, angle, density.

    long, short (px) and dark (density) are ranges (low, high).
    """
    n = len(xy)
    angle = rng.uniform(0, np.pi, n) if angle is None else angle
    return np.column_stack([xy, rng.uniform(*long, n), rng.uniform(*short, n), angle, rng.uniform(*dark, n)])


def fill(field, circle, value):
    """Sets a disc (x, y, radius) of a field (H, W) to value, in place."""
    x, y, radius = circle
    top = max(int(y - radius), 0)
    left = max(int(x - radius), 0)
    square = field[top: int(y + radius) + 2, left: int(x + radius) + 2]
    down, right = np.ogrid[: square.shape[0], : square.shape[1]]
    square[np.hypot(right + left + 0.5 - x, down + top + 0.5 - y) < radius] = value


def stamp(field, nuclei):
    """Draws nuclei (K, 6) into a density field (H, W), in place, with edges blurred over 1 px."""
    for x, y, a, b, angle, dark in nuclei:
        r = int(max(a, b)) + 2
        left = max(int(x) - r, 0)
        top = max(int(y) - r, 0)
        square = field[top: int(y) + r + 1, left: int(x) + r + 1]
        down, right = np.ogrid[: square.shape[0], : square.shape[1]]
        u = right + left + 0.5 - x
        v = down + top + 0.5 - y
        cos = np.cos(angle)
        sin = np.sin(angle)
        distance = np.hypot((cos * u + sin * v) / a, (cos * v - sin * u) / b)
        ink = dark * np.clip((1 - distance) * min(a, b) + 0.5, 0, 1)
        np.maximum(square, ink, out=square)


def paint(rng, haematoxylin, eosin):
    """Stain densities (H, W) -> uint8 RGB by Beer-Lambert; stain strengths differ a little between slides."""
    h, e = (ndimage.gaussian_filter(field, 0.6) * rng.uniform(0.9, 1.1) for field in (haematoxylin, eosin))
    light = 242 * np.exp(-(h[..., None] * STAINS[0] + e[..., None] * STAINS[1]).astype(np.float32))
    return np.clip(light + rng.normal(0, 2, (*h.shape, 1)), 0, 255).astype(np.uint8)


def arrange(rng, height, width, tumour):
    """Returns foci, fat and glands, lists of (x, y, radius), and the shares of spindles and lymphocytes."""
    scale = 1.0 if height > TILE else 0.4
    many_glands, much_fat, spindles = rng.uniform([0.0, 0.0, 0.25], [1.0, 0.4, 0.95])  # slides differ
    lymphocytes = rng.uniform(0, 1)
    foci = []
    if tumour:
        radius = rng.uniform(150, 240) * scale
        foci = [(*(rng.uniform(0.25, 0.75, 2) * [width, height]), radius)]
    fat = [(*xy, rng.uniform(22, 45)) for xy in spots(rng, height, width, 120) if rng.random() < much_fat]
    fat = [c for c in fat if outside(np.array([c[:2]]), foci, 40)[0]]
    glands = [(*xy, rng.uniform(28, 42)) for xy in spots(rng, height, width, 105)
              if rng.random() < many_glands]
    glands = [c for c in glands if outside(np.array([c[:2]]), foci + fat, 42)[0]]
    return foci, fat, glands, spindles, lymphocytes


def all_nuclei(rng, height, width, foci, fat, glands, spindles, lymphocytes):
    """Returns the nuclei (K, 6) of a slide, as stamp draws them."""
    nuclei = []
    for x, y, radius in glands:  # a ring around the lumen
        turn = np.arange(0, 2 * np.pi, 9 / radius)
        ring = np.column_stack([x + radius * 0.8 * np.cos(turn), y + radius * 0.8 * np.sin(turn)])
        ring = ring + rng.normal(0, 1, ring.shape)
        nuclei.append(nuclei_of(rng, ring, (3.4, 4.2), (2.4, 3.0), (0.8, 1.1), turn))
    stroma = spots(rng, height, width, 26)
    stroma = stroma[outside(stroma, foci + fat + glands, 4) & (rng.random(len(stroma)) < spindles)]
    nuclei.append(nuclei_of(rng, stroma, (4, 6), (1.3, 1.8), (0.6, 0.9), rng.normal(0.6, 0.3, len(stroma))))
    for middle in spots(rng, height, width, 180):  # lymphocytes: small, round, dark
        crowd = middle + rng.normal(0, 20, (int(40 * lymphocytes * rng.random()), 2))
        crowd = crowd[outside(crowd, foci + fat + glands)]
        nuclei.append(nuclei_of(rng, crowd, (2.2, 2.7), (2.2, 2.6), (1.2, 1.4)))
    for x, y, radius in foci:  # large, uneven, pale to dark
        sheet = spots(rng, height, width, 13)
        sheet = sheet[(np.hypot(*(sheet - [x, y]).T) < radius) & (rng.random(len(sheet)) < 0.85)]
        nuclei.append(nuclei_of(rng, sheet, (3.8, 5.6), (3.0, 4.4), (0.5, 1.0)))
    nuclei = np.concatenate(nuclei)
    return nuclei[((nuclei[:, :2] >= 0) & (nuclei[:, :2] < [width, height])).all(1)]


def draw(seed, tumour=False, rows=1, columns=1):
    """Draws a slide of rows x columns tiles: uint8 (H, W, 3), its nuclei (K, 2) as x, y in px, and focus.

    focus (H, W) bool: where the tumour is. A slide of one tile has a smaller focus.
    """
    rng = np.random.default_rng(seed)
    height = rows * TILE
    width = columns * TILE
    foci, fat, glands, *shares = arrange(rng, height, width, tumour)
    nuclei = all_nuclei(rng, height, width, foci, fat, glands, *shares)
    fibres = ndimage.zoom(rng.standard_normal((height // 4, width // 4)).astype(np.float32), 4, order=1)
    eosin = 0.27 + 0.05 * ndimage.gaussian_filter(fibres, (1, 4))
    haematoxylin = np.full((height, width), 0.03, np.float32)
    focus = np.zeros((height, width), bool)
    for circle in foci:
        fill(focus, circle, True)
    eosin[focus] *= 0.8
    for circle in glands:
        fill(eosin, circle, 0.19)
    for circle in fat + [(x, y, radius * 0.5) for x, y, radius in glands]:
        fill(eosin, circle, 0)
        fill(haematoxylin, circle, 0)
    stamp(haematoxylin, nuclei)
    return paint(rng, haematoxylin * 1.3, eosin), nuclei[:, :2], focus


def tiles(image, cells):
    """Cuts a slide into tiles, row by row: uint8 (N, 224, 224, 3), and the cells (K, 2) of each in its px."""
    images = []
    inside = []
    for top in range(0, image.shape[0], TILE):
        for left in range(0, image.shape[1], TILE):
            images.append(image[top: top + TILE, left: left + TILE])
            here = ((cells >= [left, top]) & (cells < [left + TILE, top + TILE])).all(1)
            inside.append(cells[here] - [left, top])
    return np.stack(images), inside
