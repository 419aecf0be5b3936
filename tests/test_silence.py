"""What users' folders get wrong is reported: columns, patients, parts of slides, changed inputs."""
import json
import unicodedata
from pathlib import Path

import pytest
import torch
from synthetic import prepared, refused, saved, slides_named, times, tissue, untrained_run, write, write_table
from tiny_flags import FOLDER, SET, SMALL

import data
import eval as eval_py
import train
from common.errors import InputError
from common.figures import draw_maps, save_figure
from common.files import read_csv
from data import Crops
from wsi.cache import ready_cells, tile_info
from wsi.cell_files import cell_files
from wsi.folders import find_folder, mpp_in_table
from wsi.splits import check_unseen, find_data, warn_of_untestable

# ---------------------------------------------------------------- labels.csv

@pytest.mark.parametrize("head, rows, says", [
    ("slide,label,patient,age", ["a,A,p,1", "b,B,q,2"], "not read (those of slides are slide, slide_id,"),
    ("slide,label,patient,group", ["a,A,p,r", "b,B,q,r"], "not read"),
    ("slide,label,patient", ["a,A,p", "b,B,"], "1 of 2 rows have no patient"),
    ("slide,label,split", ["a,A,train", "b,B,test"], "2 of 2 rows have no patient and each counts"),
    ("slide,label,patient", ["a,A,p1", "b,B,P1"], "patients 'P1' and 'p1' differ only in case"),
    ("slide,label,patient", ["a,NaN,p", "b,B,q"], "count as classes; if they are unknown labels, leave")])
def test_columns_patients_and_labels_that_are_doubtful_are_named(place, capsys, head, rows, says):
    slides_named(place / "s", "ab")
    write_table(place / "s" / "labels.csv", head, rows)
    found = find_data("s", 1.0)
    assert says in capsys.readouterr().out and len(found.warnings) == 1
    assert len({row["patient"] for row in found.labels.values()}) == 2


def test_labels_that_differ_only_in_case_or_are_not_the_papers_are_refused(place):
    slides_named(place / "datasets" / "lung", "abc")
    table = place / "datasets" / "lung" / "labels.csv"
    write_table(table, "slide,label,patient", ["a,LUAD,p", "b,LUSC,q", "c,luad,r"])
    with pytest.raises(InputError, match="labels.csv: labels 'LUAD' and 'luad' differ only in case; write"):
        find_data("lung")
    write_table(table, "slide,label,patient", ["a,LUAD,p", "b,LUSC,q", "c,normal,r"])
    with pytest.raises(InputError, match="--data lung has the labels LUAD, LUSC, not normal; .*: --data d"):
        find_data("lung")
    assert find_data("datasets/lung", 2.0, "hovernet").classes == ["LUAD", "LUSC", "normal"]


def test_a_file_that_was_meant_to_be_labels_csv_is_named(place, capsys):
    slides_named(place / "s", "ab")
    write_table(place / "s" / "Label.csv", "slide,label", ["a,A", "b,B"])
    assert find_data("s", 1.0).warnings and "s: has no labels.csv" in capsys.readouterr().out


def test_a_second_folder_of_the_same_name_is_refused_until_the_first_one_is_gone(place, capsys):
    for folder in ("one/s", "two/s", "datasets/lung", "two/lung"):
        slides_named(place / folder, "ab")
    find_data("one/s", 1.0)
    find_data("one/s", 1.0)
    with pytest.raises(InputError, match="two/s: datasets/s is of another folder .*/one/s; rename"):
        find_data("two/s", 1.0)
    (place / "one" / "s").rename(place / "one" / "moved")
    assert find_data("two/s", 1.0).images and find_data("lung").images
    assert "s: was made from" in capsys.readouterr().out
    with pytest.raises(InputError, match="two/lung: datasets/lung is another data set"):
        find_data("two/lung", 1.0)


def test_a_split_seed_that_draws_nothing_is_named(place, capsys):
    names = [f"{label}{i}" for label in "AB" for i in range(5)]
    slides_named(place / "s", names)
    write_table(place / "s" / "labels.csv", "slide,label", [f"{name},{name[0]}" for name in names])
    first = find_data("s", 1.0, split_seed=3).labels
    find_data("s", 1.0, split_seed=3)
    assert "--split-seed" not in capsys.readouterr().out
    assert find_data("s", 1.0, split_seed=4).labels == first
    assert "split.csv keeps its split; --split-seed 4 would draw another" in capsys.readouterr().out


def test_what_needs_no_classes_reads_only_the_um_per_px_of_labels_csv(place):
    slides_named(place / "s", "ab")
    write_table(place / "s" / "labels.csv", "slide,label,split,mpp", ["a,A,train,0.5", "b,,,0.25"])
    with pytest.raises(InputError):
        find_data("s", 1.0)
    found = find_folder("s", 1.0, has_classes=False)
    assert (found.said_mpp("a"), found.said_mpp("b"), found.labels) == (0.5, 0.25, {})
    write_table(place / "s" / "labels.csv", "slide,label,mpp", ["a,A,0.5", "a.svs,A,0.25"])
    with pytest.raises(InputError, match="line 3 names 'a' a second time"):
        find_folder("s", 1.0, has_classes=False)


@pytest.mark.parametrize("content, says", [
    (b"PK\3\4", "labels.csv: is an Excel workbook or a zip file; save it as CSV"),
    (b"image,label\na,A\nb,B\n", "for slides, name the column slide"),
    (b"image,label\nslides/a.svs,A\nc.png,B\nd.png,B\n", "'c.png'; .*in all 2 of 3")])
def test_tables_of_another_kind_are_refused_with_the_way_out(place, content, says):
    slides_named(place / "s", "ab")
    write(place / "s" / "labels.csv", content)
    with pytest.raises(InputError, match=says):
        find_data("s", 1.0)


def test_a_labels_csv_in_slides_is_named(place, capsys):
    slides_named(place / "s", "ab")
    write_table(place / "s/slides/labels.csv", "slide,label", ["a,A", "b,B"])
    find_data("s", 1.0)
    assert "is it this file? Save it as s/labels.csv: slides/labels.csv" in capsys.readouterr().out


def test_labels_that_are_all_empty_are_for_pretraining(place):
    slides_named(place / "s", "ab")
    write_table(place / "s" / "labels.csv", "slide,label,patient", ["a,,p", "b,,q"])
    found = find_data("s", 1.0)
    assert found.labels == {} and found.split("train") == ["a", "b"]


def test_excels_line_of_the_separator_is_skipped(tmp_path):
    write(tmp_path / "a.csv", "sep=;\nslide;label\na;A\n")
    assert read_csv(tmp_path / "a.csv")[1] == [(3, {"slide": "a", "label": "A"})]


def test_umlauts_of_macos_are_those_of_other_systems(place):
    decomposed, composed = (unicodedata.normalize(form, "Drüse") for form in ("NFD", "NFC"))
    slides_named(place / "s", [decomposed, "b"])
    write_table(place / "s" / "labels.csv", "slide,label", [f"{composed},A", "b,B"])
    file = write(place / "s" / "cells" / f"{composed}.csv", "x,y\n1,1\n")
    found = find_data("s", 1.0)
    assert set(found.labels) == {decomposed, "b"} and cell_files(found)[decomposed].samefile(file)


def test_patients_of_the_same_name_in_another_data_set_are_reported(place, capsys):
    slides_named(place / "s", "ab")
    write_table(place / "s" / "labels.csv", "slide,label,patient,split", ["a,A,p,test", "b,B,q,train"])
    found = find_data("s", 1.0)
    for patients, warns in ((["p", "x"], True), (["x"], False)):
        capsys.readouterr()
        check_unseen(found, ["a"], {"data": "other", "images": {}, "patients": patients}, "r/encoder.pt")
        assert ("other, which has 1 of these patients' names, too (p)" in capsys.readouterr().out) == warns


def test_training_says_that_its_encoder_cannot_be_evaluated(place, capsys):
    slides_named(place / "s", "abcd")
    rows = ["a,A,p,train", "b,B,q,train", "c,A,r,test", "d,A,s,val"]
    write_table(place / "s" / "labels.csv", "slide,label,patient,split", rows)
    warn_of_untestable(find_data("s", 1.0))
    assert "no usable test slide of B; add slides or change the split; eval.py" in capsys.readouterr().out
    (place / "s" / "labels.csv").unlink()
    warn_of_untestable(find_data("s", 1.0))
    assert "all slides are trained on" in capsys.readouterr().out


# ---------------------------------------------------------------- um/px of one slide

def test_labels_csv_gives_a_single_slide_its_um_per_px(place, capsys):
    saved(place / "s" / "slides" / "more" / "a.png", array=tissue(448))
    write_table(place / "s" / "labels.csv", "slide,label,patient,mpp", ["a.png,,p,0.5"])
    path = Path("s/slides/more/a.png")
    assert mpp_in_table(path) == 0.5 and mpp_in_table(Path("in/slides/good.png")) is None
    assert data.main(["look", str(path), "--mpp", "1", "--workers", "1"]) == 0
    assert "0.5 um/px by labels.csv" in capsys.readouterr().out


# ---------------------------------------------------------------- tiles and cells

def test_a_slide_without_some_of_its_tiles_is_cut_again(place):
    saved(place / "in" / "slides" / "good.png", array=tissue(448))
    found, failed = prepared("in", 1.0, slide_mpp=1.0)
    assert failed == [] and tile_info(found, "good")["tiles"] == 4
    tiles = sorted((place / "datasets/in/crops/1um/good").iterdir())
    tiles[1].unlink()
    assert tile_info(found, "good") is None
    prepared("in", 1.0, slide_mpp=1.0)
    assert tiles[1].is_file() and tile_info(found, "good")
    tiles[1].write_bytes(tiles[1].read_bytes()[:500])
    with pytest.raises(InputError, match=f"{tiles[1].name}: .*; delete it, and its slide is cut again"):
        Crops(found, ["good"])[1]


def test_an_empty_file_of_cells_is_reported(place, capsys):
    write(place / "in" / "cells" / "good.json", json.dumps({"mag": None, "nuc": {}}))
    found, _ = prepared("in", 1.0, slide_mpp=1.0)
    assert "100% of the tissue has no cell" in capsys.readouterr().out
    assert len(ready_cells(found, "good")) == 0


def test_cells_outside_of_ready_cut_crops_are_reported(place, capsys):
    for name in "ab":
        saved(place / "c" / "crops" / f"{name}.png", array=tissue(224))
        write_table(place / "c" / "cells" / f"{name}.csv", "x,y", ["1000,1000", "2000,30", "5,5"])
    assert data.main(["check", "--data", "c", "--mpp", "1", "--workers", "1"]) == 1
    assert "2 of 3 cells lie outside of the crop" in capsys.readouterr().out
    assert train.main([*SMALL, "--data", "c", "--batch", "2", "--method", "dirl", "--max-steps", "1"]) == 0
    assert "2 cells in 2 crops" in (out := capsys.readouterr().out) and "4 more cells lie outside" in out


def test_a_run_does_not_resume_with_other_cells(place, folder, capsys):
    assert train.main([*FOLDER, "--max-steps", "1"]) == 0
    write_table(folder / "cells" / "glands_0.csv", "x,y", ["100,100", "300,300"])
    refused(capsys, train.main, FOLDER, "was started with other tiles, or cells in them: use")
    (folder / "cells" / "glands_0.csv").unlink()
    assert train.main([*FOLDER, "--max-steps", "1"]) == 0


def test_eval_draws_the_cells_that_the_run_learned_from(place, folder, capsys, blank_figures):
    for image in (folder / "slides").iterdir():
        write_table(folder / "cells" / "cellpose" / f"{image.stem}.csv", "x,y", ["100,100"])
    assert train.main([*FOLDER, "--prior", "cellpose"]) == 0
    capsys.readouterr()
    assert eval_py.main([*SET, "--repeats", "1", "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "cells of 8 slides (--prior cellpose): 8 in tiny set/cells/cellpose/" in out
    assert "patches with a cell                                0.0051" in out


# ---------------------------------------------------------------- names, folders

def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    picture = torch.full((8, 8, 3), 200, dtype=torch.uint8).numpy()
    heat = torch.rand(8, 8).numpy()
    save_figure(draw_maps(picture, {"DSMIL": {"A": heat}}, "case$12_$3: A$_$"), tmp_path / "a.png")


def test_a_run_that_cannot_be_written_is_refused_before_slides_are_cut(place, folder, capsys):
    write(place / "file", "")
    refused(capsys, train.main, [*FOLDER, "--run", "file/run"], "file/run: cannot be written")
    assert not (place / "datasets").exists() and times(place / "runs", "*") == {}


def test_another_um_per_px_than_the_encoders_is_reported(place, capsys):
    untrained_run("e")
    eval_py.open_networks(eval_py.slides_arguments(["--data", "in", "--checkpoint", "e", "--mpp", "1"]))
    assert "e/encoder.pt: was trained at 2 um/px and is measured at 1" in capsys.readouterr().out
