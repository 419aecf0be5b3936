"""Slides: um/px, tissue, tiles; broken and odd files."""

import numpy as np
import pytest
import tifffile
from PIL import Image
from synthetic import halve, png, prepared, pyramid, saved, svs, tissue, write

from common.errors import InputError
from data import Crops
from demo import slides as demo
from prior import STAINS
from wsi import headers, slides
from wsi.cache import tile_info
from wsi.cells import read_cells


@pytest.mark.parametrize("properties, mpp", [
    ({"openslide.mpp-x": "0.25", "openslide.objective-power": "20"}, 0.25),
    ({"openslide.objective-power": "40"}, 0.25), ({"aperio.AppMag": "20.0"}, 0.5),
    ({"openslide.mpp-x": "0", "aperio.AppMag": "40"}, 0.25),
    ({"aperio.MPP": "0.5", "openslide.mpp-x": "unknown"}, 0.5),
    ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, 0.25),
    ({"tiff.XResolution": "20000", "tiff.ResolutionUnit": "centimeter"}, 0.5),
    ({"tiff.XResolution": "72"}, None), ({"openslide.mpp-x": "1000000"}, None),
    ({"aperio.MPP": "nan", "aperio.AppMag": "-10"}, None), ({}, None)])
def test_um_per_px_of_a_slide(properties, mpp):
    assert slides.recorded_mpp(properties)[0] == mpp


def test_um_per_px_that_contradicts_the_power_is_warned_of_and_oblong_px_are_refused():
    assert slides.recorded_mpp({"aperio.MPP": "0.25", "aperio.AppMag": "40"})[2] == ""
    assert "0.25 is used" in slides.recorded_mpp({"aperio.MPP": "0.25", "aperio.AppMag": "20"})[2]
    with pytest.raises(ValueError, match="not square"):
        slides.recorded_mpp({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"})


def test_um_per_px_as_a_slide_records_it(place, capsys):
    svs(place / "in" / "slides" / "a.svs", tissue(300), "Aperio|AppMag = 40|MPP = 1.0")
    found, failed = prepared()
    assert failed == [] and tile_info(found, "a")["slide_mpp"] == 1.0
    assert "1 is used" in capsys.readouterr().out


@pytest.mark.parametrize("mpp, how", [
    (0.5, {"ome": True, "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}}),
    (0.5, {"ome": True, "metadata": {"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"}}),
    (0.5, {"ome": True, "metadata": {"PhysicalSizeX": 0.0005, "PhysicalSizeXUnit": "mm"}}),
    (0.5, {"ome": True, "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "\u00b5m"}}),
    (0.5, {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}),
    (0.5, {"resolution": (50_800, 50_800), "resolutionunit": "INCH"}),
    (0.5, {"imagej": True, "resolution": (2, 2), "metadata": {"unit": "um"}}),
    ("found: OME.PhysicalSizeX 0.5 pixel", {"ome": True, "metadata": {"PhysicalSizeX": 0.5,
                                                                      "PhysicalSizeXUnit": "pixel"}}),
    ("not square: 0.5 by 0.25", {"ome": True, "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}}),
    ("not square: 0.5 by 0.25", {"resolution": (20_000, 40_000), "resolutionunit": "CENTIMETER"}),
    ("found: .*tiff.XResolution 72, tiff.ResolutionUnit inch", {"resolution": (72, 72),
                                                               "resolutionunit": "INCH"}),
    ("found: tiff.XResolution 1, tiff.ResolutionUnit none", {})])
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_um_per_px_of_ome_and_of_striped_tiff(tmp_path, mpp, how, tile):
    if tile and how.get("imagej"):
        pytest.skip("ImageJ writes strips only")
    tifffile.imwrite(tmp_path / "a.tif", np.full((120, 160, 3), 200, np.uint8), photometric="rgb", tile=tile,
                     **how)
    if isinstance(mpp, float):
        assert slides.Slide(tmp_path / "a.tif").mpp == pytest.approx(mpp)
        assert slides.Slide(tmp_path / "a.tif", slide_mpp=2.0).mpp == pytest.approx(mpp)
        assert slides.Slide(tmp_path / "a.tif", said_mpp=2.0).mpp == 2.0
    else:
        with pytest.raises(InputError, match=mpp):
            slides.Slide(tmp_path / "a.tif")


def test_um_per_px_of_ome_are_those_of_the_slide_and_not_of_its_macro_picture():
    about = '<Image><Pixels SizeX="{}" PhysicalSizeX="{}"/></Image>'
    xml = f"<OME>{about.format(160, 0.5)}{about.format(40, 8)}</OME>"
    assert headers.ome_properties(xml, 160) == {"OME.PhysicalSizeX": "0.5"}


def gradient(width, height):
    """A magenta image whose red rises from left to right and whose blue rises downwards."""
    image = np.full((height, width, 3), 60, np.uint8)
    image[..., 0] = 100 + 120 * np.arange(width) / width
    image[..., 2] = 100 + 120 * np.arange(height)[:, None] / height
    return image


@pytest.mark.parametrize("mpp", [0.5, 1.0, 1.37])
def test_tiles_lie_where_their_names_say_at_any_target(tmp_path, monkeypatch, mpp):
    width, height = 1901, 1403
    side = 224 * mpp / 0.5
    pyramid(tmp_path / "a.svs", gradient(width, height), 0.5)
    slide = slides.Slide(tmp_path / "a.svs")
    assert slide.level_for(1.0) == (1, pytest.approx(2, abs=0.01)) and slide.warning == ""
    assert slide.level_for(1.0)[1] != 2  # 1901 px over 951, 1403 over 702
    assert [slide.level_for(target)[0] for target in (0.9, 0.97, 1.8)] == [0, 1, 1]
    cut = {}
    for block in (2560, 300):  # the whole slide, or one tile at a time
        monkeypatch.setattr(slides, "BLOCK", block)
        slides.cut_tiles(slide, tmp_path / str(block), mpp, 1.0)
        cut[block] = {path.stem: np.asarray(Image.open(path)).astype(float)
                      for path in (tmp_path / str(block) / "a").glob("*.jpg")}
    assert len(cut[300]) == int(width / side) * int(height / side) and cut[300].keys() == cut[2560].keys()
    for name, tile in cut[300].items():
        left, top = map(int, name.split("_"))
        red = (left + side / 2) / width * 120 + 100
        blue = (top + side / 2) / height * 120 + 100
        assert tile.shape == (224, 224, 3)
        assert abs(tile[..., 0].mean() - red) < 1.5 and abs(tile[..., 2].mean() - blue) < 1.5
        assert np.abs(cut[2560][name] - tile).max() <= 6


def test_no_tile_with_enough_tissue_is_lost_to_the_coarse_level(tmp_path):
    image = np.full((448, 1344, 3), 244, np.uint8)
    for i, share in enumerate((0.9, 0.6, 0.4)):  # of tissue in a tile
        image[: round(448 * share), 448 * i: 448 * (i + 1)] = (200, 60, 160)
    pyramid(tmp_path / "a.svs", image, 0.5, levels=(1, 4))
    slides.cut_tiles(slides.Slide(tmp_path / "a.svs"), tmp_path / "crops", 1.0, 0.5)
    assert {path.stem for path in (tmp_path / "crops" / "a").iterdir()} == {"0_0", "448_0"}


def test_a_level_of_other_proportions_is_not_read(tmp_path):
    """A macro picture marked as a reduced level: 1.6 times narrower and 2.5 times lower, 2.05 on average."""
    width, height = 2000, 1500
    whole = gradient(width, height)
    macro = np.full((600, 1250, 3), 244, np.uint8)
    macro[50: 450, 50: 500] = (200, 60, 160)
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        for image in (whole, np.asarray(Image.fromarray(whole).reduce(2)), macro):
            file.write(image, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None,
                       description="Aperio|MPP = 0.5", subfiletype=0 if image is whole else 1)
    slide = slides.Slide(tmp_path / "a.svs")
    slides.cut_tiles(slide, tmp_path / "crops", 1.0, 0.5)
    assert "1250 x 600" in slide.warning and "1000 x 750" not in slide.warning
    assert {slide.level_for(mpp)[0] for mpp in (0.5, 1.0, 2.0, 8.0)} == {0, 1}
    tiles = {path.stem: np.asarray(Image.open(path)).astype(float)
             for path in (tmp_path / "crops" / "a").glob("*.jpg")}
    assert len(tiles) == 4 * 3
    for name, tile in tiles.items():
        left, top = map(int, name.split("_"))
        assert abs(tile[..., 0].mean() - (left + 224) / width * 120 - 100) < 1.5
        assert abs(tile[..., 2].mean() - (top + 224) / height * 120 - 100) < 1.5
    picture, unit = slide.picture(8.0)
    assert picture.shape[:2] == (1500 // 16, 2000 // 16) and unit == 16
    assert picture[..., 1].max() < 70  # nowhere the white of the macro picture


@pytest.mark.parametrize("size, same", [
    ((951, 702), True), ((950, 701), True), ((60, 44), True), ((10, 8), True),  # rounded up or down
    ((1000, 752), False), ((951, 715), False), ((400, 150), False), ((702, 951), False)])
def test_levels_match_to_one_percent_and_one_px(size, same):
    assert slides.matching_levels([(1901, 1403), size]) == ([0, 1] if same else [0])


def test_tissue_is_found_and_white_dust_and_ink_are_not():
    def stain(h, e):
        return 245 * np.exp(-(h * STAINS[0] + e * STAINS[1]))
    colours = {"dark": stain(0.8, 0.6), "pale": stain(0.03, 0.12), "white": (243, 243, 243),
               "dust": (190, 190, 192), "blue ink": (40, 60, 170), "green ink": (30, 120, 70),
               "black ink": (25, 25, 30), "red ink": (215, 30, 45)}
    for name, colour in colours.items():
        mask = slides.tissue_mask(np.full((40, 40, 3), colour, np.float64).round().astype(np.uint8), 8.0)
        assert mask.all() if name in ("dark", "pale") else not mask.any(), name


def test_the_demo_is_written_as_slides_that_openslide_reads(tmp_path):
    (tmp_path / "truth").mkdir()
    demo.write_slide(tmp_path, "a", "negative", [0, 0], size=(2, 4))
    slide = slides.Slide(tmp_path / "slides" / "a.svs")
    assert (slide.width, slide.height, slide.mpp) == (896, 448, demo.MPP)
    image, nuclei, _ = demo.render("negative", [0, 0], size=(2, 4))
    np.testing.assert_allclose(read_cells(tmp_path / "truth" / "a.csv"), nuclei, atol=0.006)
    assert np.array_equal(np.asarray(slide.read_level(0, 0, 0, 896, 448)), image)


# ---------------------------------------------------------------- broken and odd files

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


BROKEN = {  # name: a function that writes it; each is skipped and listed
    "truncated.svs": truncated_svs,
    "broken tile.svs": broken_tile,
    "cut.jpg": cut_jpeg,
    "bomb.png": lambda path: write(path, png(100_000, 100_000)),
    "line.png": lambda path: saved(path, array=tissue(2000)[:3]),
    "white.png": lambda path: saved(path, array=np.full((300, 300, 3), 244, np.uint8)),
    "invisible.png": lambda path: saved(path, array=np.dstack([tissue(), np.zeros((256, 256), np.uint8)])),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_slide_is_skipped_and_listed_by_name(place, name):
    BROKEN[name](place / "in" / "slides" / name)
    found, failed = prepared()
    assert len(failed) == 1 and name in failed[0] and "\n" not in failed[0]
    assert len(Crops(found, found.split("train"))) == 1
    assert not list(place.rglob("*part*"))
    assert [path.name for path in place.parent.iterdir()] == [place.name]  # nothing is written outside


@pytest.mark.parametrize("name, make", {
    "cmyk.jpg": lambda path: saved(path, "CMYK", format="JPEG"), "palette.png": lambda path: saved(path, "P"),
    "alpha.png": lambda path: saved(path, "RGBA"),
    "  ünïcödé №1; comma, %s %d {x} .png": saved, "-rf.png": saved,
}.items())
def test_odd_slides_that_are_whole_are_used(place, name, make):
    make(place / "in" / "slides" / name)
    found, failed = prepared()
    assert failed == []
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
    found, failed = prepared()
    assert list(found.images) == ["good"] and failed == []
