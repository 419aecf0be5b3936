"""TCGA's diagnostic slides (A.1): labels.csv and a manifest from the GDC's list, md5 of what was fetched.

gdc-client (https://gdc.cancer.gov/access-data/gdc-data-transfer-tool) fetches the slides to <id>/<file>.
"""
import hashlib
import json
import re
import shlex
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from common.errors import InputError, one_line, printable
from common.files import atomic_write, files_under, read_csv, write_csv

SERVER = "https://api.gdc.cancer.gov"
PROJECTS = {"lung": ["TCGA-LUAD", "TCGA-LUSC"], "brca": ["TCGA-BRCA"]}
CLASSES = {"lung": ["LUAD", "LUSC"], "brca": ["IDC", "ILC"]}
LABELS = {  # by the project, or by the primary diagnosis in ICD-O-3's words
    "lung": {"tcga-luad": "LUAD", "tcga-lusc": "LUSC"},
    "brca": {"infiltrating duct carcinoma, nos": "IDC", "lobular carcinoma, nos": "ILC",
             "infiltrating lobular carcinoma, nos": "ILC", "invasive lobular carcinoma": "ILC"}}
FIELDS = {  # of a file, and what they have to look like: they become names on the user's disk
    "file_id": r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "file_name": r"[A-Za-z0-9]([\w-]|\.(?!\.))*\.svs",
    "md5sum": r"[0-9A-Fa-f]{32}", "file_size": r"[1-9][0-9]{0,14}", "state": r"\w+"}
CASE_FIELDS = ["cases.submitter_id", "cases.project.project_id", "cases.diagnoses.primary_diagnosis",
               "cases.diagnoses.diagnosis_is_primary_disease"]
PAGE, MOST = 500, 100_000  # files per page, and more than any list of slides has
MOST_BYTES = 1 << 26  # of an answer


def add_arguments(parser):
    """The flags of `python data.py manifest`, beside --data and --root."""
    parser.add_argument("--limit", type=int, help="at most so many slides, as many of each class")
    parser.add_argument("--server", default=SERVER, help="address of the GDC's API, or of a mirror")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for an answer")
    parser.add_argument("--force", action="store_true", help="write over a labels.csv that differs")


class NoRedirect(HTTPRedirectHandler):
    """Redirects are errors: the answer has to come from --server itself."""

    def redirect_request(self, *args):
        return None


def ask(url, question, timeout):
    """The answer to a POST of JSON, parsed; ValueError if it is too large or takes longer than timeout."""
    request = Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    began, answer = time.monotonic(), b""
    with build_opener(NoRedirect).open(request, timeout=timeout) as response:
        while block := response.read1(1 << 16):
            answer += block
            if len(answer) > MOST_BYTES or time.monotonic() - began > timeout:
                raise ValueError(f"more than {MOST_BYTES >> 20} MiB, or not whole after {timeout:g} s")
    return json.loads(answer)


def all_slides(data, url, timeout):
    """read_hit of all files the GDC lists, sorted by name; InputError for another answer or too few files."""
    wanted = {"cases.project.project_id": PROJECTS[data], "data_format": ["SVS"], "access": ["open"],
              "experimental_strategy": ["Diagnostic Slide"]}
    filters = [{"op": "in", "content": {"field": field, "value": value}} for field, value in wanted.items()]
    body = {"filters": {"op": "and", "content": filters}, "fields": ",".join([*FIELDS, *CASE_FIELDS]),
            "format": "JSON", "size": PAGE, "sort": "file_id:asc"}
    found, total = {}, 1
    try:
        while len(found) < total:
            before = len(found)
            page = ask(url, {**body, "from": before}, timeout)["data"]
            found.update((str(hit["file_name"]), read_hit(data, hit)) for hit in page["hits"])
            total = page["pagination"]["total"]
            if total not in range(MOST) or len(found) == before:
                raise ValueError(f"{len(found)} files, {total} announced")
    except Exception as error:  # urllib and json raise many kinds
        raise InputError(f"{url}: no list of files ({one_line(error)}); check --server, "
                         "raise --timeout or try again later") from None
    return [found[name] for name in sorted(found)]


def read_hit(data, hit):
    """A file as the GDC describes it: (the slide, a dict of texts, "") or (None, why it is left out)."""
    slide = {name: str(hit.get(name) or "") for name in FIELDS}
    for name, pattern in FIELDS.items():
        if not re.fullmatch(pattern, slide[name], re.ASCII):
            return None, f"{name} not usable"
    case, *others = hit["cases"]
    project, patient = case["project"]["project_id"], case["submitter_id"]
    if others or project not in PROJECTS[data] or not re.fullmatch(r"[\w-]+", patient, re.ASCII):
        return None, "project or patient not usable"
    diagnoses = case.get("diagnoses") or []
    studied = [d for d in diagnoses if str(d.get("diagnosis_is_primary_disease")).lower() == "true"]
    names = {d["primary_diagnosis"] for d in studied or diagnoses if d.get("primary_diagnosis")}
    if data == "lung":
        names = {project}
    labels = {LABELS[data].get(name.lower()) for name in names}
    if len(labels) != 1 or None in labels:
        return None, printable(" + ".join(sorted(names)))[:120] or "no primary diagnosis"
    return {**slide, "slide": Path(slide["file_name"]).stem, "label": labels.pop(), "patient": patient}, ""


def manifest(data, root="datasets", limit=None, server=SERVER, timeout=60.0, force=False):
    """Asks the GDC for the slides of "lung" or "brca"; writes <root>/<data>/labels.csv and manifest.tsv.

    limit: at most so many slides. timeout: seconds to wait for an answer. force: write over a labels.csv that
    differs. Prints what was found, gives the slides as dicts of texts. InputError where any of this fails.
    """
    if limit is not None and limit < 2:
        raise InputError(f"--limit {limit}: two at least, a slide of each class")
    url, folder = f"{server.rstrip('/')}/files", Path(root) / data
    listed = all_slides(data, url, timeout)
    print(f"{len(listed)} diagnostic slides of {' and '.join(PROJECTS[data])} at {server}")
    left_out = Counter(why for slide, why in listed if slide is None)
    for why, count in left_out.most_common():
        print(f"  left out: {count} x {why}")
    share = limit and limit // len(CLASSES[data])
    chosen = []
    for label in CLASSES[data]:
        found = [slide for slide, _ in listed if slide and slide["label"] == label][:share]
        if not found:
            raise InputError(f"{url}: no slide of {label} among {len(listed)} files; check --server")
        patients = {slide["patient"] for slide in found}
        print(f"  {label}: {len(found)} slides of {len(patients)} patients")
        chosen += found
    chosen.sort(key=lambda slide: slide["slide"])
    gib = sum(int(slide["file_size"]) for slide in chosen) / 2 ** 30
    print(f"  {gib:.1f} GiB in all")
    write(folder, chosen, force)
    place = shlex.quote(str(folder))
    named = data if Path(root) == Path("datasets") else f"{place} --mpp 2"  # A.1: 5x
    print(f"Wrote {folder}/labels.csv and manifest.tsv. Next:\n"
          f"  gdc-client download -m {place}/manifest.tsv -d {place}/slides\n"
          f"  python data.py check --data {named}\n  python train.py --data {named}")
    return chosen


def write(folder, slides, force):
    """Writes labels.csv, manifest.tsv, an empty slides/; InputError for a labels.csv that differs."""
    table = folder / "labels.csv"
    labels = [{name: slide[name] for name in ("slide", "label", "patient")} for slide in slides]
    if table.exists() and not force and [row for _, row in read_csv(table)[1]] != labels:
        raise InputError(f"{table}: differs from these slides; rename it, or write over it with --force")
    lines = ["id\tfilename\tmd5\tsize\tstate\n"]
    lines += ["\t".join(slide[name] for name in FIELDS) + "\n" for slide in slides]
    with atomic_write(folder / "manifest.tsv") as temp:
        temp.write_text("".join(lines))
    write_csv(table, [labels[0].keys(), *(row.values() for row in labels)])
    (folder / "slides").mkdir(exist_ok=True)  # gdc-client expects it


def unfinished(folder):
    """Names of the files under a folder whose download is unfinished (a .partial is there), sorted."""
    return sorted(path.stem for path in files_under(folder) if path.suffix == ".partial")


def file_status(row, files):
    """ok, missing, unfinished, md5 differs or cannot be read (why): a manifest's row; files: {name: path}."""
    name, digest = row["filename"], hashlib.md5(usedforsecurity=False)
    if name not in files:
        return "unfinished" if f"{name}.partial" in files else "missing"
    try:
        with open(files[name], "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "ok" if digest.hexdigest() == row["md5"].lower() else "md5 differs"


def md5_check(folder, manifest_path, workers=4):
    """[(filename, file_status), ...] in the manifest's order, read by so many threads.

    Files are found by name under the folder. InputError where the manifest cannot be read or has no rows.
    """
    rows = [row for _, row in read_csv(manifest_path)[1]]
    if not rows or any("filename" not in row or "md5" not in row for row in rows):
        raise InputError(f"{manifest_path}: no rows of filename, md5; python data.py manifest writes it")
    files = {path.name: path for path in files_under(folder)}
    with ThreadPoolExecutor(workers) as pool:  # hashlib releases the interpreter's lock
        statuses = pool.map(lambda row: file_status(row, files), rows)
        bar = tqdm(statuses, "md5", len(rows), leave=False)
        return [(row["filename"], status) for row, status in zip(rows, bar)]
