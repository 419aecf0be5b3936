"""Synthetic H&E slides of two classes that differ only in how the cells are arranged: glands and nests.

Both have units of the same size with the same number of nuclei, the same white space, stroma and lymphocytes.
In a gland the nuclei form a ring around a lumen; in a nest they fill the disc and the white is around it.
Colours follow Beer-Lambert: light = white * exp(-density of H * vector of H - density of E * vector of E).
"""
import numpy as np
import tifffile
from scipy import ndimage

from common.errors import InputError
from common.files import atomic_write, write_csv
from common.parallel import in_processes
from prior import STAINS

MPP = 1.0  # um/px of the slides, 10x
WIDTH, HEIGHT = 2688, 1792  # px: 6 x 4 tiles of 224 px at 2.0 um/px
CLASSES = ("glands", "nests")
PATIENTS = {"train": 7, "val": 2, "test": 4}  # of each class; every other patient has a second slide
UNIT, SPACING, NUCLEI = 44.0, 118.0, 42  # um: radius of a unit and distance between two; nuclei of a unit
LUMEN = 0.5  # radius of the lumen / radius of the unit


def smooth_noise(rng, shape, sigma):
    """Gaussian noise smoothed at sigma px, mean 0 and standard deviation 1; made small and enlarged."""
    step = max(1, int(sigma / 3))
    small = ndimage.gaussian_filter(rng.standard_normal([s // step + 2 for s in shape]), sigma / step)
    small = ((small - small.mean()) / small.std()).astype(np.float32)
    return ndimage.zoom(small, step, order=1)[: shape[0], : shape[1]]


def draw(field, x, y, a, b, angle, value):
    """Adds an ellipse with half axes a, b px (soft over a px) to a density field, in place."""
    r = int(max(a, b) + 3)
    x0, y0 = int(x) - r, int(y) - r
    if x0 < 0 or y0 < 0 or x0 + 2 * r >= field.shape[1] or y0 + 2 * r >= field.shape[0]:
        return False
    u, v = np.arange(2 * r) + (x0 + 0.5 - x), (np.arange(2 * r) + (y0 + 0.5 - y))[:, None]
    c, s = np.cos(angle), np.sin(angle)
    distance = np.hypot((c * u + s * v) / a, (c * v - s * u) / b)
    patch = field[y0: y0 + 2 * r, x0: x0 + 2 * r]
    np.maximum(patch, value * np.clip((1 - distance) * min(a, b) + 0.5, 0, 1), out=patch)
    return True


def place(rng, count, sample, gap):
    """count points (x, y) of sample() with at least gap between any two; fewer if no more fit."""
    points = np.zeros((0, 2))
    for _ in range(60 * count):
        point = sample()
        if not len(points) or ((points - point) ** 2).sum(1).min() >= gap ** 2:
            points = np.vstack([points, point])
            if len(points) == count:
                break
    return points


class Canvas:
    """Density fields (HEIGHT, WIDTH) of a slide while it is drawn, and its nuclei so far as (x, y) in px."""

    def __init__(self, rng):
        self.rng, shape = rng, (HEIGHT, WIDTH)
        y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
        edge = np.hypot((x - WIDTH / 2) / (WIDTH * 0.52), (y - HEIGHT / 2) / (HEIGHT * 0.52))
        self.tissue = edge + 0.10 * smooth_noise(rng, shape, 150) < 0.95
        self.fibres = smooth_noise(rng, shape, 3) * 0.5 + smooth_noise(rng, shape, 12)
        self.eosin = np.where(self.tissue, 0.32 + 0.07 * self.fibres, 0).astype(np.float32)
        self.haematoxylin = np.where(self.tissue, 0.04, 0).astype(np.float32)
        # Lumina and clefts; units; both.
        self.clear, self.body, self.taken = np.zeros((3, *shape), np.float32)
        self.nuclei = []

    def nucleus(self, x, y, a, b, angle, density):
        """Draws a nucleus with half axes a, b px if it lies on tissue."""
        if 0 <= x < WIDTH and 0 <= y < HEIGHT and self.tissue[int(y), int(x)]:
            if draw(self.haematoxylin, x, y, a, b, angle, density * self.rng.uniform(0.85, 1.15)):
                self.nuclei.append((x, y))


def draw_units(canvas, label):
    """Glands (a ring of nuclei around a lumen) or nests (a disc of nuclei in a cleft) on a hexagonal grid."""
    rng = canvas.rng
    rows, columns = int(HEIGHT / SPACING / 0.87) + 1, int(WIDTH / SPACING) + 1
    for i, j in [(i, j) for j in range(rows) for i in range(columns)]:
        cx = (i + 0.5 * (j % 2)) * SPACING + rng.normal(0, 7)
        cy = j * SPACING * 0.87 + rng.normal(0, 7)
        keep, radius = rng.random() < 0.85, UNIT * rng.uniform(0.9, 1.1)
        stretch, turn = rng.uniform(0.85, 1.0), rng.uniform(0, np.pi)
        inside = 70 < cx < WIDTH - 70 and 70 < cy < HEIGHT - 70
        if not (keep and inside and canvas.tissue[int(cy), int(cx)]):
            continue
        hole = LUMEN * radius
        outer = radius if label == "glands" else np.hypot(radius, hole)  # the same white area either way
        draw(canvas.taken, cx, cy, outer, outer * stretch, turn, 1)
        if label == "glands":
            draw(canvas.body, cx, cy, radius, radius * stretch, turn, 1.0)
            draw(canvas.clear, cx, cy, hole, hole * stretch, turn, 1.0)
            low, high = hole + 5, radius - 3
        else:
            draw(canvas.clear, cx, cy, outer, outer * stretch, turn, 1.0)
            draw(canvas.body, cx, cy, radius, radius * stretch, turn, 2.0)
            low, high = 0, radius - 3

        def in_unit():
            r, phi = np.sqrt(rng.uniform(low ** 2, high ** 2)), rng.uniform(0, 2 * np.pi)
            u, v = r * np.cos(phi), r * stretch * np.sin(phi)
            return np.array([np.cos(turn) * u - np.sin(turn) * v, np.sin(turn) * u + np.cos(turn) * v])
        for u, v in place(rng, NUCLEI, in_unit, 6.5):
            size = rng.uniform(3.0, 4.0)
            canvas.nucleus(cx + u, cy + v, size, size * rng.uniform(0.75, 1), rng.uniform(0, np.pi), 0.85)


def draw_stroma(canvas):
    """Spindle cells along the fibres and clusters of lymphocytes, between the units."""
    rng, free = canvas.rng, np.flatnonzero(canvas.tissue & (canvas.taken == 0))
    flow = smooth_noise(rng, (HEIGHT, WIDTH), 120) * 1.2
    for spot in rng.choice(free, 1100):
        y, x = divmod(int(spot), WIDTH)
        canvas.nucleus(x + 0.5, y + 0.5, rng.uniform(4, 6), rng.uniform(1.3, 1.9), flow[y, x], 0.75)
    for spot in rng.choice(free, 14):
        cy, cx = divmod(int(spot), WIDTH)
        for u, v in rng.normal(0, 22, (25, 2)):
            x, y = cx + u, cy + v
            if 0 <= x < WIDTH and 0 <= y < HEIGHT and not canvas.taken[int(y), int(x)]:
                canvas.nucleus(x, y, rng.uniform(2.3, 2.8), rng.uniform(2.2, 2.6), 0, 1.15)


def stain(rng, haematoxylin, eosin):
    """Beer-Lambert: densities (h, w) to uint8 RGB (h, w, 3); each slide's stains differ a little."""
    strength = rng.uniform(0.9, 1.12, 2)
    vectors = [np.clip(v + rng.normal(0, 0.02, 3), 0.02, None) for v in STAINS[:2]]
    vectors = [v / np.linalg.norm(v) for v in vectors]
    densities = (haematoxylin * np.float32(1.3 * strength[0]),
                 np.clip(eosin, 0, None) * np.float32(strength[1]))
    h, e = (ndimage.gaussian_filter(density, 0.6) for density in densities)  # the microscope's sharpness
    white, noise = rng.uniform(236, 247), 2 * rng.standard_normal(h.shape, np.float32)
    image = np.empty((*h.shape, 3), np.uint8)
    for k in range(3):
        light = white * np.exp(-h * np.float32(vectors[0][k]) - e * np.float32(vectors[1][k]))
        image[..., k] = np.clip(light + noise, 0, 255)
    return image


def render(label, seed):
    """One slide: uint8 (HEIGHT, WIDTH, 3) and the true nuclei (K, 2) as x, y in px."""
    canvas = Canvas(np.random.default_rng(seed))
    draw_units(canvas, label)
    body, haematoxylin = canvas.body, canvas.haematoxylin
    in_unit = (body > 0.5) & canvas.tissue
    eosin = np.where(in_unit, 0.22 + 0.03 * canvas.fibres, canvas.eosin).astype(np.float32)
    empty = (canvas.clear > 0.5) & ((body < 0.5) | ((label == "glands") & (body < 1.5)))
    draw_stroma(canvas)
    haematoxylin[empty] = np.where(haematoxylin[empty] > 0.3, haematoxylin[empty], 0)
    eosin[empty & (haematoxylin == 0)] = 0
    return stain(canvas.rng, haematoxylin, eosin), np.array(canvas.nuclei)


def write_slide(folder, name, label, seed):
    """slides/<name>.svs, tiled, with its um/px recorded as Aperio does; truth/<name>.csv with the nuclei."""
    image, nuclei = render(label, seed)
    np.savetxt(folder / "truth" / f"{name}.csv", nuclei, fmt="%.2f", delimiter=",", header="x,y", comments="")
    with atomic_write(folder / "slides" / f"{name}.svs") as temp:
        about = f"Aperio (synthetic slide, not tissue)|AppMag = {10 / MPP:g}|MPP = {MPP:g}"
        tifffile.imwrite(temp, image, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None,
                         description=about)


def make_demo(folder, seed=0, workers=2, patients=PATIENTS):
    """Writes the demo data set to a folder, once: slides/, truth/ and labels.csv with patients and split."""
    rows, number = [], 0
    for split, count in patients.items():
        for label in CLASSES:
            for patient in range(count):
                for slide in range(1 + patient % 2):
                    number += 1
                    rows.append((f"demo_{number:03d}_{slide}", label, f"{split}_{label}_{patient}", split))
    for sub in ("slides", "truth"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    todo = [(folder, name, label, [seed, i]) for i, (name, label, _, _) in enumerate(rows)
            if not (folder / "slides" / f"{name}.svs").is_file()]
    for _, _, error in in_processes(write_slide, todo, workers, "synthetic slides"):
        if error:
            raise InputError(error)
    write_csv(folder / "labels.csv", [("slide", "label", "patient", "split"), *rows])
