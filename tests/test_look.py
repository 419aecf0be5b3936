"""What a user sees before training: data.py look of a slide and of a folder, and data.py check."""
import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image
from synthetic import discs, prepared, refused, saved, svs, tissue, write, write_table
from test_coordinates import hovernet, write_xy
from test_pixels import png16
from test_slide_files import dicom

import data
import train
from common.errors import InputError
from wsi import look
from wsi.cache import tile_info
from wsi.sanity import nucleus_size, suggested_scale
from wsi.slides import Slide
from wsi.splits import find_data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SUGGESTED = re.compile(r"nuclei are ([\d.]+) px wide; at 7 um that is ([\d.]+) um/px")


@lru_cache
def nuclei_slide(um=300, diameter=7):
    """Round nuclei of that diameter, um, in a grid on eosin, uint8, at 0.5 um/px."""
    centres = [(x, y) for x in range(12, um, 24) for y in range(12, um, 24)]
    return discs(0.5, centres, um, um, diameter / 2)


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

GRID = np.array([(x, y) for y in range(12, 300, 24) for x in range(12, 300, 24)]) / 0.5  # px of nuclei_slide
GLASS = np.pad(nuclei_slide(), ((0, 0), (600, 0), (0, 0)), constant_values=245)  # 600 px of it on the left
ON_GLASS = GRID + (600, 0)  # its nuclei


LONG = "long" * 51


def a_file(name, content=None):
    """Returns a function that writes a file to a folder: these bytes, or nuclei_slide() as an image."""
    def build(folder):
        if content is None:
            saved(folder / name, array=nuclei_slide())
        else:
            write(folder / name, content)
    return build


def on_grey(folder):
    image = np.pad(nuclei_slide(), ((0, 300), (0, 0), (0, 0)), constant_values=245)
    saved(folder / "slides" / "murky.png", array=(image * 0.7).astype(np.uint8))


def without_color(folder):
    saved(folder / "slides" / "monochrome.png", "L", nuclei_slide())


def with_a_level_of_another_picture(folder):
    macro = np.full((100, 300, 3), 244, np.uint8)
    (folder / "slides").mkdir(exist_ok=True)
    with tifffile.TiffWriter(folder / "slides" / "layered.svs") as file:
        for image in (nuclei_slide(), macro):
            file.write(image, tile=(128, 128), compression="zlib", photometric="rgb", metadata=None,
                       description="Aperio|AppMag = 20|MPP = 0.5", subfiletype=int(image is macro))


def of_an_unknown_ending(folder):
    tifffile.imwrite(folder / "slides" / "renamed.sys", nuclei_slide(), tile=(128, 128), photometric="rgb")


def without_a_row(folder):
    svs(folder / "slides" / "unlisted.svs", nuclei_slide(), "Aperio|AppMag = 20|MPP = 0.5")


def with_damaged_cells(folder):
    saved(folder / "slides" / "torn.png", array=nuclei_slide())
    write(folder / "cells" / "torn.json", "{")


def with_cells_exchanged(folder):
    saved(folder / "slides" / "swapped.png", array=GLASS)
    write_xy(folder / "cells" / "swapped.csv", ON_GLASS[:, ::-1])


def with_cells_in_um(folder):
    saved(folder / "slides" / "micrometres.png", array=GLASS)
    write_xy(folder / "cells" / "micrometres.csv", ON_GLASS * 0.5)


def with_cells_of_no_slide(folder):
    write_xy(folder / "cells" / "nobody.geojson", GRID)


def with_two_files_of_cells(folder):
    saved(folder / "slides" / "doubled.png", array=nuclei_slide())
    for ending in ("csv", "tsv"):
        write_xy(folder / "cells" / f"doubled.{ending}", GRID)


def with_a_mask_of_8_bits(folder):
    labels = np.zeros((600, 600), np.uint8)
    for i, (x, y) in enumerate(np.stack(np.meshgrid(range(5, 600, 20), range(5, 600, 20)), 2).reshape(-1, 2)):
        labels[y: y + 10, x: x + 10] = i % 255 + 1
    saved(folder / "slides" / "overflow.png", array=nuclei_slide())
    saved(folder / "cells" / "overflow_cp_masks.png", array=labels)


def of_hovernet_without_a_power(folder):
    saved(folder / "slides" / "powerless.png", array=nuclei_slide())
    hovernet(folder / "cells" / "powerless.json", GRID, power=20, mag=40)


FAULTS = [  # (builds it in a folder, the name that check prints, its words, mpp in labels.csv; None: no row)
    (a_file("slides/broken.svs", b"II*\0 no slide"), "broken", "cannot be read as an image", ""),
    (a_file("slides/zerobytes.svs", b""), "zerobytes", "is the file complete?", ""),
    (a_file("slides/uuid/undone.svs.partial", b"x"), "undone", "run gdc-client download again", None),
    (a_file("slides/noscale.png"), "noscale", "no um/px and no magnification is recorded", ""),
    (a_file("slides/twice.png"), "twice", "its nuclei measure", 1.0),
    (a_file("slides/coarse.png"), "coarse", "too coarse for 1; give a larger --mpp", 2.0),
    (on_grey, "murky", "background is not white", 0.5),
    (without_color, "monochrome", "it has no colour", 0.5),
    (with_a_level_of_another_picture, "layered", "its levels of 300 x 100 px are not used", ""),
    (a_file(f"slides/{LONG}.png"), LONG, "more than 200 bytes; rename it", 0.5),
    (a_file("slides/olympus.vsi", b"x"), "olympus", "convert it", None),
    (a_file("slides/packed.svs.gz", b"\x1f\x8b"), "packed", "is not unpacked; unpack or remove it", None),
    (of_an_unknown_ending, "renamed", "rename it to .tif", None),
    (a_file("d3b07384/a.svs", b"x"), "d3b07384", "only mixed/slides/ is read", None),
    (without_a_row, "unlisted", "1 of 22 slides have no row and are not used; to use them", None),
    (lambda folder: None, "gone", "1 of 22 rows have no file and are skipped; fetch", 0.5),
    (with_damaged_cells, "torn", "not a known cell file", 0.5),
    (with_cells_exchanged, "swapped", "100% of the cells lie outside of the slide", 0.5),
    (with_cells_in_um, "micrometres", "um instead of px", 0.5),
    (with_cells_of_no_slide, "nobody", "match no slide and are not read: 1", None),
    (with_two_files_of_cells, "doubled", "remove the others", 0.5),
    (with_a_mask_of_8_bits, "overflow", "save the masks with 16 bits", 0.5),
    (of_hovernet_without_a_power, "powerless", "no objective power: 20x is assumed", 0.5),
]


def named_once(out, faults):
    """Asserts that one line that check prints, a warning, names each fault, and that there are no others."""
    lines = out.splitlines()
    for name, words in faults:
        having = [line for line in lines if name in line]
        assert len(having) == 1 and having[0].startswith("warning: ") and words in having[0], (name, out)
    assert sum(line.startswith("warning: ") for line in lines) == len({words for _, words in faults})


def test_check_names_every_fault_once(place, capsys):
    folder = place / "mixed"
    rows = []
    for label in "AB":
        for split in ("train", "val", "test"):
            array = np.roll(nuclei_slide(), len(rows), 0)
            saved(folder / "slides" / f"{label}{split}.png", array=array)
            rows.append(f"{label}{split},{label},{label}{split},{split},0.5")
    for build, name, _, mpp in FAULTS:
        build(folder)
        if mpp is not None:
            rows.append(f"{name},A,{name},train,{mpp}")
    for hidden in ("slides/._Atrain.png", "slides/._scan.vsi", "cells/._Atrain.json", "._other.svs"):
        write(folder / hidden, b"\0\5\x16\7")  # macOS
    write_table(folder / "labels.csv", "slide,label,patient,split,mpp", rows)
    flags = ["--data", "mixed", "--mpp", "1", "--workers", "1"]
    for is_prepared in (False, True):
        assert not is_prepared or data.main(["prepare", *flags]) == 1  # no file of cells is read again
        capsys.readouterr()
        assert data.main(["check", *flags]) == 1
        out = capsys.readouterr().out
        named_once(out, [(name, words) for _, name, words, _ in FAULTS])
        assert f"warnings: {len(FAULTS)}\n" in out and "._" not in out, out
        assert "cannot be used: 5" in out


def test_check_names_every_fault_of_crops_once(place, capsys):
    folder = place / "cut" / "crops"
    for i in range(5):
        saved(folder / f"{i}.png", array=nuclei_slide()[:224, :224])
    saved(folder / "oblong.png", array=nuclei_slide()[:223, :224])
    saved(folder / "larger.png", array=nuclei_slide()[:448, :448])
    saved(folder / "monochrome.png", "L", nuclei_slide()[:224, :224])
    png16(folder / "sixteen.png", nuclei_slide()[:224, :224, 1].astype(np.uint16) * 257)
    png16(folder / "twelve.png", nuclei_slide()[:224, :224].astype(np.uint16) * 16)
    tifffile.imwrite(folder / "real.tif", nuclei_slide()[:224, :224, 1].astype(np.float32))
    for name in ("torn.png", "windows.bmp", "._0.png"):
        write(folder / name, b"x")
    assert data.main(["check", "--data", "cut", "--mpp", "0.5", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    grey = "2 of 8 crops have no colour (monochrome.png, sixteen.png); H&E is needed"
    named_once(out, [
        ("oblong", "cut it to a square, or put it in slides/"), ("larger", "put it in its own folder"),
        ("monochrome", grey), ("sixteen", grey), ("twelve", "scale it to 16, or save it as 8-bit RGB"),
        ("real", "floating-point numbers without a known range; save it as 8-bit RGB"),
        ("torn", "is the file complete?"), ("windows", ".bmp is not read; convert it")])
    assert "warnings: 7\n" in out and "cannot be used: 4" in out and "._" not in out


def test_check_of_two_dicom_series_names_them_and_what_else_is_not_read(place, capsys):
    for i, series in enumerate(("1.2.3.5", "1.2.3.6")):
        dicom(place / "x" / "slides" / "p1" / f"{i}.dcm", series)
    write(place / "x" / "slides" / "undone.svs.partial", b"x")
    assert data.main(["check", "--data", "x"]) == 1
    named_once(capsys.readouterr().out, [
        ("1.dcm", "belongs to another DICOM series than 0.dcm; put each series into its own folder"),
        ("undone", "run gdc-client download again")])


def test_slides_directly_in_the_working_folder_stay_slides(place):
    """Their tiles go to datasets/in/crops/, which is no folder of ready-cut crops."""
    saved(place / "datasets" / "in" / "good.png")
    for _ in range(2):
        found, failed = prepared("datasets/in")
        assert found.kind == "slides" and list(found.images) == ["good"] and failed == []
    assert found.work.resolve() == found.source.resolve()


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
    inset, place, side = look.close_up(opened, np.array([20, 10]), 300.0, cells, point)
    x, y = corner
    assert side == 200 and place.tolist() == [x, y]
    np.testing.assert_array_equal(inset, pixels[y: y + 200, x: x + 200])


def test_an_inset_shows_cells_and_a_nucleus_at_true_scale(slide):
    opened, _ = slide
    cells = np.array([[60., 80], [100, 90], [350, 350]])
    inset = np.zeros((200, 200, 3), np.uint8), np.array([40, 40]), 200
    shown = look.Shown(np.zeros((224, 224, 3), np.uint8), torch.zeros(196), cells,
                       np.array([0, 0]), 400.0, *inset)  # 400 px of 0.25 um: tiles at 100 / 224 um/px
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
    inset = np.zeros((9, 9, 3), np.uint8), np.array([110, 220]), 50
    shown = look.Shown(np.zeros((224, 224, 3), np.uint8), p_c, np.zeros((0, 2)),
                       np.array([100, 200]), 448.0, *inset)  # half a px of the tile is one of the slide
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
        thumbnail, mask, caption = look.overview(found.images[name], 1.0, None, 1.0, 0.5, 40)
        assert tile_info(found, name)["tiles"] == {"good": 1, "half": 6, "full": 9}[name]
        assert caption.startswith(f"tiles: about {tile_info(found, name)['tiles']};")
        assert mask.shape == thumbnail.shape[:2]
    caption = look.overview(found.images["good"], 1.0, None, 2.0, 0.5, 40)[-1]
    assert caption.startswith("tiles: about 0;")  # smaller than a tile
    with pytest.raises(InputError, match="too coarse"):
        look.overview(found.images["good"], 1.0, None, 0.5, 0.5, 40)


def is_near(image, colour):
    """Which px of an RGB image have about that colour."""
    return (np.abs(image.astype(int) - colour) < 40).all(-1)


def test_look_at_a_folder_shows_every_slide_or_why_not(place, capsys, monkeypatch):
    image = np.full((900, 900, 3), 245, np.uint8)
    image[:500, :500] = tissue(500)
    saved(place / "in" / "slides" / "some.png", array=image)
    write(place / "in" / "slides" / "bad.svs", b"no slide")
    monkeypatch.setattr(look, "PER_PAGE", 2)
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
    refused(capsys, data.main, ["look", "series/1.dcm"], "1.dcm: cannot be read")
    (place / "none").mkdir()
    refused(capsys, data.main, ["look", "none"], "no slides in it")
