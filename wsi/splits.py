"""Data sets with their split (A.1), made once by patient; and what an encoder was trained on."""
import numpy as np

from common.errors import InputError
from common.files import read_csv, write_csv
from wsi.folders import SPLITS, find_folder, first_of, patient_of, same_patients, tcga_patient
from wsi.slides import file_identity


def find_data(data, mpp=None, prior="auto", split_seed=0, root="datasets", slide_mpp=None):
    """The data set of a name or a folder with every label's split: a wsi.folders.Data.

    The split is labels.csv's; what that leaves open is in datasets/<name>/split.csv, made once by patient
    with split_seed. InputError in one line for what is missing or if a patient is in two splits.
    """
    found = find_folder(data, mpp, prior, root, slide_mpp)
    kept = complete_split(found.labels, found.kind, found.work / "split.csv", split_seed)
    found.absent |= {name: row for name, row in kept.items() if name not in found.labels}
    split_of = {}
    for name, row in found.labels.items():
        other = split_of.setdefault(row["patient"], row["split"])
        if other != row["split"]:
            raise InputError(
                f"{found.source}: patient {row['patient']!r} is in {other} and in {row['split']} ({name}); "
                f"keep a patient in one split, in labels.csv or {found.work}/split.csv")
    return found


def complete_split(labels, kind, path, seed):
    """Fills in the split that labels.csv leaves open, in place: all of it, or the validation part of slides.

    labels: {name: {"label", "patient", "split"}}. Names and patients in the split.csv at path stay where they
    are; new ones are drawn (draw_split) and added to it. The file may be edited. Returns its rows, {} if
    labels.csv leaves nothing open.
    """
    given, slides = {row["split"] for row in labels.values()}, kind == "slides"
    if "" in given:
        parts = ["test", "val"] if slides else ["test"]  # ready-cut crops are evaluated in folds
    elif given and "val" not in given and slides:
        parts = ["val"]
    else:
        return {}
    rows = read_split(path) if path.is_file() else {}
    undecided = {name: row for name, row in labels.items() if row["split"] in ("", "train")}
    names_of = same_patients((name, row["patient"]) for name, row in [*rows.items(), *labels.items()])
    kept = {}
    for row in rows.values():
        kept |= dict.fromkeys(names_of[row["patient"]], row["split"])
    kept |= {row["patient"]: rows[name]["split"] for name, row in undecided.items() if name in rows}
    split_of = draw_split(undecided, kept, parts, seed)
    for name, row in undecided.items():
        row["split"] = rows[name]["split"] if name in rows else split_of[row["patient"]]
    new = undecided.keys() - rows.keys()
    if new:
        rows |= {name: labels[name] for name in new}
        write_csv(path, [("name", "patient", "split")] + [
            (name, row["patient"], row["split"]) for name, row in sorted(rows.items())])
        print(f"Wrote {path}: the split of {len(new)} more {kind}, by patient; it may be edited.")
    return rows


def read_split(path):
    """{name: {"patient", "split"}} of a split.csv."""
    names, rows = read_csv(path)
    if not {"name", "patient", "split"} <= set(names):
        raise InputError(f"{path}: its first line has to name the columns name,patient,split")
    out = {}
    for line, row in rows:
        split, name = SPLITS.get(row.get("split", "").lower()), row["name"]
        if not split or name in out:
            raise InputError(f"{path}: line {line}: one of train, val, test is expected for {name!r}, once")
        out[name] = {"patient": row.get("patient") or patient_of(name), "split": split}
    return out


def draw_split(rows, kept, parts, seed):
    """{patient: split} of all patients in rows ({name: {"label", "patient"}}), by class and seeded.

    kept {patient: split} stay. Of each class a fifth of the patients goes to the first of parts, a fifth of
    the others to the second (at least one if there are two), the rest to train.
    """
    label_of, rng, out = {}, np.random.default_rng(seed), dict(kept)
    for name in sorted(rows):
        label_of.setdefault(rows[name]["patient"], rows[name]["label"])
    for label in sorted(set(label_of.values())):
        patients = sorted(patient for patient in label_of if label_of[patient] == label)
        undecided = [patient for patient in rng.permutation(patients).tolist() if patient not in out]
        left = len(patients)
        for part in parts:
            wanted = max(1, round(0.2 * left)) if left > 1 else 0
            there = sum(kept.get(patient) == part for patient in patients)
            for _ in range(min(wanted - there, len(undecided))):
                out[undecided.pop()] = part
            left -= wanted
        out |= dict.fromkeys(undecided, "train")
    return out


# ---------------------------------------------------------------- what an encoder has seen

def what_was_seen(found, names):
    """What an encoder that is trained on these images has seen, for encoder.pt: plain values."""
    hashes = {name: file_identity(found.images[name])["file_hash"] for name in names}
    names_of, rows, patients = found.names_of_patients(), found.labels | found.pretrain_only, set()
    for name in names:
        patient = rows[name]["patient"] if name in rows else patient_of(name)
        patients |= names_of.get(patient, {patient})
    return {"data": found.name, "images": hashes, "patients": sorted(patients)}


def check_unseen(found, names, seen, path):
    """InputError if the encoder at path was trained on one of these images or on one of their patients.

    seen: what_was_seen of its run. An image is the same if its name and file_hash are (its size, in an older
    encoder.pt); a patient's name counts within one data set, and everywhere for TCGA's. Also InputError if
    the encoder saw a slide of this data set whose patient nothing tells: it may be a test patient.
    """
    same_data, names_of = seen["data"] == found.name, found.names_of_patients()
    rows = found.absent | found.pretrain_only | found.labels
    patients = set(seen["patients"]) | {tcga_patient(name) for name in seen["images"]}
    if same_data:  # labels.csv may name more patients than when the encoder was trained
        patients |= {rows[name]["patient"] for name in seen["images"] if name in rows}
    else:
        patients = {patient for patient in patients if tcga_patient(patient)}
    leaks = []
    for name in names:
        identity = file_identity(found.images[name])
        same_image = seen["images"].get(name) in (identity["file_hash"], identity["file_bytes"])
        same_name = same_data and name in seen["images"]
        same_patient = patients & names_of[found.labels[name]["patient"]]
        if same_image or same_name or same_patient:
            leaks.append(name)
    if leaks:
        raise InputError(f"{path}: was trained on {len(leaks)} of these {len(names)} test images or their "
                         f"patients ({first_of(leaks)}); use another encoder, or pre-train again with this "
                         "split")
    unknown = [name for name in seen["images"] if name in seen["patients"] and name not in rows]
    if same_data and found.kind == "slides" and names and unknown:
        raise InputError(f"{path}: was trained on {len(unknown)} slides without a row in labels.csv "
                         f"({first_of(unknown)}), perhaps of test patients; add rows with their patient and "
                         "an empty label, or pre-train again")
