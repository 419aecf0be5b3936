"""TCGA's diagnostic slides (A.1): labels.csv and a manifest from the GDC's list, md5 of downloaded slides.

gdc-client (https://gdc.cancer.gov/access-data/gdc-data-transfer-tool) downloads the slides to <id>/<file>.
"""
import hashlib
import json
import re
import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from common.errors import InputError, one_line, printable
from common.files import atomic_write, files_under, read_csv, write_csv
from wsi.datasets import DATASETS

URL = "https://api.gdc.cancer.gov/files"
TIMEOUT = 60  # seconds to wait for an answer
PROJECTS = {"lung": ["TCGA-LUAD", "TCGA-LUSC"], "brca": ["TCGA-BRCA"]}
LABELS = {  # by project, or by primary diagnosis in ICD-O-3's words
    "lung": {"tcga-luad": "LUAD", "tcga-lusc": "LUSC"},
    "brca": {"infiltrating duct carcinoma, nos": "IDC", "lobular carcinoma, nos": "ILC",
             "infiltrating lobular carcinoma, nos": "ILC", "invasive lobular carcinoma": "ILC"}}
FIELDS = {  # of a file, and their patterns: they become names on the user's disk
    "file_id": r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "file_name": r"[A-Za-z0-9]([\w-]|\.(?!\.))*\.svs",
    "md5sum": r"[0-9A-Fa-f]{32}", "file_size": r"[1-9][0-9]{0,14}", "state": r"\w+"}
CASE_FIELDS = ["cases.submitter_id", "cases.project.project_id", "cases.diagnoses.primary_diagnosis",
               "cases.diagnoses.diagnosis_is_primary_disease"]
PAGE = 500  # files in an answer


def ask(question):
    """Returns the GDC's parsed answer to a question."""
    request = Request(URL, json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=TIMEOUT) as response:
        return json.load(response)


def all_slides(data):
    """Returns read_hit of all files that the GDC lists, sorted by name; InputError if any is missing."""
    wanted = {"cases.project.project_id": PROJECTS[data], "data_format": ["SVS"], "access": ["open"],
              "experimental_strategy": ["Diagnostic Slide"]}
    filters = [{"op": "in", "content": {"field": field, "value": value}} for field, value in wanted.items()]
    question = {"filters": {"op": "and", "content": filters}, "fields": ",".join([*FIELDS, *CASE_FIELDS]),
                "format": "JSON", "size": PAGE, "sort": "file_id:asc"}
    slides = {}
    total = 1
    try:
        while len(slides) < total:
            count = len(slides)
            page = ask({**question, "from": count})["data"]
            total = page["pagination"]["total"]
            for hit in page["hits"]:
                slides[str(hit["file_name"])] = read_hit(data, hit)
            if len(slides) == count:
                raise ValueError(f"{count} files, {total} announced")
    except Exception as error:  # urllib and json raise many kinds
        raise InputError(f"{URL}: no list of files ({one_line(error)}); try again later") from None
    return [slides[name] for name in sorted(slides)]


def read_hit(data, hit):
    """Returns a file of the GDC as (the slide, a dict of texts, "") or (None, why it is not used)."""
    slide = {name: str(hit.get(name) or "") for name in FIELDS}
    for name, pattern in FIELDS.items():
        if not re.fullmatch(pattern, slide[name], re.ASCII):
            return None, f"{name} not usable"
    case, *others = hit["cases"]
    project, patient = case["project"]["project_id"], case["submitter_id"]
    if others or project not in PROJECTS[data] or not re.fullmatch(r"[\w-]+", patient, re.ASCII):
        return None, "project or patient not usable"
    names = [project] if data == "lung" else diagnoses_of(case)
    labels = {LABELS[data].get(name.lower()) for name in names}
    if len(labels) != 1 or None in labels:
        return None, printable(" + ".join(names)) or "no primary diagnosis"
    return {**slide, "slide": Path(slide["file_name"]).stem, "label": labels.pop(), "patient": patient}, ""


def diagnoses_of(case):
    """Returns the primary diagnoses of the disease under study, or all if none is marked as such; sorted."""
    diagnoses = case.get("diagnoses") or []
    studied = [d for d in diagnoses if str(d.get("diagnosis_is_primary_disease")).lower() == "true"]
    return sorted({d["primary_diagnosis"] for d in studied or diagnoses if d.get("primary_diagnosis")})


def manifest(data, root="datasets", limit=None, force=False):
    """Asks the GDC for the slides of "lung" or "brca"; writes <root>/<data>/labels.csv and manifest.tsv.

    limit: at most that many slides, 2 or more, balanced over the classes. force: overwrites a labels.csv that
    differs. Prints what was found; returns the slides as dicts of texts. InputError where any of this fails.
    """
    folder = Path(root) / data
    classes = DATASETS[data].classes
    listed = all_slides(data)
    print(f"{len(listed)} diagnostic slides of {' and '.join(PROJECTS[data])} at {URL}")
    unusable = Counter(reason for slide, reason in listed if slide is None)
    for reason, count in unusable.most_common():
        print(f"skipped: {count} x {reason}")
    chosen = []
    for label in classes:
        slides = [slide for slide, _ in listed if slide and slide["label"] == label]
        if limit:
            slides = slides[:limit // len(classes)]
        if not slides:
            raise InputError(f"{URL}: no slide of {label} among {len(listed)} files; try again later")
        patients = {slide["patient"] for slide in slides}
        print(f"  {label}: {len(slides)} slides of {len(patients)} patients")
        chosen += slides
    chosen.sort(key=lambda slide: slide["slide"])
    gib = sum(int(slide["file_size"]) for slide in chosen) / 2 ** 30
    print(f"  {gib:.1f} GiB in all")
    write(folder, chosen, force)
    path = shlex.quote(str(folder))
    name = data if Path(root) == Path("datasets") else f"{path} --mpp {DATASETS[data].mpp:g}"
    print(f"Wrote {folder}/labels.csv and manifest.tsv. Next:\n"
          f"  gdc-client download -m {path}/manifest.tsv -d {path}/slides\n"
          f"  python data.py check --data {name}\n  python train.py --data {name}")
    return chosen


def write(folder, slides, force):
    """Writes labels.csv, manifest.tsv and an empty slides/; InputError if another labels.csv exists."""
    table = folder / "labels.csv"
    columns = ("slide", "label", "patient")
    labels = [dict(zip(columns, itemgetter(*columns)(slide))) for slide in slides]
    if table.exists() and not force and [row for _, row in read_csv(table)[1]] != labels:
        raise InputError(f"{table}: differs from these slides; rename it, or overwrite it with --force")
    lines = ["id\tfilename\tmd5\tsize\tstate\n"]
    for slide in slides:
        lines.append("\t".join(itemgetter(*FIELDS)(slide)) + "\n")
    with atomic_write(folder / "manifest.tsv") as temp:
        temp.write_text("".join(lines))
    write_csv(table, [columns, *(row.values() for row in labels)])
    (folder / "slides").mkdir(exist_ok=True)  # gdc-client expects it


def file_status(row, files):
    """Returns ok, missing, unfinished, md5 differs or cannot be read (why) of a row; files: {name: path}."""
    name = row["filename"]
    if name not in files:
        return "unfinished" if f"{name}.partial" in files else "missing"
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(files[name], "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "ok" if digest.hexdigest() == row["md5"].lower() else "md5 differs"


def md5_check(folder, manifest_path):
    """Returns [(filename, file_status), ...] in the manifest's order.

    Files are found by name under the folder. InputError if the manifest cannot be read or has no rows.
    """
    rows = [row for _, row in read_csv(manifest_path)[1]]
    if not rows or any("filename" not in row or "md5" not in row for row in rows):
        raise InputError(f"{manifest_path}: no rows of filename, md5; python data.py manifest writes it")
    files = {path.name: path for path in files_under(folder)}
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter's lock
        statuses = pool.map(lambda row: file_status(row, files), rows)
        bar = tqdm(statuses, "md5", len(rows), leave=False)
        return [(row["filename"], status) for row, status in zip(rows, bar)]
