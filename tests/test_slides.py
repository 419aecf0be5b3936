"""Slides: um/px, tissue, tiles; broken and odd files."""
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from synthetic import halve, pyramid, saved, svs, tissue

from common.errors import InputError
from data import Crops, find_data
from prior import STAINS
from wsi import demo, slides
from wsi.cells import read_cells
from wsi.prepare import prepare, tile_info


@pytest.mark.parametrize("properties, mpp", [
    ({"openslide.mpp-x": "0.25", "openslide.objective-power": "20"}, 0.25),
    ({"openslide.objective-power": "40"}, 0.25), ({"aperio.AppMag": "20.0"}, 0.5),
    ({"openslide.mpp-x": "0", "aperio.AppMag": "40"}, 0.25),
    ({"aperio.MPP": "0.5", "openslide.mpp-x": "unknown"}, 0.5),
    ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, 0.25),
    ({"tiff.XResolution": "20000", "tiff.ResolutionUnit": "centimeter"}, 0.5), ({"tiff.XResolution": "72"}, None),
    ({"openslide.mpp-x": "1000000"}, None), ({}, None)])
def test_um_per_px_of_a_slide(properties, mpp):
    assert slides.recorded_mpp(properties)[0] == mpp


def test_um_per_px_that_contradicts_the_power_is_warned_of_and_oblong_px_are_refused():
    assert slides.recorded_mpp({"aperio.MPP": "0.25", "aperio.AppMag": "40"})[2] == ""
    assert "0.25 is used" in slides.recorded_mpp({"aperio.MPP": "0.25", "aperio.AppMag": "20"})[2]
    with pytest.raises(ValueError, match="not square"):
        slides.recorded_mpp({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"})


@pytest.mark.parametrize("description, says", [
    ("Aperio|AppMag = 10|MPP = unknown", None), ("Aperio|AppMag = 10|MPP = 1.0", None),
    ("Aperio|AppMag = 40|MPP = 1.0", "1 is used"), ("Aperio|AppMag = nan|MPP = nan", "--slide-mpp"),
    ("Aperio|AppMag = -10|MPP = -1", "--slide-mpp"), ("Aperio", "--slide-mpp")])
def test_um_per_px_as_slides_record_it(place, capsys, description, says):
    (place / "in" / "slides" / "good.png").unlink()
    svs(place / "in" / "slides" / "a.svs", tissue(300), description)
    found = find_data("in", mpp=1.0)
    if says == "--slide-mpp":
        with pytest.raises(InputError, match=says) as error:
            prepare(found, None, 0.5, workers=1)
        assert "a.svs" in str(error.value)
    else:
        assert prepare(found, None, 0.5, workers=1) == [] and (says or "") in capsys.readouterr().out
        assert tile_info(found, "a")["slide_mpp"] == 1.0


def gradient(width, height):
    """A magenta image whose red rises from left to right and whose blue rises downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x / width * 120 + 100, np.full(x.shape, 60), y / height * 120 + 100], -1).astype(np.uint8)


def check_tile(tile, left, top, side, width, height):
    assert abs(tile[..., 0].mean() - ((left + side / 2) / width * 120 + 100)) < 1.5
    assert abs(tile[..., 2].mean() - ((top + side / 2) / height * 120 + 100)) < 1.5


def test_tiles_lie_where_their_names_say_at_any_target(tmp_path):
    pyramid(tmp_path / "a.svs", gradient(1900, 1400), 0.5)
    for mpp in (0.5, 1.0, 1.37):
        assert slides.cut_tiles(tmp_path / "a.svs", tmp_path / "crops", mpp, None, 0.5) == ""
        side = 224 * mpp / 0.5
        files = list((tmp_path / "crops" / "a").glob("*.jpg"))
        assert len(files) == int(1900 / side) * int(1400 / side)
        for path in files:
            tile = np.asarray(Image.open(path)).astype(float)
            assert tile.shape == (224, 224, 3)
            check_tile(tile, *(int(v) for v in path.stem.split("_")), side, 1900, 1400)


def test_levels_that_are_not_whole_fractions_and_tiles_over_many_blocks(tmp_path, monkeypatch):
    pyramid(tmp_path / "a.svs", gradient(1901, 1403), 0.5)
    level, down = slides.Slide(tmp_path / "a.svs").level_for(1.0)
    assert level == 1 and down != 2  # 1901 px over 951, 1403 over 702
    read = {}
    for block in (2560, 300):
        monkeypatch.setattr(slides, "BLOCK", block)
        slides.cut_tiles(tmp_path / "a.svs", tmp_path / str(block), 1.0, None, 0.5)
        read[block] = {path.stem: np.asarray(Image.open(path)).astype(int)
                       for path in (tmp_path / str(block) / "a").glob("*.jpg")}
    assert len(read[300]) == 4 * 3 and read[300].keys() == read[2560].keys()
    assert all(np.abs(read[300][name] - tile).max() <= 6 for name, tile in read[2560].items())
    for name, tile in read[300].items():
        check_tile(tile, *(int(v) for v in name.split("_")), 448, 1901, 1403)


def test_tissue_is_found_and_white_dust_and_ink_are_not():
    def stain(h, e):
        return 245 * np.exp(-(h * STAINS[0] + e * STAINS[1]))
    colours = {"dark": stain(0.8, 0.6), "pale": stain(0.03, 0.12), "white": (243, 243, 243),
               "dust": (190, 190, 192), "blue ink": (40, 60, 170), "green ink": (30, 120, 70),
               "black ink": (25, 25, 30), "red ink": (215, 30, 45)}
    for name, colour in colours.items():
        mask = slides.tissue_mask(np.full((40, 40, 3), colour, np.float64).round().astype(np.uint8), 8.0)
        assert mask.all() if name in ("dark", "pale") else not mask.any(), name


def test_the_demo_is_written_as_slides_that_openslide_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WIDTH", 700)
    monkeypatch.setattr(demo, "HEIGHT", 600)
    (tmp_path / "truth").mkdir()
    demo.write_slide(tmp_path, "a", "glands", [0, 0])
    slide = slides.Slide(tmp_path / "slides" / "a.svs")
    assert (slide.width, slide.height, slide.mpp) == (700, 600, demo.MPP)
    image, nuclei = demo.render("glands", [0, 0])
    np.testing.assert_allclose(read_cells(tmp_path / "truth" / "a.csv"), nuclei, atol=0.006)
    assert np.array_equal(np.asarray(slide.read_level(0, 0, 0, 700, 600)), image)


# ---------------------------------------------------------------- broken and odd files

def png_that_claims(width, height):
    """A PNG header of an image of that size with next to nothing in it."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"0" * 1000)) + chunk(b"IEND", b""))


def truncated_svs(path):
    svs(path, tissue(900), "Aperio|AppMag = 10|MPP = 1.0")
    halve(path)


def broken_tile(path):
    """Whole but for bytes in the middle: it opens, and reading fails."""
    svs(path, tissue(900), "Aperio|AppMag = 10|MPP = 1.0")
    whole = bytearray(path.read_bytes())
    whole[2000: 2400] = b"\xff" * 400
    path.write_bytes(whole)


def cut_jpeg(path):
    saved(path, format="JPEG")
    halve(path)


BROKEN = {  # name: how it is made; each is skipped and listed
    "truncated.svs": truncated_svs,
    "broken tile.svs": broken_tile,
    "text.svs": lambda path: path.write_text("slide,label\n"),
    "zero.jpg": lambda path: path.write_bytes(b""),
    "cut.jpg": cut_jpeg,
    "bomb.png": lambda path: path.write_bytes(png_that_claims(100_000, 100_000)),
    "no pixels.png": lambda path: path.write_bytes(png_that_claims(300, 300)),
    "line.png": lambda path: saved(path, array=tissue(2000)[:3]),
    "white.png": lambda path: saved(path, array=np.full((300, 300, 3), 244, np.uint8)),
    "bits.png": lambda path: saved(path, "1"),
    "sixteen bits.png": lambda path: Image.fromarray(tissue()[..., 0].astype(np.uint16) * 257).save(path),
    "floats.tif": lambda path: tifffile.imwrite(path, np.full((300, 300), np.nan, np.float32)),
    "invisible.png": lambda path: saved(path, array=np.dstack([tissue(), np.zeros((256, 256), np.uint8)])),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_slide_is_skipped_and_listed_by_name(place, name):
    BROKEN[name](place / "in" / "slides" / name)
    found = find_data("in", mpp=1.0)
    failed = prepare(found, 1.0, 0.5, workers=1)
    assert len(failed) == 1 and name in failed[0] and "\n" not in failed[0]
    assert len(Crops(found, found.split("train"))) == 1
    assert not list(place.rglob("*part*"))
    assert [path.name for path in place.parent.iterdir()] == [place.name]  # nothing is written outside


@pytest.mark.parametrize("name, make", {
    "cmyk.jpg": lambda path: saved(path, "CMYK", format="JPEG"), "palette.png": lambda path: saved(path, "P"),
    "alpha.png": lambda path: saved(path, "RGBA"),
    "  spaces and ünïcödé №1 .png": saved, "semi;colon,comma.png": saved, "%s %d {x}.png": saved, "-rf.png": saved,
}.items())
def test_odd_slides_that_are_whole_are_used(place, name, make):
    make(place / "in" / "slides" / name)
    found = find_data("in", mpp=1.0)
    assert prepare(found, 1.0, 0.5, workers=1) == []
    crops = Crops(found, found.split("train"))
    assert len(crops) == 2 and crops[0][0].shape == crops[1][0].shape == (3, 224, 224)
    assert len(crops.cells(1)) > 10


def test_folders_and_links_that_are_no_slides_are_left_alone(place):
    folder = place / "in" / "slides"
    (folder / "folder.svs").mkdir()
    (folder / "loop.svs").symlink_to(folder / "loop.svs")
    (folder / "circle").symlink_to(folder)
    (folder / "nowhere.svs").symlink_to(place / "gone.svs")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "a.svs.partial").write_bytes(b"x")
    found = find_data("in", mpp=1.0)
    assert list(found.images) == ["good"] and prepare(found, 1.0, 0.5, workers=1) == []
