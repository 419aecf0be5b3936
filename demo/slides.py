"""Draws synthetic H&E slides that ask for more than the prominent pattern; nothing in them is real tissue.

A slide is stroma, fat, glands, necrosis, clusters of lymphocytes and tumour nests, which blend into each
other, surrounded by glass; most crops hold several kinds. The clusters are the most prominent kind and say
nothing about the label, which is where the lymphocytes of the tumour are: in the stroma between the nests,
or, in 50 to 100 % of a positive slide's tumour, inside them. A negative and a positive slide of the same seed
have the same regions, the same stains and almost the same number of lymphocytes. Stains differ between
slides. Colours follow Beer-Lambert: light = white * exp(-density of H * vector of H - density of E * vector
of E). The truth of each tile is written next to the slide.
"""
import numpy as np
import tifffile
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from common.errors import InputError
from common.files import atomic_write, read_csv, write_csv
from common.pool import in_processes
from prior import STAINS
from wsi.datasets import DATASETS
from wsi.slides import CROP

MPP = 1.0  # um/px of the slides and of the crops, 10x
TILE = CROP  # px
SIZE = (4, 6)  # rows and columns of tiles in a slide
CLASSES = DATASETS["demo"].classes
PATIENTS = {"train": 20, "val": 6, "test": 10}  # per class; every other patient has a second slide
KINDS = ("glass", "loose stroma", "dense stroma", "fat", "clusters", "necrosis", "glands", "nests",
         "infiltrated nests")
TELLING = "infiltrated nests"  # the kind that makes a slide positive
TILE_COLUMNS = ("x", "y", "telling", *KINDS)  # of truth/<slide>_tiles.csv
TELLING_SHARE = 0.1  # of a tile, from which on it counts as telling
TUMOR = (0.2, 0.4)  # share of nests, infiltrated or not, in a slide's tissue
INFILTRATED = (0.5, 1.0)  # share of a positive slide's tumour whose lymphocytes are inside the nests
REGION = 60  # px: sigma of the fields whose largest is a px's kind
VARIETY = 0.35  # standard deviation of what a slide adds to the field of a kind
BLEND = 0.2  # difference of two fields over which their kinds blend
GROUND = (0, 0.20, 0.42, 0.22, 0.17, 0.48, 0.24, 0.30)  # eosin density of each kind, infiltrated or not
FIBERS = (0, 0.12, 0.14, 0.07, 0.03, 0.04, 0.10, 0.11)  # amplitude of each kind's fibres
GRAIN = (0, 0.03, 0.03, 0.03, 0.03, 0.10, 0.03, 0.03)  # amplitude of eosin's grain; adds to haematoxylin
CYTOPLASM = (0.27, 0.12)  # eosin and haematoxylin density of the cells of glands and nests
NUCLEI = {  # spacing, least and largest half axis (px), least and largest roundness, density, texture
    "nests": (12.5, 3.4, 5.0, 0.70, 1.0, 0.62, 0.35), "glands": (9.0, 3.0, 3.9, 0.60, 0.85, 0.75, 0.25),
    "clusters": (7.6, 2.3, 2.9, 0.85, 1.0, 1.15, 0.12), "lymphocytes": (6.5, 2.3, 2.9, 0.85, 1.0, 1.15, 0.12),
    "necrosis": (40, 1.2, 2.4, 0.6, 1.0, 1.0, 0.1), "spindles": (60, 4.5, 7.0, 0.25, 0.36, 0.75, 0.2)}
LYMPHOCYTES = 1 / 380  # per px of tumour, in both classes
FREE = 6.0  # px: least distance of a lymphocyte of the tumour from other nuclei
STRENGTH = (0.92, 1.08)  # range of the amounts of a slide's stains
SPREAD = 0.01  # standard deviation of the stains' vectors between slides
SCALE = 4  # slowly varying fields are drawn at a quarter of the size


# ---------------------------------------------------------------- fields and shapes

def smooth_noise(rng, shape, sigma):
    """Returns Gaussian noise smoothed by sigma px, of mean 0 and sd 1; it is drawn small, for speed."""
    step = max(1, int(sigma / 1.5))
    small = ndimage.gaussian_filter(
        rng.standard_normal([s // step + 2 for s in shape], np.float32), sigma / step)
    return enlarge((small - small.mean()) / small.std(), step)[: shape[0], : shape[1]]


def enlarge(field, factor):
    """Returns a field (h, w) float32 factor times as large, bilinear."""
    size = (field.shape[1] * factor, field.shape[0] * factor)
    return np.asarray(Image.fromarray(field).resize(size, Image.Resampling.BILINEAR))


def blob(rng, x, y, radius, flat, wobble):
    """Returns a roundish shape at x, y with an uneven outline: left, top, and its cover (2r, 2r) of 0 to 1.

    radius (px) and flat * radius are its half axes, before waves of the amplitude wobble.
    """
    r = int(radius * (1 + 2 * wobble) + 3)
    left = int(x) - r
    top = int(y) - r
    u = np.arange(2 * r) + (left + 0.5 - x)
    v = (np.arange(2 * r) + (top + 0.5 - y))[:, None]
    turn = rng.uniform(0, np.pi)
    across = (np.cos(turn) * v - np.sin(turn) * u) / flat
    along = np.cos(turn) * u + np.sin(turn) * v
    angle = np.arctan2(across, along)
    two, three, five = rng.uniform(0, 2 * np.pi, 3)
    waves = np.cos(2 * angle + two) + np.cos(3 * angle + three) + 0.5 * np.cos(5 * angle + five)
    distance = np.hypot(along, across) / (1 + wobble * waves)
    return left, top, np.clip((radius - distance) * flat + 0.5, 0, 1).astype(np.float32)


def draw(field, shape, value=1):
    """Draws the part of a shape that is inside a field into it, in place, where it is larger."""
    left, top, cover = shape
    cover = cover[max(-top, 0):, max(-left, 0):]
    patch = field[max(top, 0): max(top, 0) + cover.shape[0], max(left, 0): max(left, 0) + cover.shape[1]]
    np.maximum(patch, value * cover[: patch.shape[0], : patch.shape[1]], out=patch)


def scatter(rng, mask, spacing, jitter):
    """Returns the points (K, 2), as x, y, of a jittered hexagonal grid where mask (H, W) is true."""
    row = spacing * 0.87
    j, i = np.mgrid[0: int(mask.shape[0] / row) + 1, 0: int(mask.shape[1] / spacing) + 1]
    x = (i + 0.5 * (j % 2)) * spacing
    y = j * row
    xy = np.stack([x, y], -1).reshape(-1, 2) + rng.normal(0, jitter * spacing, (x.size, 2))
    xy = xy[((xy >= 0) & (xy < mask.shape[::-1])).all(1)]
    column, line = xy.astype(int).T
    return xy[mask[line, column]]


# ---------------------------------------------------------------- regions

def draw_regions(rng, label, shape):
    """Draws the regions of a slide of shape (H, W).

    Returns the kind of each px, indices of KINDS, uint8 (H, W), and the share of each kind where they blend,
    (kinds, H / SCALE, W / SCALE). Each kind has a smooth random field, raised or lowered by the slide; the
    largest is the px's kind. The nests' level is set such that they fill TUMOR of the tissue. The label only
    decides whether a part of them is infiltrated.
    """
    small = (shape[0] // SCALE, shape[1] // SCALE)
    y = np.linspace(-0.5, 0.5, small[0])[:, None]
    x = np.linspace(-0.5, 0.5, small[1])
    edge = np.hypot(x, y) / 0.58
    tissue = edge + 0.08 * smooth_noise(rng, small, 150 / SCALE) + 0.01 * smooth_noise(rng, small, 4) < 0.95
    nests = KINDS.index("nests")
    levels = np.stack([smooth_noise(rng, small, REGION / SCALE) for _ in KINDS[1: nests + 1]])
    levels += rng.normal(0, VARIETY, len(levels))[:, None, None].astype(np.float32)
    levels += 0.05 * np.stack([smooth_noise(rng, small, 3) for _ in levels])
    lead = levels[-1] - levels[:-1].max(0)
    levels[-1] -= np.quantile(lead[tissue], 1 - rng.uniform(*TUMOR))

    weights = np.exp((levels - levels.max(0)) / BLEND)
    weights = np.concatenate([~tissue[None], tissue * weights / weights.sum(0)]).astype(np.float32)
    regions = np.where(tissue, 1 + levels.argmax(0), 0).astype(np.uint8)
    site = smooth_noise(rng, small, REGION / SCALE)
    part = rng.uniform(*INFILTRATED)
    if label == "positive":
        tumor = regions == nests
        regions[tumor & (site <= np.quantile(site[tumor], part))] = KINDS.index(TELLING)
    return regions.repeat(SCALE, 0).repeat(SCALE, 1), weights


def tiles_of(regions):
    """Returns (x, y, shares of KINDS) of a slide's tiles from the kind of each px (H, W), row by row."""
    tiles = []
    for y in range(0, regions.shape[0] - TILE + 1, TILE):
        for x in range(0, regions.shape[1] - TILE + 1, TILE):
            area = np.bincount(regions[y: y + TILE, x: x + TILE].ravel(), minlength=len(KINDS))
            tiles.append((x, y, area / area.sum()))
    return tiles


def thin(rng, points, share):
    """Keeps each of the points (K, 2) with the probability share (H / SCALE, W / SCALE): kinds mingle."""
    column, row = (points / SCALE).astype(int).T
    return points[rng.random(len(points)) < share[row, column]]


# ---------------------------------------------------------------- what fills them

def draw_fibers(rng, shape):
    """Returns wavy fibres (H, W) of mean 0, and their direction in radians (H / SCALE, W / SCALE).

    A periodic texture of short streaks is read along and across a bent and crimped direction.
    """
    small = (shape[0] // SCALE, shape[1] // SCALE)
    turn = rng.uniform(0, np.pi)
    cos = np.float32(np.cos(turn))
    sin = np.float32(np.sin(turn))
    bend = 45 * smooth_noise(rng, small, 130 / SCALE) + 8 * smooth_noise(rng, small, 40 / SCALE)
    dy, dx = np.gradient(bend, SCALE)
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    x = np.arange(shape[1], dtype=np.float32)
    along = cos * y - sin * x
    crimp = np.sin(along * np.float32(0.13) + enlarge(3 * smooth_noise(rng, small, 60 / SCALE), SCALE))
    across = cos * x + sin * y + enlarge(bend, SCALE) + np.float32(2.5) * crimp
    streaks = ndimage.gaussian_filter(rng.standard_normal((512, 512), np.float32), (1.6, 16), mode="wrap")
    streaks += ndimage.gaussian_filter(rng.standard_normal((512, 512), np.float32), (4, 30), mode="wrap")
    fibers = streaks[across.astype(int) % 512, along.astype(int) % 512] / streaks.std()
    return fibers, np.arctan2(sin + dy, cos + dx) + np.pi / 2


def draw_structures(rng, regions, weights):
    """Returns the covers (0 to 1) of white (fat, lumens) and of the cells of glands and nests; (H, W) each.

    Also where the nuclei of glands go, (H, W) bool. Fat and glands are scattered with the kind's share as the
    probability, so that neighbours mingle; nests are where smooth noise is high.
    """
    shape = regions.shape
    white, cells, walls = np.zeros((3, *shape), np.float32)
    for kind, spacing, low, high in (("fat", 65, 27, 33), ("glands", 130, 38, 62)):
        points = scatter(rng, np.ones(shape, bool), spacing, 0.1)
        for x, y in thin(rng, points, weights[KINDS.index(kind)]):
            radius = rng.uniform(low, high)
            flat = rng.uniform(0.75, 1.0)
            if kind == "fat":
                draw(white, blob(rng, x, y, radius, flat, 0.05))
                continue
            left, top, body = blob(rng, x, y, radius, flat, 0.07)
            depth = ndimage.distance_transform_edt(body > 0.5).astype(np.float32)
            wall = rng.uniform(16, 22)  # px from the gland's outline to its lumen
            draw(cells, (left, top, body))
            draw(walls, (left, top, ((depth > 3) & (depth < wall - 6)).astype(np.float32)))
            draw(white, (left, top, np.clip(depth - wall, 0, 1)))
    tumor = enlarge(weights[KINDS.index("nests")], SCALE)
    field = smooth_noise(rng, shape, 15) + 0.25 * smooth_noise(rng, shape, 4) - 4 * (1 - tumor)
    nests = np.clip((field + 0.12) * 4 + 0.5, 0, 1) * (1 - white)
    return white, cells, nests, (walls > 0.5) & (white < 0.1)


def nucleus_shapes(rng, kind, count=24):
    """Returns nuclei of a kind, turned by 0 to pi in count steps: density relative to the kind's (2r, 2r).

    Chromatin is darker at the rim and uneven inside.
    """
    _, low, high, flat, round_, _, texture = NUCLEI[kind]
    shapes = []
    for k in range(count):
        a = rng.uniform(low, high)
        b = a * rng.uniform(flat, round_)
        r = int(high + 3)
        u = np.arange(-r, r) + 0.5
        v = u[:, None]
        turn = k * np.pi / count
        distance = np.hypot((np.cos(turn) * u + np.sin(turn) * v) / a,
                            (np.cos(turn) * v - np.sin(turn) * u) / b)
        grain = ndimage.gaussian_filter(rng.standard_normal((2 * r, 2 * r)), 0.8)
        chromatin = 1 + texture * (distance ** 2 - 0.5 + 1.2 * grain / grain.std())
        shapes.append((np.clip((1 - distance) * b + 0.5, 0, 1) * chromatin.clip(0.3, 1.6)).astype(np.float32))
    return shapes


def draw_nuclei(rng, field, points, kind, along=None):
    """Draws nuclei of a kind at points (K, 2), in px of the field; returns the centres of those drawn.

    along: directions of draw_fibers, which spindles follow. For speed nuclei are copies of a few shapes.
    """
    density = NUCLEI[kind][5]
    points = np.floor(points)
    column, row = points.astype(int).T
    turns = rng.uniform(0, np.pi, len(points))
    if along is not None:
        turns = along[row // SCALE, column // SCALE] + rng.normal(0, 0.15, len(points))
    shapes = nucleus_shapes(rng, kind)
    index = (turns % np.pi / np.pi * len(shapes)).astype(int) % len(shapes)
    for x, y, k, value in zip(column, row, index, density * rng.uniform(0.8, 1.2, len(points))):
        r = len(shapes[k]) // 2
        draw(field, (x - r, y - r, shapes[k]), value)
    return points


def draw_lymphocytes(rng, field, nuclei, tumor, places):
    """Draws lymphocytes of a part of the tumor (H, W) bool at places (H, W) bool in it; returns the centres.

    There are LYMPHOCYTES per px, or fewer where places lack room. nuclei (K, 2): those drawn before, from
    which lymphocytes keep the distance FREE.
    """
    points = scatter(rng, tumor & places, NUCLEI["lymphocytes"][0], 0.2)
    points = rng.permutation(points[cKDTree(nuclei).query(points)[0] >= FREE])
    return draw_nuclei(rng, field, points[: round(tumor.sum() * LYMPHOCYTES)], "lymphocytes")


def stain(rng, hematoxylin, eosin):
    """Densities (H, W) -> uint8 RGB (H, W, 3) by Beer-Lambert, with the stains of a slide's laboratory."""
    strength = rng.uniform(*STRENGTH, 2)
    vectors = [np.clip(v + rng.normal(0, SPREAD, 3), 0.02, None) for v in STAINS[:2]]
    vectors = [v / np.linalg.norm(v) for v in vectors]
    white = rng.uniform(228, 248)
    uneven = 1 + np.float32(0.05) * smooth_noise(rng, eosin.shape, 220)  # thickness of the section
    h = ndimage.gaussian_filter(hematoxylin * uneven * np.float32(1.25 * strength[0]), 0.6)
    e = ndimage.gaussian_filter(np.clip(eosin, 0, None) * uneven * np.float32(strength[1]), 0.6)
    noise = 2 * rng.standard_normal(h.shape, np.float32)
    image = np.empty((*h.shape, 3), np.uint8)
    for k in range(3):
        light = white * np.exp(-h * np.float32(vectors[0][k]) - e * np.float32(vectors[1][k]))
        image[..., k] = np.clip(light + noise, 0, 255)
    return image


# ---------------------------------------------------------------- a slide and its crops

def render(label, seed, size=SIZE):
    """Returns a slide, uint8 (H, W, 3), its nuclei (K, 2) as x, y in px, and the kind of each px (H, W).

    label: one of CLASSES; size: rows and columns of tiles.
    """
    layout, structure, texture, cells, lab = np.random.default_rng(seed).spawn(5)
    shape = (size[0] * TILE, size[1] * TILE)
    regions, weights = draw_regions(layout, label, shape)
    white, glands, nests, walls = draw_structures(structure, regions, weights)
    fibers, along = draw_fibers(texture, shape)
    grain = smooth_noise(texture, shape, 3)

    def of_kinds(values):  # a value per kind, blended
        return enlarge(np.tensordot(np.array(values, np.float32), weights, 1), SCALE)
    body = np.maximum(glands, nests)
    eosin = np.clip(of_kinds(GROUND) + of_kinds(FIBERS) * fibers, np.float32(0.02), None)
    eosin = eosin + (CYTOPLASM[0] - eosin) * body + of_kinds(GRAIN) * grain
    tissue = enlarge(1 - weights[0], SCALE) * (1 - white)
    eosin *= tissue
    hematoxylin = (np.float32(0.02) + of_kinds(GRAIN) + np.float32(CYTOPLASM[1]) * body) * tissue

    free = (body < 0.1) & (white < 0.1) & (regions > 0)
    in_nests = (nests > 0.6) & (glands < 0.1) & (white < 0.1) & (regions > 0)
    clusters = weights[KINDS.index("clusters")]
    necrosis = weights[KINDS.index("necrosis")]
    places = (("nests", in_nests, 1), ("glands", walls & (regions > 0), 1), ("clusters", free, clusters),
              ("necrosis", free, necrosis), ("spindles", free, 1 - clusters - necrosis))
    nuclei = []
    for kind, mask, share in places:
        points = scatter(cells, mask, NUCLEI[kind][0], 0.2)
        points = thin(cells, points, share * np.ones_like(clusters))
        nuclei.append(draw_nuclei(cells, hematoxylin, points, kind, along if kind == "spindles" else None))
    others = np.concatenate(nuclei)
    for part, mask in (("nests", free), (TELLING, in_nests)):
        tumor = regions == KINDS.index(part)
        nuclei.append(draw_lymphocytes(cells, hematoxylin, others, tumor, mask))
    return stain(lab, hematoxylin, eosin), np.concatenate(nuclei), regions


def cut_crops(image, nuclei, regions):
    """Returns the crops of a slide that are not mostly glass: [(image, cells, shares), ...].

    Each is uint8 (TILE, TILE, 3), with its cells (K, 2) in its px and the shares of KINDS in it.
    """
    crops = []
    for x, y, shares in tiles_of(regions):
        if shares[0] > 0.5:
            continue
        cells = nuclei - (x, y)
        inside = ((cells >= 0) & (cells < TILE)).all(1)
        crops.append((image[y: y + TILE, x: x + TILE], cells[inside], shares))
    return crops


# ---------------------------------------------------------------- the data set

def write_slide(folder, name, label, seed, size=SIZE):
    """Writes slides/<name>.svs, tiled, with its um/px recorded as Aperio does, and its truth.

    truth/<name>.csv has the nuclei, truth/<name>_tiles.csv the shares of KINDS in each tile and whether it
    is telling (read by demo/truth.py).
    """
    image, nuclei, regions = render(label, seed, size)
    np.savetxt(folder / "truth" / f"{name}.csv", nuclei, fmt="%.2f", delimiter=",", header="x,y", comments="")
    rows = [TILE_COLUMNS]
    for x, y, shares in tiles_of(regions):
        telling = int(shares[KINDS.index(TELLING)] >= TELLING_SHARE)
        rows.append((x, y, telling, *[f"{share:.6f}" for share in shares]))
    write_csv(folder / "truth" / f"{name}_tiles.csv", rows)
    with atomic_write(folder / "slides" / f"{name}.svs") as temp:
        description = f"Aperio (synthetic slide, not tissue)|AppMag = {10 / MPP:g}|MPP = {MPP:g}"
        tifffile.imwrite(temp, image, tile=(256, 256), photometric="rgb", metadata=None,
                         description=description)


def make_demo(folder, seed=1, workers=2, patients=PATIENTS, size=SIZE):
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
    todo = [(folder, name, label, [seed, i], size) for i, (name, label, _, _) in enumerate(rows)
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
        current = current and tuple(read_csv(tiles)[0]) == TILE_COLUMNS
    if not current:
        raise InputError(f"{folder}: is the demo of another version; delete the folder and run again")
