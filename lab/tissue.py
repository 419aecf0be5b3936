"""Synthetic tissue for the lab: drawn, not photographed, so the true place of every nucleus is known.

A slide is pink stroma with spindle cells, glands (a ring of nuclei around a white lumen), clusters of
lymphocytes and fat; a positive one has a round focus of tumour in it, a sheet of large, uneven nuclei without
glands. Colours follow Beer-Lambert. The slides of the demo are others: demo/slides.py.
"""
import numpy as np
from scipy import ndimage

from prior import STAINS

TILE = 224  # px, the paper's crop


def spots(rng, height, width, step):
    """Points (K, 2) as x, y, about step px apart: a grid whose points are moved about."""
    grid = np.mgrid[step / 2: width: step, step / 2: height: step].reshape(2, -1).T
    return grid + rng.uniform(-0.35, 0.35, grid.shape) * step


def outside(points, circles, margin=0.0):
    """Which points (K, 2) lie in none of the circles, each (x, y, radius)."""
    free = np.ones(len(points), bool)
    for x, y, radius in circles:
        free &= np.hypot(points[:, 0] - x, points[:, 1] - y) > radius + margin
    return free


def nuclei_of(rng, xy, long, short, dark, angle=None):
    """Nuclei (K, 6) at xy: x, y, two half axes in px, angle, density; sizes and densities as (low, high)."""
    n = len(xy)
    angle = rng.uniform(0, np.pi, n) if angle is None else angle
    return np.column_stack([xy, rng.uniform(*long, n), rng.uniform(*short, n), angle, rng.uniform(*dark, n)])


def fill(field, circle, value):
    """Sets a disc (x, y, radius) of a field (H, W) to value, in place."""
    x, y, radius = circle
    top, left = max(int(y - radius), 0), max(int(x - radius), 0)
    part = field[top: int(y + radius) + 2, left: int(x + radius) + 2]
    down, right = np.ogrid[: part.shape[0], : part.shape[1]]
    part[np.hypot(right + left + 0.5 - x, down + top + 0.5 - y) < radius] = value


def stamp(field, nuclei):
    """Draws nuclei (K, 6) into a density field (H, W), in place, with an edge of 1 px."""
    for x, y, a, b, angle, dark in nuclei:
        r = int(max(a, b)) + 2
        x0, x1 = max(int(x) - r, 0), min(int(x) + r + 1, field.shape[1])
        y0, y1 = max(int(y) - r, 0), min(int(y) + r + 1, field.shape[0])
        u, v = np.arange(x0, x1) + 0.5 - x, (np.arange(y0, y1) + 0.5 - y)[:, None]
        c, s = np.cos(angle), np.sin(angle)
        distance = np.hypot((c * u + s * v) / a, (c * v - s * u) / b)
        ink = dark * np.clip((1 - distance) * min(a, b) + 0.5, 0, 1)
        np.maximum(field[y0: y1, x0: x1], ink, out=field[y0: y1, x0: x1])


def paint(rng, haematoxylin, eosin):
    """Densities (H, W) to uint8 RGB by Beer-Lambert; the stains of each slide differ a little."""
    h, e = (ndimage.gaussian_filter(field, 0.6) * rng.uniform(0.9, 1.1) for field in (haematoxylin, eosin))
    light = 242 * np.exp(-(h[..., None] * STAINS[0] + e[..., None] * STAINS[1]).astype(np.float32))
    return np.clip(light + rng.normal(0, 2, (*h.shape, 1)), 0, 255).astype(np.uint8)


def arrange(rng, height, width, tumour):
    """Foci, fat, glands of a slide, lists of (x, y, radius), and its shares of spindles and lymphocytes."""
    scale = 1.0 if height > TILE else 0.4
    many_glands, much_fat, spindles = rng.uniform([0.0, 0.0, 0.25], [1.0, 0.4, 0.95])  # slides differ
    lymphocytes, foci = rng.uniform(0, 1), []
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
    """Nuclei (K, 6) of a slide, as stamp draws them."""
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
    """A synthetic slide of rows x columns tiles: uint8 (H, W, 3), its nuclei (K, 2) as x, y in px, and focus.

    focus (H, W) bool is where the tumour is; False everywhere without tumour. A slide of one tile has a
    smaller focus.
    """
    rng = np.random.default_rng(seed)
    height, width = rows * TILE, columns * TILE
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
    """A slide cut into tiles, row by row: uint8 (N, 224, 224, 3), and each one's cells (K, 2) in its px."""
    images, inside = [], []
    for top in range(0, image.shape[0], TILE):
        for left in range(0, image.shape[1], TILE):
            images.append(image[top: top + TILE, left: left + TILE])
            here = ((cells >= [left, top]) & (cells < [left + TILE, top + TILE])).all(1)
            inside.append(cells[here] - [left, top])
    return np.stack(images), inside
