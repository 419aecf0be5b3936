"""No patient is in two splits: slides without a label or a row, TCGA names, an encoder's training data."""
import shutil

import pytest
from synthetic import slides_named, tcga, write, write_table

import data
from common.errors import InputError
from wsi import splits
from wsi.splits import find_data


def set_of(place, rows, more=(), header="slide,label,patient,split", split_seed=0):
    """The data set "s" of these rows, with a file for each of their slides and for more slides."""
    shutil.rmtree(place / "s", ignore_errors=True)
    slides_named(place / "s", [row.split(",")[0] for row in rows] + list(more))
    write_table(place / "s" / "labels.csv", header, rows)
    return find_data("s", split_seed=split_seed)


LABELLED = ["P001_A,A,P001,train", "P002_A,B,P002,test", "P003_A,B,P003,train", "P004_A,A,P004,test",
            "P005_A,A,P005,val"]


def test_a_slide_without_a_label_pre_trains_only_if_its_patient_is_known_and_not_tested(place, capsys):
    found = set_of(place, LABELLED, more=["P002_B", "P006_A"])  # slides of unknown patients
    assert found.unlabelled() == []
    out = capsys.readouterr().out
    assert "2 of 7 slides have no row and are not used" in out and "an empty label" in out
    only = ["P001_B,,P001,", "P002_B,,P002,", "P005_B,,P005,train", "P006_A,,P006,"]
    found = set_of(place, LABELLED + only)
    assert found.unlabelled() == ["P001_B", "P005_B", "P006_A"]
    assert "have no row" not in capsys.readouterr().out and len(found.labels) == 5
    assert data.main(["check", "--data", "s", "--mpp", "1", "--workers", "1"]) == 1  # no file is a real slide
    assert "without a label, for pre-training only: 3\n" in capsys.readouterr().out
    (place / "s" / "labels.csv").unlink()
    assert len(find_data("s").split("train")) == 9  # all is for pre-training


def test_a_test_slide_that_loses_its_label_and_changes_its_patient_stays_out_of_pre_training(place):
    rows = [f"{name}{i},{name},{name}{i}" for name in "AB" for i in range(8)]
    found = set_of(place, rows, header="slide,label,patient")
    name = found.split("test")[0]
    others = [row for row in rows if not row.startswith(name)]
    write_table(place / "s" / "labels.csv", "slide,label,patient", [*others, f"{name},,renamed"])
    assert find_data("s").unlabelled() == []  # split.csv still has it, under its first patient


def test_a_slide_for_pre_training_only_keeps_its_um_per_px(place):
    rows = ["a,A,p,0.5", "b,B,q,0.5", "c,,r,0.25"]
    assert set_of(place, rows, header="slide,label,patient,mpp").said_mpp("c") == 0.25


@pytest.mark.parametrize("patient", ["case 7", "zz", "TCGA-55-0007-01Z"])
def test_a_tcga_name_tells_the_patient_whatever_the_column_says(place, patient):
    frozen = ["TCGA-55-0007-01A-01-TS1", "TCGA-55-0008-01A-01-TS1", "TCGA-LUAD-other-1"]
    rows = [f"TCGA-55-0007-01Z-00-DX1,A,{patient},test", "TCGA-55-0008-01Z-00-DX1,B,case 8,train",
            "TCGA-55-0009-01Z-00-DX1,B,case 9,test", "TCGA-55-0010-01Z-00-DX1,A,case 10,train"]
    found = set_of(place, rows, more=frozen)
    assert found.unlabelled() == frozen[1:2]
    assert {row["patient"] for row in found.labels.values()} == {patient, "case 8", "case 9", "case 10"}


def test_a_test_slide_that_has_no_file_keeps_its_patient_out_of_pre_training(place):
    found = set_of(place, LABELLED + ["P001_B,,P001,", "P002_B,,P002,"])
    (place / "s" / "slides" / "P002_A.svs").unlink()
    write_table(place / "s" / "labels.csv", "slide,label,patient,split", LABELLED + [
        "P006_A,B,P006,test", "P002_B,,P002,"])
    slides_named(place / "s", ["P006_A"])
    found = find_data("s")
    assert "P002_A" not in found.labels and found.unlabelled() == []
    tcga(place / "s", range(20), slides_each=1)  # the split is drawn, and in split.csv
    tested = find_data("s").split("test")
    (place / "s" / "slides" / f"{tested[0]}.svs").unlink()
    frozen = [name.replace("DX0", "TS1") for name in tested]
    slides_named(place / "s", frozen)
    assert find_data("s").unlabelled() == []


def test_patients_who_share_a_tcga_name_are_one(place, capsys):
    """p1 and p2 share TCGA-55-0001, p2 and p3 are one by the column: one patient, who is in one split."""
    rows = ["TCGA-55-0001-01Z-00-DX1,A,p1", "TCGA-55-0001-01Z-00-DX2,A,p2", "TCGA-55-0002-01Z-00-DX1,A,p2"]
    rows += [f"s{i},{'AB'[i % 2]},q{i}" for i in range(20)]
    for seed in range(8):
        shutil.rmtree(place / "datasets", ignore_errors=True)
        set_of(place, rows, header="slide,label,patient")
        found = find_data("s", split_seed=seed)
        assert len({found.labels[row.split(",")[0]]["split"] for row in rows[:3]}) == 1
    assert "1 patients have several names" in (out := capsys.readouterr().out) and "p1 = p2" in out
    divided = [f"{row},{split}" for row, split in zip(rows[:3], ("train", "train", "test"))]
    with pytest.raises(InputError, match="patient 'p1' is in train and in test"):
        set_of(place, [*divided, "s1,B,q,train"])
    tested = [f"{row},test" for row in rows[:2]]
    found = set_of(place, [*tested, "TCGA-55-0002-01Z-00-DX1,,p2,", "s1,B,q,train", "s2,A,r,train"],
                   more=["TCGA-55-0002-01A-01-TS1"])
    assert found.unlabelled() == []


def test_new_slides_stay_with_their_patient_under_another_name(place):
    """split.csv knows the patient by a TCGA name, labels.csv now has a patient column."""
    tcga(place / "s", range(20), slides_each=1)
    before = {name: row["split"] for name, row in find_data("s").labels.items()}
    rows = [f"{name.replace('DX0', 'DX1')},{'AB'[int(name[8:12]) % 2]},case {name[8:12]}" for name in before]
    after = set_of(place, rows, header="slide,label,patient", split_seed=1).labels
    assert {name.replace("DX1", "DX0"): row["split"] for name, row in after.items()} == before


# ---------------------------------------------------------------- what an encoder was trained on

def test_an_encoder_that_saw_a_test_image_or_patient_is_refused(place):
    tcga(place / "s", range(20))
    found = find_data("s")
    trained_on = splits.training_record(found, found.split("train", "val"))
    test = found.split("test")
    splits.check_unseen(found, test, trained_on, "encoder.pt")
    leaking = splits.training_record(found, found.split("train") + test[:1])
    with pytest.raises(InputError, match=f"encoder.pt: was trained on 2 of these 8 test .*{test[0]}"):
        splits.check_unseen(found, test, leaking, "encoder.pt")  # the slide, and its patient's other one
    elsewhere = leaking | {"data": "another"}  # TCGA's patients are the same everywhere
    with pytest.raises(InputError, match="2 of these 8"):
        splits.check_unseen(found, test, elsewhere, "encoder.pt")
    rows = [f"s{i},{'AB'[i % 2]},p{i},{'test' if i < 2 else 'train'}" for i in range(6)]
    found = set_of(place, rows)
    content = found.content_of("s0")
    one = {"data": "another", "images": {"s0": content}, "patients": ["p0", "p1"]}
    for trained_on in (one, one | {"images": {"renamed": content}},
                       {"data": "s", "images": {"renamed": content}, "patients": []}):
        with pytest.raises(InputError, match=r"1 of these 2 .*\(s0\)"):
            splits.check_unseen(found, ["s0", "s1"], trained_on, "encoder.pt")
    other = one | {"images": {"s0": 2}}  # the same name, another file; a patient p1 of another data set
    splits.check_unseen(found, ["s0", "s1"], other, "encoder.pt")


def test_equal_crops_and_mirax_stubs_are_known_by_their_names_too(place, capsys):
    for name in ("a", "b", "c", "d"):
        write(place / "s" / f"{name}.png", b"glass" if name in "ab" else name.encode())
    write_table(place / "s" / "labels.csv", "image,label,split",
                ["a.png,A,train", "b.png,B,test", "c.png,B,train", "d.png,A,test"])
    found = find_data("s")
    trained_on = splits.training_record(found, ["a.png", "c.png"])
    splits.check_unseen(found, found.split("test"), trained_on, "encoder.pt")
    elsewhere = trained_on | {"data": "another"}
    splits.check_unseen(found, found.split("test"), elsewhere, "encoder.pt")
    elsewhere["images"] = {"crops/b.png": found.content_of("b.png")}
    with pytest.raises(InputError, match=r"1 of these 2 .*\(b.png\)"):
        splits.check_unseen(found, found.split("test"), elsewhere, "encoder.pt")
    assert splits.equal_in_two_splits(found, found.labels) == []
    for name in ("x", "y"):
        write(place / "m" / "slides" / f"{name}.mrxs", b"stub")
    write_table(place / "m" / "labels.csv", "slide,label,patient,split", ["x,A,p,train", "y,B,q,test"])
    found = find_data("m")
    splits.check_unseen(found, ["y"], splits.training_record(found, ["x"]), "encoder.pt")
    assert splits.equal_in_two_splits(found, found.labels) == []


def test_one_file_in_two_splits_is_named_before_training(place, capsys):
    found = set_of(place, LABELLED)
    shutil.copy(place / "s/slides/P001_A.svs", place / "s/slides/P002_A.svs")
    warning, = splits.equal_in_two_splits(found, found.labels)
    assert warning.startswith("s: 1 slides are in two splits under two names")
    assert warning.endswith("remove one of each: P001_A = P002_A")
    assert splits.equal_in_two_splits(found, ["P002_A", "P003_A"]) == []
    splits.warn_of_untestable(found)
    assert f"warning: {warning}\n" in capsys.readouterr().out


def test_an_encoder_that_saw_an_unlabelled_slide_of_a_test_patient_is_refused(place):
    """As earlier versions trained them: on every slide without a row."""
    only = ["P001_B,,P001,", "P002_B,,P002,"]
    trained_on = {"data": "s", "images": {"P001_A": 1, "P002_B": 1}, "patients": ["P001", "P002_B"]}
    found = set_of(place, LABELLED + only)
    with pytest.raises(InputError, match="trained on 1 of these 2 .*P002_A"):
        splits.check_unseen(found, found.split("test"), trained_on, "encoder.pt")
    good = splits.training_record(found, found.split("train", "val") + found.unlabelled())
    assert good["patients"] == ["P001", "P003", "P005"] and "P001_B" in good["images"]
    splits.check_unseen(found, found.split("test"), good, "encoder.pt")
    unknown = set_of(place, LABELLED, more=["P001_B", "P002_B"])
    with pytest.raises(InputError, match=r"1 slides without a row in labels.csv \(P002_B\).* empty label"):
        splits.check_unseen(unknown, unknown.split("test"), trained_on, "encoder.pt")


@pytest.mark.parametrize("trained_in", ["s", "elsewhere"])
def test_an_encoder_that_saw_a_frozen_slide_of_a_tcga_test_patient_is_refused(place, trained_in):
    rows = ["TCGA-55-0007-01Z-00-DX1,A,case 7,test", "TCGA-55-0008-01Z-00-DX1,B,case 8,train",
            "TCGA-55-0009-01Z-00-DX1,B,case 9,test", "TCGA-55-0010-01Z-00-DX1,A,case 10,train"]
    found = set_of(place, rows)
    for patients in (["TCGA-55-0007"], ["case 7 of another column"]):
        trained_on = {"data": trained_in, "images": {"TCGA-55-0007-01A-01-TS1": 1}, "patients": patients}
        with pytest.raises(InputError, match="trained on 1 of these 2 .*0007"):
            splits.check_unseen(found, found.split("test"), trained_on, "encoder.pt")
    trained_on["images"] = {"TCGA-55-0008-01A-01-TS1": 1}
    splits.check_unseen(found, found.split("test"), trained_on, "encoder.pt")
