"""Synthetic images and files that several tests use."""
import numpy as np
import tifffile
from PIL import Image

from prior import STAINS


def discs(mpp, centres_um, width_um=120, height_um=120, radius_um=3.5):
    """Nuclei: haematoxylin discs on an eosin ground, by Beer-Lambert; px i spans i to i + 1."""
    y, x = np.mgrid[0: round(height_um / mpp), 0: round(width_um / mpp)] + 0.5
    inside = np.zeros(x.shape, bool)
    for cx, cy in centres_um:
        inside |= (x * mpp - cx) ** 2 + (y * mpp - cy) ** 2 < radius_um ** 2
    return (245 * np.exp(-(inside[..., None] * STAINS[0] + 0.25 * STAINS[1]))).astype(np.uint8)


def tissue(side=256, seed=0):
    """Sixty nuclei on a pink ground, uint8 (side, side, 3)."""
    return discs(1.0, np.random.default_rng(seed).uniform(0, side, (60, 2)), side, side, 4.0)


def saved(path, mode=None, array=None, **options):
    """Writes an image, tissue() if none is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(tissue() if array is None else array)
    (image.convert(mode) if mode else image).save(path, **options)


def svs(path, image, description):
    """A slide of one tiled level with Aperio's description."""
    tifffile.imwrite(path, image, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None,
                     description=description)


def pyramid(path, image, mpp, levels=(1, 2, 4)):
    """A tiled slide with levels and its um/px, as Aperio writes it."""
    with tifffile.TiffWriter(path) as file:
        for k in levels:
            small = np.asarray(Image.fromarray(image).reduce(k)) if k > 1 else image
            file.write(small, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None,
                       description=f"Aperio|AppMag = {10 / mpp:g}|MPP = {mpp:g}",
                       subfiletype=0 if k == 1 else 1)


def halve(path):
    """Cuts a file off in its middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_line(capsys, *says):
    """The last output on stderr is one line that says these things."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in says), error
