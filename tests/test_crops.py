"""Ready-cut crops that are not 224 px: their own px for the detector, their um/px for all that follows."""
import json

import numpy as np
import pytest
from PIL import Image
from synthetic import discs, prepared, refused, saved, tissue, write, write_table
from test_segment import NUCLEI
from tiny_flags import CPU, SMALL

import data
import eval as eval_py
import train
from common.files import load_tensors
from data import Crops
from experiments.figures.priors import matched
from prior import segment_nuclei
from wsi import cache
from wsi.cache import crop_mpp, file_mpp, load_crops, prepare
from wsi.splits import find_data, read_probe

CENTRES = np.array([[x, y] for y in range(20, 240, 20) for x in range(20, 240, 20)], float)  # um


def shares(found, truth, near):
    """Cells found, those that are true, and F1: {crop: cells (K, 2)} of both, within near px."""
    hits = sum(matched(found[name], truth[name], near) for name in truth)
    counts = [sum(len(xy) for xy in cells.values()) for cells in (found, truth)]
    return *counts, 2 * hits / sum(counts)


def cells_of(found):
    """{crop: cells (K, 2) in px of its 224 px square} of the crops that are used."""
    crops = Crops(found, sorted(found.images))
    return {name: crops.cells(i) for i, name in enumerate(crops.owner)}


def nuclei_crops(folder, mpp=0.25, count=2):
    """Crops of 250 um with a nucleus at each of CENTRES."""
    for i in range(count):
        saved(folder / "crops" / f"{i}.png", array=discs(mpp, CENTRES, 250, 250))


@pytest.mark.parametrize("mpp, side", [(0.25, 1000), (0.5, 500)])
def test_the_detector_sees_a_crops_own_px(place, capsys, mpp, side):
    nuclei_crops(place / "c", mpp)
    found, failed = prepared("c", mpp)
    says = (f"{side:,} px crops at {mpp} um/px become 224 px at 1.116; to cut them into tiles put them in "
            "slides/")
    assert failed == [] and capsys.readouterr().out.count(says) == 1
    assert crop_mpp(found) == pytest.approx(250 / 224) and file_mpp(found, 250 / 224) == pytest.approx(mpp)
    for xy in cells_of(found).values():
        xy = xy[np.lexsort(np.round(xy, 1).T)]
        np.testing.assert_allclose(xy, CENTRES * 224 / 250, atol=0.05)


def test_crops_of_224_px_are_not_touched(place, capsys):
    saved(place / "c" / "crops" / "a.png", array=tissue(224))
    found, failed = prepared("c", 0.2525)
    assert failed == [] and crop_mpp(found) == 0.2525 and "become" not in capsys.readouterr().out
    detected = segment_nuclei(tissue(224), 0.2525).astype(np.float32)
    np.testing.assert_array_equal(cells_of(found)["a.png"], detected)


@pytest.mark.skipif(not NUCLEI.is_dir(), reason=f"needs {NUCLEI}, which is not in the repository")
def test_cells_of_real_crops_of_1000_px(place):
    truth = {}
    for path in sorted(NUCLEI.glob("monuseg_*.json"))[:3]:
        image = np.asarray(Image.open(path.with_suffix(".png")))
        saved(place / "c" / "crops" / f"{path.stem}.png", array=image)
        truth[f"{path.stem}.png"] = np.array(json.loads(path.read_text())["centroids"]) * 0.224
    found, failed = prepared("c", 0.25)
    number, true, f1 = shares(cells_of(found), truth, near=3 / crop_mpp(found))
    assert failed == [] and len(truth) == 3 and true == 1373
    assert number > 1300 and f1 >= 0.84  # a tenth of both where crops were squeezed first


# ---------------------------------------------------------------- what is recorded and printed

def test_train_and_eval_take_the_um_per_px_of_224_px(place, capsys):
    nuclei_crops(place / "c")
    flags = [*SMALL, "--data", "c", "--mpp", "0.25", "--method", "cellback"]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    density = 1e6 * len(CENTRES) / 250 ** 2
    assert f"{2 * len(CENTRES)} cells in 2 crops, {density:.0f} per mm2" in out
    run = place / "runs" / "c_vit_t4_cellback"
    assert load_tensors(run / "encoder.pt")["mpp"] == pytest.approx(250 / 224)
    assert json.loads((run / "config.json").read_text())["mpp"] == pytest.approx(250 / 224)
    assert train.main(flags) == 0  # the same run, which is finished
    for mpp in ([], ["--mpp", "0.25"]):
        capsys.readouterr()
        assert eval_py.main(["--data", "c", "--checkpoint", str(run), *mpp, *CPU]) == 0
        out = capsys.readouterr().out
        assert "drawn without P_c" not in out and "patches with a cell" in out


def test_the_baseline_takes_the_same_crops_without_their_cells(place, capsys, monkeypatch):
    nuclei_crops(place / "c")
    saved(place / "c" / "crops" / "other.png", array=tissue(448))
    write(place / "c" / "crops" / "broken.png", "x")
    monkeypatch.setattr(cache, "segment_nuclei", lambda *args: pytest.fail("cells are looked for"))
    assert train.main([*SMALL, "--data", "c", "--mpp", "0.25"]) == 1
    out = capsys.readouterr().out
    assert "other.png: is 448 px a side" in out and "broken.png: cannot be read" in out and "cells" not in out
    run = place / "runs" / "c_vit_t4_baseline"
    about = load_tensors(run / "encoder.pt")
    assert about["mpp"] == pytest.approx(250 / 224)
    assert set(about["trained_on"]["images"]) == {"0.png", "1.png"}
    for mpp in ([], ["--mpp", "0.25"]):
        assert eval_py.main(["--data", "c", "--checkpoint", str(run), *mpp, *CPU]) == 0
        out = capsys.readouterr().out
        assert "0 of 2 crops have cells" in out and "patches with a cell" not in out
    assert [path.name for path in (place / "datasets/c/cells").iterdir()] == ["crops_none.npz"]


def test_a_finer_um_per_px_than_any_slide_has_is_refused(place, capsys):
    nuclei_crops(place / "c", 5, 1)  # 50 px
    refused(capsys, train.main, [*SMALL, "--data", "c", "--mpp", "0.1"], "c: its crops at 224 px", "0.0223")


# ---------------------------------------------------------------- sides that differ, oblong crops

def test_crops_of_another_side_are_skipped_by_name(place, capsys):
    nuclei_crops(place / "c", 0.5)
    saved(place / "c" / "crops" / "other.png", array=tissue(448))
    for _ in range(2):
        found, failed = prepared("c", 0.5)
        assert len(failed) == 1 and "other.png: is 448 px a side" in failed[0] and "500" in failed[0]
        assert sorted(cells_of(found)) == ["0.png", "1.png"] and crop_mpp(found) == pytest.approx(250 / 224)
    assert data.main(["check", "--data", "c", "--mpp", "0.5", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "px a side: 500 (2), 448 (1)" in out and "500 px crops at 0.5 um/px become 224 px at 1.116" in out
    assert "warning: c/crops/other.png: is 448 px a side" in out and "warnings: 1" in out


def test_oblong_crops_are_skipped_by_name_and_never_distorted(place):
    nuclei_crops(place / "c", 0.5)
    saved(place / "c" / "crops" / "oblong.png", array=tissue(448)[:447])
    found, failed = prepared("c", 0.5)
    assert len(failed) == 1 and "oblong.png: is 448 x 447 px, and crops are square" in failed[0]
    assert "slides/" in failed[0] and sorted(cells_of(found)) == ["0.png", "1.png"]


def labelled(folder, oblong):
    """Forty labelled squares of 512 and one of 256 px, and one of a side more than the other."""
    rows = []
    for i in range(42):
        side = 256 if i == 0 else 512
        image = tissue(side, seed=i)[: side - (i == oblong)]
        saved(folder / f"{i}.png", array=image)
        rows.append(f"{i}.png,{'ab'[i % 2]},{'test' if i % 4 > 1 else 'train'}")
    write_table(folder / "labels.csv", "image,label,split", rows)


def test_oblong_patches_are_skipped_by_name_in_eval_and_in_the_probe(place, capsys):
    labelled(place / "p", oblong=5)
    flags = ["--encoder", "pixels", "--folds", "2", *CPU]
    assert eval_py.main(["patches", "--data", "p", *flags]) == 1
    out = capsys.readouterr().out
    assert "skipped: p/5.png: is 512 x 511 px, and crops are square" in out
    assert "warning: images of 256 px (1), 512 px (40) a side all become 224 px" in out
    assert train.main([*SMALL, "--probe", "p", "--probe-images", "21"]) == 0
    assert "skipped: p/5.png: is 512 x 511 px" in capsys.readouterr().out
    (images, labels), _, _ = read_probe("p", 100, 0)
    label_of = {load_crops([f"p/{i}.png"], 1)[0].numpy().tobytes(): i % 2 for i in range(42) if i != 5}
    assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_patches_of_512_px_are_resized_without_a_word(place, capsys):
    saved(place / "a.png", array=tissue(512))
    images, good, failed = load_crops([place / "gone.png", place / "a.png"], 1)
    whole = np.asarray(Image.fromarray(tissue(512)).resize((224, 224), Image.BICUBIC))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), whole) and good == [1] and len(failed) == 1
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- cells of their own, older files

def test_cells_of_crops_that_an_older_version_kept_are_recomputed(place):
    nuclei_crops(place / "c", 0.5)
    found, _ = prepared("c", 0.5)
    kept = place / "datasets" / "c" / "cells" / "crops_auto.npz"
    with np.load(kept) as file:
        older = {name: file[name] for name in file.files if name not in ("side", "grey")}
    np.savez(kept, **older | {"x": older["x"] + 50})
    assert prepare(found, 0.5, workers=1) == []
    assert cells_of(found)["0.png"].min() < 20


def test_cells_of_the_user_are_in_px_of_the_file(place):
    nuclei_crops(place / "c", 0.5)
    write(place / "c" / "cells" / "0.csv", "x,y\n250,125\n")
    found, _ = prepared("c", 0.5)
    assert cells_of(found)["0.png"].tolist() == [[112, 56]]
    assert find_data("c", mpp=0.5).mpp == 0.5
