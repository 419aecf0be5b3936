"""Synthetic images and files that several tests use."""
import csv
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

import dirl
from common.encoders import MEAN, STD, random_encoder, save_encoder
from prior import STAINS
from wsi.cache import prepare
from wsi.splits import find_data


def discs(mpp, centres_um, width_um=120, height_um=120, radius_um=3.5):
    """Nuclei: haematoxylin discs on an eosin ground, by Beer-Lambert; px i spans i to i + 1."""
    inside = np.zeros((round(height_um / mpp), round(width_um / mpp)), bool)
    for cx, cy in centres_um:
        left, top = (max(0, int((center - radius_um) / mpp) - 1) for center in (cx, cy))
        side = int(2 * radius_um / mpp) + 4
        box = inside[top: top + side, left: left + side]  # which holds the disc
        y, x = np.ogrid[top: top + box.shape[0], left: left + box.shape[1]]
        box |= ((x + 0.5) * mpp - cx) ** 2 + ((y + 0.5) * mpp - cy) ** 2 < radius_um ** 2
    ground, nuclei = (245 * np.exp(-(share * STAINS[0] + 0.25 * STAINS[1])) for share in (0, 1))
    return np.where(inside[..., None], nuclei, ground).astype(np.uint8)


def tissue(side=256, seed=0):
    """Sixty nuclei on a pink ground, uint8 (side, side, 3)."""
    return discs(1.0, np.random.default_rng(seed).uniform(0, side, (60, 2)), side, side, 4.0)


def saved(path, mode=None, array=None, **options):
    """Writes an image, tissue() if none is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(tissue() if array is None else array)
    (image.convert(mode) if mode else image).save(path, compress_level=0, **options)


def png(width, height, bits=8, color=2, rows=b"0" * 1000):
    """Returns a PNG file of that header and its rows, too few of them if none are given."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def write_one_px(figure, path, **how):
    """Stands in for a figure's savefig."""
    Image.new("RGB", (1, 1)).save(path, "png")


def svs(path, image, description):
    """A slide of one tiled level with Aperio's description."""
    tifffile.imwrite(path, image, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None,
                     description=description)


def scn(path, image, corner, size, mpp, power):
    """Writes a Leica slide of size (w, h) px whose scanned area is the image, at corner (x, y)."""
    height, width = image.shape[:2]
    nm = round(1000 * mpp)  # of a px
    about = """<image uuid="{id}"><pixels sizeX="{w}" sizeY="{h}">
        <dimension sizeX="{w}" sizeY="{h}" r="0" ifd="{ifd}"/></pixels>
        <view sizeX="{view[0]}" sizeY="{view[1]}" offsetX="{at[0]}" offsetY="{at[1]}"/><scanSettings>
        <objectiveSettings><objective>{power:g}</objective></objectiveSettings><illuminationSettings>
        <illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"""
    whole, area = np.multiply(size, nm), np.multiply((width, height), nm)
    macro = about.format(id="a", w=256, h=256, ifd=0, view=whole, at=(0, 0), power=0.6)
    scan = about.format(id="b", w=width, h=height, ifd=1, view=area, at=np.multiply(corner, nm), power=power)
    text = (f'<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="c"><collection uuid="d" '
            f'sizeX="{whole[0]}" sizeY="{whole[1]}">{macro}{scan}</collection></scn>')
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"tile": (256, 256), "compression": "zlib", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(np.full((256, 256, 3), 240, np.uint8), description=text, **how)
        file.write(image, resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER", **how)


def pyramid(path, image, mpp, levels=(1, 2, 4)):
    """A tiled slide with levels and its um/px, as Aperio writes it."""
    with tifffile.TiffWriter(path) as file:
        for k in levels:
            small = np.asarray(Image.fromarray(image).reduce(k)) if k > 1 else image
            file.write(small, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None,
                       description=f"Aperio|AppMag = {10 / mpp:g}|MPP = {mpp:g}",
                       subfiletype=0 if k == 1 else 1)


def write(path, content):
    """Writes text, bytes, or another value as JSON, and the folders above; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def write_table(path, header, rows):
    """Writes a CSV file from its lines."""
    return write(path, "\n".join([header, *rows]))


def replace(path, *changes):
    """Replaces texts of a file: (old, new), ..."""
    text = path.read_text()
    for old, new in changes:
        text = text.replace(old, new)
    path.write_text(text)


def halve(path):
    """Cuts a file off in its middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rows_of(path):
    """The rows of a CSV file, as {column: text}."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def arrays_of(path):
    """The arrays of an npz file, by name; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def times(folder, pattern="*"):
    """{file: when it was written}, to see what was made again."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern) if path.is_file()}


def prepared(data="in", mpp=1.0, slide_mpp=1.0, **options):
    """The data set of a folder of slides at 1.0 um/px, with its tiles and cells, and what was skipped."""
    found = find_data(data, mpp=mpp, slide_mpp=slide_mpp, **options)
    return found, prepare(found, 0.5, workers=1)


def slides_named(folder, names):
    """Files with the names of slides, which nothing opens; each with other content."""
    for name in names:
        write(folder / "slides" / f"{name}.svs", name.encode())


def tcga(folder, patients, slides_each=2):
    """TCGA-like slides and their labels.csv without a split."""
    shutil.rmtree(folder, ignore_errors=True)
    names = [f"TCGA-05-{i:04d}-01Z-00-DX{k}" for i in patients for k in range(slides_each)]
    slides_named(folder, names)
    rows = [f"{name},{'AB'[int(name[8:12]) % 2]}" for name in names]
    write_table(folder / "labels.csv", "slide,label", rows)


def patch(path, label, seed, size=224):
    """A noisy image that is redder the higher its label."""
    noise = np.random.default_rng(seed).integers(0, 60, (size, size, 3)) + [60 * label, 60, 60]
    saved(path, array=noise.clip(0, 255).astype(np.uint8))


def make_mhist(more=()):
    header = "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"
    rows = []
    for i in range(10):
        label, votes, split = ("HP", "SSA")[i % 2], (0, 7)[i % 2], "test" if i >= 6 else "train"
        patch(Path(f"datasets/mhist/images/MHIST_{i}.png"), i % 2, i)
        rows.append(f"MHIST_{i}.png,{label},{votes},{split}")
    write_table(Path("datasets/mhist/annotations.csv"), header, [*rows, *more])


def make_chaoyang():
    for part, count in (("train", 8), ("test", 4)):
        entries = [{"name": f"{part}/{i}.JPG", "label": i % 4} for i in range(count)]
        for i, entry in enumerate(entries):
            patch(Path("datasets/chaoyang", entry["name"]), i % 4, i, size=512)
        write(Path(f"datasets/chaoyang/{part}.json"), entries)


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class SmallHead(dirl.DINOHead):
    """DINO's head, 64 wide instead of 2048: checkpoints of 1 MB instead of 80 MB per head."""

    def __init__(self, in_dim, out_dim, norm_last_layer=True):
        super().__init__(in_dim, out_dim, hidden_dim=64, bottleneck_dim=32, norm_last_layer=norm_last_layer)


def refused(capsys, main, argv, *says):
    """A script ends with 2 and one line on stderr that says these things."""
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in says), error


def untrained_run(run, method="dirl", data="x", mpp=2.0, images=(), seed=0, stats=(MEAN, STD), **about):
    """A run of a random encoder that is said to have seen these images of a data set; returns its folder."""
    trained_on = {"data": data, "images": dict(images), "patients": []}
    about = {"arch": "vit_t4", "step": 0, "trained_on": trained_on} | about
    encoder = random_encoder("vit_t4", seed, *stats)
    save_encoder(Path(run, "encoder.pt"), encoder, method=method, data=data, mpp=mpp, **about)
    return Path(run)


D = 64  # of small_vit


def small_vit(depth=4, **kw):
    """vit_t4 with d = D and two heads, for the tests that run scripts."""
    return dirl.VisionTransformer(D, depth, 2, **kw)
