"""What a user sees before training: data.py look of a slide and of a folder, and data.py check."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image
from synthetic import discs, refused, saved, tissue, write, write_table

import data
import train
from common.errors import InputError
from wsi import look, sheet
from wsi.cache import tile_info
from wsi.sanity import nucleus_size, suggested_scale
from wsi.slides import Slide
from wsi.splits import find_data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SUGGESTED = re.compile(r"nuclei are ([\d.]+) px wide; at 7 um that is ([\d.]+) um/px")


def nuclei_slide(mpp=0.5, um=300):
    """Nuclei of 7 um in a grid on eosin, uint8, at mpp um/px."""
    centres = [(x, y) for x in range(12, um, 24) for y in range(12, um, 24)]
    return discs(mpp, centres, um, um, 3.5)


# ---------------------------------------------------------------- um/px unknown

def test_a_slide_without_mpp_is_refused_with_what_its_nuclei_suggest(place, capsys):
    saved(place / "in" / "slides" / "good.png", array=nuclei_slide())
    train_flags = ["--data", "in", "--mpp", "1", "--workers", "1", "--device", "cpu"]
    for main, argv in ((data.main, ["look", "in/slides/good.png"]), (train.main, train_flags)):
        assert main(argv) == 2
        error = capsys.readouterr().err
        size, mpp = map(float, SUGGESTED.search(error).groups())
        assert size == pytest.approx(14, rel=0.15) and mpp == pytest.approx(7 / size, abs=0.006), error
        assert "--slide-mpp" in error
    saved(place / "white.png", array=np.full((300, 300, 3), 255, np.uint8))
    refused(capsys, data.main, ["look", "white.png"], "white.png: no um/px", "too few nuclei")
    refused(capsys, data.main, ["look", "white.png", "--max-gigapixels", "0.00001"], "--max-gigapixels")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}, which is not in the repository")
@pytest.mark.parametrize("group, reduced, low, high", [
    ("monuseg", 1, 1.05, 1.15), ("monuseg", 2, 1.0, 1.15),
    ("crchisto", 1, 1.2, 1.4), ("crchisto", 2, 0.9, 1.1)])
def test_suggestion_on_images_of_known_mpp(group, reduced, low, high):
    """docs/data.md's table: suggested over true um/px, of all images of a group together."""
    images = []
    for file in sorted((SHARED / "nuclei").glob(f"{group}*.json")):
        true = json.loads(file.read_text())["mpp"] * reduced
        image = Image.open(file.with_suffix(".png")).convert("RGB")
        images.append(np.asarray(image.reduce(reduced)))
    assert low < 7 / nucleus_size(images, 1.0) / true < high


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}, which is not in the repository")
@pytest.mark.parametrize("slide, says", [
    ("gallery-06.tiff", "7.0 px wide; at 7 um that is 1.01"),
    ("gallery-18.tiff", "8.4 px wide; at 7 um that is 0.84")])
def test_suggestion_on_slides_without_mpp(slide, says):
    assert says in suggested_scale(SHARED / "slides" / slide, 40)


# ---------------------------------------------------------------- data.py check on a folder of faults

def broken(folder):
    write(folder / "slides" / "broken.svs", b"II*\0 no slide")


def empty(folder):
    write(folder / "slides" / "empty.svs", b"")


def unfinished(folder):
    write(folder / "slides" / "late.svs.partial", b"x")


def without_scale(folder):
    saved(folder / "slides" / "noscale.png", array=nuclei_slide())


def at_twice_the_scale(folder):
    saved(folder / "slides" / "twice.png", array=nuclei_slide())


def on_grey(folder):
    image = np.pad(nuclei_slide(), ((0, 300), (0, 0), (0, 0)), constant_values=245)
    saved(folder / "slides" / "grey.png", array=(image * 0.7).astype(np.uint8))


def with_damaged_cells(folder):
    saved(folder / "slides" / "cells.png", array=nuclei_slide())
    write(folder / "cells" / "cells.json", "{")


FAULTS = [  # (builds it in a folder, the name that check says, its words, the slide's mpp in labels.csv)
    (broken, "broken.svs", "cannot be read as an image", None),
    (empty, "empty.svs", "cannot be read as an image", None),
    (unfinished, "late.svs:", "unfinished", None),
    (without_scale, "noscale.png", "no um/px; nuclei are", None),
    (at_twice_the_scale, "twice.png", "its nuclei measure", 1.0),
    (on_grey, "grey.png", "background is not white", 0.5),
    (with_damaged_cells, "cells.json", "cells", 0.5),
]


def test_check_names_every_fault_once(place, capsys):
    folder = place / "mixed"
    rows = []
    for label in "AB":
        for split in ("train", "val", "test"):
            saved(folder / "slides" / f"{label}{split}.png", array=nuclei_slide())
            rows.append(f"{label}{split},{label},{split},0.5")
    for build, name, _, mpp in FAULTS:
        build(folder)
        if mpp:
            rows.append(f"{name.split('.')[0]},A,train,{mpp}")
    write_table(folder / "labels.csv", "slide,label,split,mpp", rows)
    assert data.main(["check", "--data", "mixed", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    for _, name, words, _ in FAULTS:
        named = [line for line in out.splitlines() if name in line]
        assert len(named) == 1 and words in named[0], (name, out)
    assert f"warnings: {len(FAULTS)}" in out, out
    assert "cannot be read: 2" in out and "slides without um/px: 1" in out


# ---------------------------------------------------------------- look at a slide

@pytest.fixture
def slide(place):
    """A slide of 500 x 400 random px at 0.25 um/px."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    saved(place / "noise.png", array=pixels)
    return Slide(place / "noise.png", said_mpp=0.25), pixels


@pytest.mark.parametrize("point, corner", [
    ((200, 150), (100, 50)), ((0, 0), (20, 10)), ((499, 399), (120, 110)), (None, (60, 40))])
def test_an_inset_is_the_slide_at_level_0_about_a_point(slide, monkeypatch, point, corner):
    opened, pixels = slide
    monkeypatch.setattr(look, "INSET", 50)  # um: 200 px
    cells = np.array([[100., 100], [160, 140], [300, 290]])  # their median: 160, 140
    inset = look.close_up(opened, np.array([20, 10]), 300.0, cells, point)
    x, y = corner
    assert inset.side == 200 and inset.corner.tolist() == [x, y]
    np.testing.assert_array_equal(inset.image, pixels[y: y + 200, x: x + 200])


def test_an_inset_shows_cells_and_a_nucleus_at_true_scale(slide):
    opened, _ = slide
    cells = np.array([[60., 80], [100, 90], [350, 350]])
    inset = look.Inset(np.zeros((200, 200, 3), np.uint8), np.array([40, 40]), 200)
    shown = look.Shown(np.zeros((224, 224, 3), np.uint8), torch.zeros(196), inset, cells,
                       np.array([0, 0]), 400.0)  # 400 px of 0.25 um: tiles at 100 / 224 um/px
    axis = Figure().subplots()
    assert look.draw_inset(axis, shown, 100 / 224) == 2
    crosses = [line for line in axis.lines if line.get_marker() == "+"]
    for line in crosses:
        np.testing.assert_allclose(line.get_xydata(), [[5, 10], [15, 12.5]])  # um from the inset's corner
    assert crosses and sorted(axis.get_xlim()) == [0, 50]
    assert {circle.radius for circle in axis.patches if isinstance(circle, Circle)} == {3.5}
    bars = {np.ptp(line.get_xdata()) for line in axis.lines if line.get_marker() != "+"}
    assert bars == {10} and "10 um" in [text.get_text() for text in axis.texts]


def test_a_tile_shows_its_cell_patches_and_the_box_of_its_inset():
    p_c = torch.zeros(196)
    p_c[[0, 15, 195]] = 1
    inset = look.Inset(np.zeros((9, 9, 3), np.uint8), np.array([110, 220]), 50)
    shown = look.Shown(np.zeros((224, 224, 3), np.uint8), p_c, inset, np.zeros((0, 2)),
                       np.array([100, 200]), 448.0)  # half a px of the tile is one of the slide
    axis = Figure().subplots()
    look.draw_tile(axis, shown, 1.0)
    patches = [path.vertices for path in axis.collections[0].get_paths()]
    places = [tuple((vertices.min(0) // 16).astype(int)) for vertices in patches]
    assert places == [(0, 0), (1, 1), (13, 13)]
    assert all((vertices.max(0) < 16 * (np.array(place) + 1)).all()
               for vertices, place in zip(patches, places))
    box = next(patch for patch in axis.patches if isinstance(patch, Rectangle))
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (5, 10, 25, 25)


# ---------------------------------------------------------------- look at a folder

def test_a_contact_sheet_counts_the_tiles_that_would_be_cut(place, capsys):
    half = np.full((700, 900, 3), 245, np.uint8)
    half[:, :450] = tissue(900)[:700, :450]
    for name, array in (("half", half), ("full", tissue(700))):
        saved(place / "in" / "slides" / f"{name}.png", array=array)
    flags = ["--data", "in", "--mpp", "1", "--slide-mpp", "1", "--workers", "1"]
    assert data.main(["prepare", *flags]) == 0
    found = find_data("in", mpp=1.0, slide_mpp=1.0)
    for name in ("good", "half", "full"):
        seen = sheet.overview(found.images[name], 1.0, None, 1.0, 0.5, 40)
        assert seen.tiles == tile_info(found, name)["tiles"] == {"good": 1, "half": 6, "full": 9}[name]
        assert seen.tissue.shape == seen.thumbnail.shape[:2]
    assert sheet.overview(found.images["good"], 1.0, None, 2.0, 0.5, 40).tiles == 0  # smaller than a tile
    with pytest.raises(InputError, match="too coarse"):
        sheet.overview(found.images["good"], 1.0, None, 0.5, 0.5, 40)


def is_near(image, colour):
    """Which px of an RGB image have about that colour."""
    return (np.abs(image.astype(int) - colour) < 40).all(-1)


def test_look_at_a_folder_shows_every_slide_or_why_not(place, capsys, monkeypatch):
    image = np.full((900, 900, 3), 245, np.uint8)
    image[:500, :500] = tissue(500)
    saved(place / "in" / "slides" / "some.png", array=image)
    write(place / "in" / "slides" / "bad.svs", b"no slide")
    monkeypatch.setattr(sheet, "PER_PAGE", 2)
    flags = ["look", "in", "--mpp", "1", "--slide-mpp", "1", "--workers", "1", "--out", "sheet.png"]
    assert data.main(flags) == 1  # bad.svs
    out = capsys.readouterr().out
    assert out.count("skipped: ") == 1 and "bad.svs: cannot be read" in out
    assert "some.png: tiles: about 4; 1 um/px by --slide-mpp" in out and "good.png: tiles: about 1" in out
    first, second = (np.asarray(Image.open(name).convert("RGB")) for name in ("sheet.png", "sheet_2.png"))
    pink = image[0, 0]
    assert is_near(first, (208, 0, 0)).sum() > 20  # why there is no bad.svs
    assert is_near(first, pink).sum() > 1000  # good.png
    assert is_near(second, pink).sum() > 1000 and is_near(second, (0, 160, 64)).sum() > 100  # its contour
    refused(capsys, data.main, [*flags, "--tile", "1,2"], "--tile", "name the slide")
    write(place / "series" / "1.dcm", b"x")
    write(place / "series" / "2.dcm", b"x")
    refused(capsys, data.main, ["look", "series"], "1.dcm: cannot be read")
    (place / "none").mkdir()
    refused(capsys, data.main, ["look", "none"], "no slides in it")
