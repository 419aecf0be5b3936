"""Draws synthetic H&E slides whose crops differ as those of tissue do; nothing in them is real tissue.

A slide is a patchwork of regions: small and large glands, fat, loose and dense stroma, lymphocytes and
necrosis, surrounded by glass. Positive slides also have solid nests, in 15 to 40 % of their tiles; negative
slides have none. A label thus belongs to a bag of tiles (3.6), and the truth of each tile is written next to
the slide. Each slide has its own shares of these kinds and a slightly different stain. Colours follow
Beer-Lambert: light = white * exp(-density of H * vector of H - density of E * vector of E).
"""
import numpy as np
import tifffile
from scipy import ndimage
from scipy.spatial import cKDTree

from common.errors import InputError
from common.files import atomic_write, read_csv, write_csv
from common.pool import in_processes
from prior import STAINS
from wsi.datasets import DATASETS

MPP = 1.0  # um/px of the slides, 10x
WIDTH = 2688  # px: 6 x 4 tiles
HEIGHT = 1792
TILE = 448  # px of the slide: a crop of 224 px at 2.0 um/px
CLASSES = DATASETS["demo"].classes
PATIENTS = {"train": 10, "val": 3, "test": 5}  # per class; every other patient has a second slide
KINDS = ("glass", "loose stroma", "dense stroma", "fat", "lymphocytes", "necrosis", "small glands",
         "large glands", "nests")
TELLING = "nests"  # the kind that makes a slide positive
TELLING_SHARE = (0.15, 0.40)  # of a positive slide's tiles
REGION = 700  # px between the centres of two regions
GROUND = (0, 0.18, 0.40, 0.30, 0.22, 0.52, 0.28, 0.28, 0.28)  # eosin density of each kind
FIBERS = (0, 0.12, 0.20, 0.03, 0.05, 0.05, 0.09, 0.09, 0.09)  # amplitude of each kind's fibres
UNITS = {  # spacing, least and largest radius (px), least and largest lumen / radius
    "fat": (62, 27, 33, 0, 0), "small glands": (104, 32, 42, 0.35, 0.50),
    "large glands": (205, 66, 88, 0.62, 0.76), "nests": (104, 36, 48, 0, 0),
    "lymphocytes": (150, 42, 68, 0, 0)}
BODY = 0.24  # eosin density of the cells of glands and nests
NUCLEI = {  # spacing, least and largest half axis (px), least and largest roundness, density
    "units": (9.0, 2.8, 3.7, 0.75, 1.0, 0.85), "lymphocytes": (9.5, 2.4, 2.9, 0.85, 1.0, 1.15),
    "necrosis": (26, 1.4, 2.6, 0.6, 1.0, 1.0),
    "loose stroma": (95, 5.0, 7.0, 0.28, 0.36, 0.8), "dense stroma": (85, 5.0, 7.0, 0.28, 0.36, 0.8)}
STRENGTH = (0.97, 1.04)  # range of the amount of a slide's stains
SPREAD = 0.006  # standard deviation of the stains' vectors between slides
SCALE = 4  # slowly varying fields are drawn at a quarter of the size


# ---------------------------------------------------------------- fields and shapes

def smooth_noise(rng, shape, sigma):
    """Returns Gaussian noise smoothed by sigma px, of mean 0 and standard deviation 1.

    It is drawn small and enlarged, for speed.
    """
    step = max(1, int(sigma / 3))
    small = ndimage.gaussian_filter(rng.standard_normal([s // step + 2 for s in shape]), sigma / step)
    small = ((small - small.mean()) / small.std()).astype(np.float32)
    return ndimage.zoom(small, step, order=1)[: shape[0], : shape[1]]


def ellipse(x, y, a, b, angle):
    """Returns an ellipse with half axes a, b px at x, y: left, top, and its cover (2r, 2r) of 0 to 1."""
    r = int(max(a, b) + 3)
    left = int(x) - r
    top = int(y) - r
    u = np.arange(2 * r) + (left + 0.5 - x)
    v = (np.arange(2 * r) + (top + 0.5 - y))[:, None]
    c = np.cos(angle)
    s = np.sin(angle)
    distance = np.hypot((c * u + s * v) / a, (c * v - s * u) / b)
    return left, top, np.clip((1 - distance) * min(a, b) + 0.5, 0, 1).astype(np.float32)


def draw(field, shape, value=1):
    """Draws an ellipse into a field, in place, where it is larger; skips one that is not entirely inside."""
    left, top, cover = shape
    bottom = top + cover.shape[0]
    right = left + cover.shape[1]
    if left >= 0 and top >= 0 and right <= field.shape[1] and bottom <= field.shape[0]:
        patch = field[top: bottom, left: right]
        np.maximum(patch, value * cover, out=patch)


def scatter(rng, mask, spacing, jitter):
    """Returns the points (K, 2), as x, y, of a jittered hexagonal grid where mask (HEIGHT, WIDTH) is true."""
    row = spacing * 0.87
    j, i = np.mgrid[0: int(mask.shape[0] / row) + 1, 0: int(mask.shape[1] / spacing) + 1]
    x = (i + 0.5 * (j % 2)) * spacing
    y = j * row
    xy = np.stack([x, y], -1).reshape(-1, 2) + rng.normal(0, jitter * spacing, (x.size, 2))
    xy = xy[((xy >= 0) & (xy < mask.shape[::-1])).all(1)]
    column, line = xy.astype(int).T
    return xy[mask[line, column]]


# ---------------------------------------------------------------- a slide

def draw_regions(rng, label):
    """Draws the kind of each px: indices of KINDS, uint8 (HEIGHT, WIDTH).

    Each point of a jittered grid gets a kind, by the slide's random shares, and each tile the kind of the
    point closest to its centre; borders are wavy. In a positive slide, neighbouring points are nests,
    redrawn until their share of the tiles is within TELLING_SHARE.
    """
    shape = (HEIGHT // SCALE, WIDTH // SCALE)
    y, x = np.mgrid[0: shape[0], 0: shape[1]].astype(np.float32) * SCALE
    edge = np.hypot((x - WIDTH / 2) / (WIDTH * 0.58), (y - HEIGHT / 2) / (HEIGHT * 0.58))
    tissue = edge + 0.10 * smooth_noise(rng, shape, 150 / SCALE) < 0.95
    waves = [20 * smooth_noise(rng, shape, 50 / SCALE) for _ in range(2)]
    centers = np.stack(np.meshgrid(np.arange(TILE / 2, WIDTH, TILE), np.arange(TILE / 2, HEIGHT, TILE)), -1)
    centers = centers.reshape(-1, 2) + rng.normal(0, 15, (centers.size // 2, 2))
    owner = cKDTree(centers).query(np.stack([x + waves[0], y + waves[1]], -1))[1]
    others = [i for i, kind in enumerate(KINDS) if kind not in ("glass", TELLING)]
    while True:
        points = scatter(rng, np.ones((HEIGHT, WIDTH), bool), REGION, 0.18)
        if not len(points):
            continue
        kinds = rng.choice(others, len(points), p=rng.dirichlet(np.full(len(others), 1.5)))
        if label == "positive":
            center = rng.uniform(0.25, 0.75, 2) * (WIDTH, HEIGHT)
            nearest = np.argsort(np.hypot(*(points - center).T) + rng.normal(0, 250, len(points)))
            kinds[nearest[: round(len(points) * rng.uniform(0.12, 0.3))]] = KINDS.index(TELLING)
        tile_kinds = kinds[cKDTree(points).query(centers)[1]]
        regions = np.where(tissue, tile_kinds[owner], 0).astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)
        drawn = [kind for _, _, kind in kinds_of_tiles(regions) if kind != "glass"]
        share = drawn.count(TELLING) / max(1, len(drawn))
        if label == "negative" or min(TELLING_SHARE) <= share <= max(TELLING_SHARE):
            return regions


def kinds_of_tiles(regions):
    """Returns [(x, y, kind), ...] of all tiles, with their corners in px of the slide.

    The kind is glass if glass fills more than half of the tile, else the kind that fills most of its tissue.
    """
    tiles = []
    for y in range(0, regions.shape[0] - TILE + 1, TILE):
        for x in range(0, regions.shape[1] - TILE + 1, TILE):
            area = np.bincount(regions[y: y + TILE: 4, x: x + TILE: 4].ravel(), minlength=len(KINDS))
            kind = 0 if 2 * area[0] > area.sum() else 1 + area[1:].argmax()
            tiles.append((x, y, KINDS[kind]))
    return tiles


def draw_units(rng, regions):
    """Draws fat cells, glands, nests and clusters of lymphocytes; all results are (HEIGHT, WIDTH).

    Returns the covers (0 to 1) of white (fat and lumens) and of the bodies of glands and nests, and where
    (bool) the nuclei of these bodies and those of lymphocytes go.
    """
    white, body, inner, no_nuclei, clusters = np.zeros((5, *regions.shape), np.float32)
    for kind, (spacing, low, high, least, most) in UNITS.items():
        for x, y in scatter(rng, regions == KINDS.index(kind), spacing, 0.07):
            radius = rng.uniform(low, high)
            hole = rng.uniform(least, most)
            angle = rng.uniform(0, np.pi)
            flat = rng.uniform(0.8, 1.0)
            if kind in ("fat", "lymphocytes"):
                draw(white if kind == "fat" else clusters, ellipse(x, y, radius, radius * flat, angle))
                continue
            draw(body, ellipse(x, y, radius, radius * flat, angle))
            draw(inner, ellipse(x, y, radius - 3, radius * flat - 3, angle))
            if hole:
                hole *= radius
                draw(white, ellipse(x, y, hole, hole * flat, angle))
                draw(no_nuclei, ellipse(x, y, hole + 4, hole * flat + 4, angle))
    return white, body, (inner > 0.5) & (no_nuclei < 0.5), (clusters > 0.5) & (body < 0.5) & (white < 0.5)


def draw_nuclei(rng, field, mask, kind, along):
    """Draws nuclei on a jittered grid where mask is true; returns their centres (K, 2).

    For speed they are copies of 24 shapes. along: the direction of draw_fibers, which spindle cells follow.
    """
    spacing, low, high, flat, round_, density = NUCLEI[kind]
    points = np.floor(scatter(rng, mask, spacing, 0.13)) + 0.5
    points = points[((points > 9) & (points < np.array(field.shape[::-1]) - 9)).all(1)]
    column, row = points.astype(int).T
    turns = along[row // SCALE, column // SCALE] if round_ < 0.5 else rng.uniform(0, np.pi, len(points))
    count = 24
    shapes = []
    for k in range(count):
        a = rng.uniform(low, high)
        shapes.append(ellipse(0.5, 0.5, a, a * rng.uniform(flat, round_), k * np.pi / count)[2])
    index = (turns % np.pi / np.pi * count).astype(int) % count
    for x, y, k, value in zip(column, row, index, density * rng.uniform(0.85, 1.15, len(points))):
        r = len(shapes[k]) // 2
        draw(field, (x - r, y - r, shapes[k]), value)
    return points


def stain(rng, hematoxylin, eosin):
    """Densities (h, w) -> uint8 RGB (h, w, 3) by Beer-Lambert, with stains drawn for this slide."""
    strength = rng.uniform(*STRENGTH, 2)
    vectors = [np.clip(v + rng.normal(0, SPREAD, 3), 0.02, None) for v in STAINS[:2]]
    vectors = [v / np.linalg.norm(v) for v in vectors]
    densities = (hematoxylin * np.float32(1.3 * strength[0]),
                 np.clip(eosin, 0, None) * np.float32(strength[1]))
    h, e = (ndimage.gaussian_filter(density, 0.6) for density in densities)  # a microscope's blur
    white = rng.uniform(230, 247)
    noise = 2 * rng.standard_normal(h.shape, np.float32)
    image = np.empty((*h.shape, 3), np.uint8)
    for k in range(3):
        light = white * np.exp(-h * np.float32(vectors[0][k]) - e * np.float32(vectors[1][k]))
        image[..., k] = np.clip(light + noise, 0, 255)
    return image


def draw_fibers(rng, shape):
    """Returns wavy fibres (HEIGHT, WIDTH) of mean 0, and their direction in radians, 1 / SCALE as large."""
    small = (shape[0] // SCALE, shape[1] // SCALE)
    turn = rng.uniform(0, np.pi)
    bend = 9 * smooth_noise(rng, small, 90 / SCALE)
    dy, dx = (slope / SCALE for slope in np.gradient(bend))
    along = np.arctan2(np.sin(turn) / 3.2 + dy, np.cos(turn) / 3.2 + dx) + np.pi / 2
    y, x = np.mgrid[0: shape[0], 0: shape[1]].astype(np.float32)
    phase = (x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))) / np.float32(3.2)
    phase += ndimage.zoom(bend, SCALE, order=1)
    return np.float32(0.8) * np.sin(phase) + np.float32(0.6) * smooth_noise(rng, shape, 4), along


def render(label, seed):
    """Returns a slide, uint8 (HEIGHT, WIDTH, 3), its nuclei (K, 2) as x, y in px, and its regions."""
    rng = np.random.default_rng(seed)
    regions = draw_regions(rng, label)
    fibers, along = draw_fibers(rng, regions.shape)
    white, body, in_units, clusters = draw_units(rng, regions)
    eosin = np.array(GROUND, np.float32)[regions] + np.array(FIBERS, np.float32)[regions] * fibers
    eosin = (eosin + (BODY + np.float32(0.03) * fibers - eosin) * body) * (1 - white)
    hematoxylin = np.where(regions > 0, np.float32(0.04), 0) * (1 - white)
    between = (body < 0.5) & (white < 0.5) & ~clusters
    nuclei = [draw_nuclei(rng, hematoxylin, in_units, "units", along),
              draw_nuclei(rng, hematoxylin, clusters, "lymphocytes", along)]
    for kind in ("necrosis", "loose stroma", "dense stroma"):
        kinds = [kind]
        if kind == "loose stroma":  # it also fills the gaps between glands, nests and clusters
            kinds += [unit for unit in UNITS if unit != "fat"]
        mask = np.isin(np.array(KINDS), kinds)[regions]
        nuclei.append(draw_nuclei(rng, hematoxylin, mask & between, kind, along))
    return stain(rng, hematoxylin, eosin), np.concatenate(nuclei), regions


# ---------------------------------------------------------------- the data set

def write_slide(folder, name, label, seed):
    """Writes slides/<name>.svs, tiled, with its um/px recorded as Aperio does, and its truth.

    truth/<name>.csv has the nuclei, truth/<name>_tiles.csv the kind of each tile (read by demo/truth.py).
    """
    image, nuclei, regions = render(label, seed)
    np.savetxt(folder / "truth" / f"{name}.csv", nuclei, fmt="%.2f", delimiter=",", header="x,y", comments="")
    write_csv(folder / "truth" / f"{name}_tiles.csv", [("x", "y", "kind", "telling")] + [
        (x, y, kind, int(kind == TELLING)) for x, y, kind in kinds_of_tiles(regions)])
    with atomic_write(folder / "slides" / f"{name}.svs") as temp:
        description = f"Aperio (synthetic slide, not tissue)|AppMag = {10 / MPP:g}|MPP = {MPP:g}"
        tifffile.imwrite(temp, image, tile=(256, 256), compression="zlib", compressionargs={"level": 1},
                         photometric="rgb", metadata=None, description=description)


def make_demo(folder, seed=1, workers=2, patients=PATIENTS):
    """Writes the demo data set to a folder: slides/, truth/ and labels.csv with patients and splits.

    An existing one is kept; InputError if another version drew it.
    """
    rows = []
    for split, count in patients.items():
        for label in CLASSES:
            for patient in range(count):
                for slide in range(1 + patient % 2):
                    name = f"demo_{len(rows) + 1:03d}_{slide}"
                    rows.append((name, label, f"{split}_{label}_{patient}", split))
    if (folder / "labels.csv").is_file():
        check_version(folder, {name for name, *_ in rows})
        return
    print(f"The demo data is synthetic: drawing {len(rows)} slides into {folder} (once).")
    for subfolder in ("slides", "truth"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    todo = [(folder, name, label, [seed, i]) for i, (name, label, _, _) in enumerate(rows)
            if not (folder / "slides" / f"{name}.svs").is_file()]
    for _, _, error in in_processes(write_slide, todo, workers, "synthetic slides"):
        if error:
            raise InputError(error)
    write_csv(folder / "labels.csv", [("slide", "label", "patient", "split"), *rows])


def check_version(folder, names):
    """InputError if another version drew the demo in this folder, whose slides should have these names."""
    _, rows = read_csv(folder / "labels.csv")
    current = {row.get("slide") for _, row in rows} == names
    for _, row in rows:
        tiles = folder / "truth" / f"{row.get('slide')}_tiles.csv"
        current = current and row.get("label") in CLASSES and tiles.is_file()
    if not current:
        raise InputError(f"{folder}: is the demo of another version; delete the folder and run again")
