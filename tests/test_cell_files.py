"""Tests of wsi/cell_files.py: which files in cells/ belong to which image, and the warnings on the others."""
import gzip
import json
from pathlib import Path

import pytest
from synthetic import prepared, saved, tissue, write
from tiny_flags import SMALL

import data
import train
from common.errors import InputError
from data import Crops
from wsi import cache
from wsi.cell_files import cell_files, image_names, unmatched_files, unused_cell_files, whose_cells
from wsi.datasets import DATASETS
from wsi.splits import find_data

POINT = json.dumps({"type": "Feature", "geometry": {"type": "Point", "coordinates": [20, 30]}})


@pytest.mark.parametrize("name", [
    "CMU 1.geojson", "CMU 1.svs.geojson", "CMU 1.svs.json", "CMU 1.SVS.json", "CMU 1.GEOJSON",
    "CMU 1.geojson.gz", "CMU 1.svs.GeoJSON.gz", "CMU 1.svs - Series 0.geojson", "CMU 1 - Series 0.geojson",
    "CMU 1.svs - 20x.geojson", "CMU 1.png.json", "CMU 1.ome.tif - CMU 1.geojson"])
def test_cells_named_as_qupath_names_images_are_read(place, name):
    saved(place / "in" / "slides" / "CMU 1.png", array=tissue(seed=1))
    write(place / "in" / "cells" / name, gzip.compress(POINT.encode()) if name.endswith("gz") else POINT)
    found, failed = prepared()
    belongs = ".ome" not in name
    assert failed == [] and (Crops(found, ["CMU 1"]).cells(0).tolist() == [[20, 30]]) == belongs
    assert unused_cell_files(found) == [] if belongs else name in unused_cell_files(found)[0]


def test_names_an_image_may_have_by_hand():
    assert image_names("a.svs - Series 0") == ["a.svs - Series 0", "a", "a.svs - Series 0.ome", "a.ome"]
    assert image_names("a.b - c") == ["a.b - c", "a.b - c.ome"]
    assert image_names("a.tif.SVS")[:2] == ["a.tif.SVS", "a.tif"]


def found_in(folder, slides, files, prior="auto"):
    """The data set of empty files."""
    for name in slides:
        write(folder / "slides" / name, "x")
    for name in files:
        write(folder / "cells" / name, "x,y\n1,2\n")
    return find_data(str(folder), 1.0, prior)


def test_a_file_belongs_to_the_slide_that_it_is_most_exactly_named_after(place):
    slides = ["a.svs", "a.tif.png", "a - Series 1.png", "b.ome.tif", "b.svs", "c.ome.tif", "d.svs"]
    files = {"a": "a.svs.csv", "a.tif": "a.tif.csv", "a - Series 1": "a - Series 1.csv", "b": "b.csv",
             "b.ome": "b.ome.csv", "c.ome": "c.csv"}
    found = found_in(Path("x"), slides, files.values())
    assert {name: path and path.name for name, path in cell_files(found).items()} == {**files, "d": None}
    assert unused_cell_files(found) == []


def test_of_several_files_the_first_is_read_and_named(place):
    files = ["a.csv", "a.json", "b.svs.json", "b.tsv", "c_seg.npy", "c_cp_masks.png", "d_cp_masks.tif",
             "e.svs - Series 1.csv", "e.svs - Series 0.csv", "f_seg.npy"]
    found = found_in(Path("x"), [f"{name}.svs" for name in "abcdef"], files)
    assert [path.name for path in cell_files(found).values()] == [
        "a.json", "b.tsv", "c_cp_masks.png", "d_cp_masks.tif", "e.svs - Series 0.csv", "f_seg.npy"]
    line, = unused_cell_files(found)
    assert "several cell files: 3;" in line
    assert "a.json, not a.csv, b.tsv, not b.svs.json, e.svs - Series 0.csv, not e.svs - Series 1.csv;" in line


def test_files_that_match_no_slide_are_named(place):
    files = ["a.csv", "b.csv", "c.zip", "a_notes.csv", "sub/a.csv", ".hidden.csv", "._a.csv",
             "hovernet/a.json", "hovernet/z.json", "builtin/z.npz", "level0/auto/z.npz", "crops_auto.npz"]
    found = found_in(Path("x"), ["a.svs"], files)
    names = [path.relative_to("x/cells").as_posix() for path in unmatched_files(found)]
    assert names == ["a_notes.csv", "b.csv", "c.zip", "sub/a.csv"]
    line, = unused_cell_files(found)
    assert line.startswith("x/cells: files that match no slide and are not read: 4 "
                           "(a_notes.csv, b.csv, c.zip, ...); name each after its slide")
    assert line.endswith("; move what is in sub/ to the folder above")
    Path("x/cells/sub").rename("x/cells/a")
    Path("x/cells/a/a.csv").rename("x/cells/a/cells.geojson")
    assert unused_cell_files(found)[0].endswith("; rename a/cells.geojson to a.geojson")
    Path("x/cells/a/cells.geojson").rename("x/cells/a/a.csv")
    Path("x/cells/a").rename("x/cells/sub")
    Path("x/cells/a.json").symlink_to("unmounted.json")
    assert Path("x/cells/a.json") in unmatched_files(found) and "read: 5 " in unused_cell_files(found)[0]
    assert unused_cell_files(found)[0].endswith("; move what is in sub/ to the folder above")
    Path("x/cells/a.json").unlink()
    names = [path.name for path in unmatched_files(find_data("x", 1.0, "hovernet"))]
    assert names == ["a_notes.csv", "b.csv", "c.zip", "z.json", "a.csv"]


def test_a_segmenters_folder_that_is_not_read_is_named(place):
    found = found_in(Path("x"), ["a.svs"], ["hovernet/a.json", "builtin/a.csv"])
    line, = unused_cell_files(found)
    assert line.startswith("x/cells/hovernet: is read only with --prior hovernet; without the flag")
    assert cell_files(found) == {"a": Path("x/cells/builtin/a.csv")}
    assert unused_cell_files(find_data("x", 1.0, "hovernet")) == []
    write(Path("x/cells/a.csv"), "x,y\n1,2\n")
    assert unused_cell_files(found) == []  # cells of the user's own are read


def test_cells_of_crops_in_subfolders_are_the_detectors_or_not(place, capsys):
    for name in ("x/a.png", "x/b.png"):
        saved(place / "c" / "crops" / name)
    for name in ("builtin/x/a.csv", "hovernet/x/a.csv"):
        write(place / "c" / "cells" / name, "x,y\n1,2\n")
    found = find_data("c", 1.0)
    assert whose_cells(found) == "cells of 2 crops (--prior auto): 2 by the built-in detector"
    own = find_data("c", 1.0, "hovernet")
    assert whose_cells(own) == "cells of 2 crops (--prior hovernet): 1 in c/cells/hovernet/, 1 missing"
    line, = unused_cell_files(found)
    assert line.startswith("c/cells/hovernet: is read only with --prior hovernet")


def test_auto_takes_the_papers_segmenter_first_and_tells_what_it_took(place, capsys):
    """lung: HoVer-Net's, from cells/hovernet/ and then cells/; other files in cells/; the detector's."""
    folder = Path("datasets/lung")
    files = ["hovernet/a.csv", "a.json", "b.csv", "cellpose/c.csv", "builtin/d.csv", "e.csv"]
    assert DATASETS["lung"].prior == "hovernet"
    assert {DATASETS[name].prior for name in ("brca", "paad", "bright3", "bright6")} == {"cellpose"}
    found_in(folder, [f"{name}.svs" for name in "abcdef"], files)
    write(folder / "cells/b.json", {"mag": None, "nuc": {}})
    write(folder / "cells/e.geojson", POINT)
    found = find_data("lung")
    read = {name: path and path.relative_to(folder / "cells").as_posix()
            for name, path in cell_files(found).items()}
    assert read == {"a": "hovernet/a.csv", "b": "b.json", "c": None, "d": "builtin/d.csv", "e": "e.geojson",
                    "f": None}
    with pytest.raises(InputError, match="no slide could be used"):
        cache.prepare(found, workers=1)
    assert capsys.readouterr().out.splitlines()[0] == (
        "cells of 6 slides (--prior auto): 1 in datasets/lung/cells/hovernet/, 2 in datasets/lung/cells/, "
        "3 by the built-in detector")
    warned, = unused_cell_files(found)
    assert "e.geojson, not e.csv" in warned

    (folder / "cells/b.csv").rename(folder / "cells/hovernet/z.csv")
    assert "match no slide and are not read: 1 (hovernet/z.csv)" in unused_cell_files(find_data("lung"))[0]
    own = find_data(str(folder))  # as a folder of one's own, without the paper's segmenter
    assert cell_files(own)["a"] == folder / "cells/a.json"


def test_crops_have_their_files_beside_each_other(place):
    for name in ("a", "sub/a", "sub/b.c"):
        saved(place / "c" / "crops" / f"{name}.png", array=tissue(224))
    for i, name in enumerate(("a.png.csv", "sub/a.CSV", "sub/b.c.png.csv", "b.c.csv", "sub/other.csv")):
        write(place / "c" / "cells" / name, f"x,y\n{i},2\n")
    found, failed = prepared("c")
    crops = Crops(found, found.split("train"))
    assert failed == [] and crops.owner == ["a.png", "sub/a.png", "sub/b.c.png"]
    assert [crops.cells(i).tolist() for i in range(3)] == [[[0, 2]], [[1, 2]], [[2, 2]]]
    line, = unused_cell_files(found)
    assert "match no crop and are not read: 2 (b.c.csv, sub/other.csv);" in line


def test_the_start_of_training_names_them_once(place, capsys):
    write(place / "in" / "cells" / "goood.geojson", POINT)
    assert train.main([*SMALL, "--method", "cellback"]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if "goood" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: in/cells: files that match no slide")


def test_a_shard_does_not_name_the_files_of_other_shards(place, capsys):
    saved(place / "in" / "slides" / "other.png")
    for name in ("good.geojson", "other.geojson"):
        write(place / "in" / "cells" / name, POINT)
    argv = ["prepare", "--data", "in", "--mpp", "1", "--slide-mpp", "1", "--workers", "1", "--shard", "0/2"]
    assert data.main(argv) == 0 and "warning: in/cells" not in capsys.readouterr().out
