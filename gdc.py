"""TCGA's diagnostic slides (A.1): labels.csv and a manifest from the GDC's list of files; a check of what was fetched.

The slides themselves are fetched by gdc-client (https://gdc.cancer.gov/access-data/gdc-data-transfer-tool), which goes
on where it stopped. It writes <id>/<file>, and <id>/<file>.partial while a file is unfinished.
"""
import csv
import hashlib
import json
import re
import shlex
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, InvalidURL
from itertools import zip_longest
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from errors import InputError, renamed

SERVER = "https://api.gdc.cancer.gov"
PROJECTS = {"lung": ["TCGA-LUAD", "TCGA-LUSC"], "brca": ["TCGA-BRCA"]}
CLASSES = {"lung": ["LUAD", "LUSC"], "brca": ["IDC", "ILC"]}
LABELS = {  # by the project, or by the primary diagnosis in ICD-O-3's words
    "lung": {"tcga-luad": "LUAD", "tcga-lusc": "LUSC"},
    "brca": {"infiltrating duct carcinoma, nos": "IDC", "lobular carcinoma, nos": "ILC",
             "infiltrating lobular carcinoma, nos": "ILC", "invasive lobular carcinoma": "ILC"}}
FIELDS = {  # of a file, and what they have to look like: these become names on the user's disk
    "file_id": r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", "file_name": r"[A-Za-z0-9]([\w-]|\.(?!\.))*\.svs",
    "md5sum": r"[0-9A-Fa-f]{32}", "file_size": r"[1-9][0-9]{0,14}", "state": r"\w+"}
CASE_FIELDS = ["cases.submitter_id", "cases.project.project_id", "cases.diagnoses.primary_diagnosis",
               "cases.diagnoses.diagnosis_is_primary_disease"]
PAGE, MOST = 500, 100_000  # files a page, and more than any list of slides has
TRIES, BUSY = 3, {429, 500, 502, 503, 504}


def add_arguments(parser):
    """The flags of `python data.py manifest`, beside --data and --root."""
    add = parser.add_argument
    add("--limit", type=int, help="so many slides, as many of each class, for a first try")
    add("--server", default=SERVER, help="address of the GDC's API, or of a mirror")
    add("--timeout", type=float, default=60.0, help="seconds to wait for an answer; more on a slow line")
    add("--force", action="store_true", help="write over a labels.csv that differs")


# ---------------------------------------------------------------- asking the GDC

def one_line(text):
    """What came from elsewhere, fit for the screen."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())[:120]


def ask(url, body, timeout, pause):
    """The answer to a POST of JSON, parsed. What may pass (no line, time-out, a busy server) is tried TRIES times."""
    for tried in range(TRIES):
        time.sleep(pause * tried)
        try:
            request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urlopen(request, timeout=timeout) as answer:
                return json.loads(answer.read())
        except (ValueError, InvalidURL, RecursionError) as error:
            raise InputError(f"{url}: no JSON comes from there ({one_line(error)}); is --server right?") from None
        except HTTPError as error:
            error.close()
            why = f"answers {error.code} {one_line(error.reason)}"
            if error.code not in BUSY:
                raise InputError(f"{url}: {why}; is --server right?") from None
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", error)
            why = (f"no answer in {timeout:g} s (--timeout)" if isinstance(why, TimeoutError)
                   else one_line(why) or type(why).__name__)
    raise InputError(f"{url}: {why}, {TRIES} times; try again later or give another --server")


def page(url, projects, start, timeout, pause):
    """The files from number start on, as the GDC describes them, and how many there are in all."""
    wanted = {"cases.project.project_id": projects, "data_format": ["SVS"], "access": ["open"],
              "experimental_strategy": ["Diagnostic Slide"]}
    filters = [{"op": "in", "content": {"field": field, "value": value}} for field, value in wanted.items()]
    answer = ask(url, {"filters": {"op": "and", "content": filters}, "fields": ",".join([*FIELDS, *CASE_FIELDS]),
                       "format": "JSON", "from": start, "size": PAGE, "sort": "file_id:asc"}, timeout, pause)
    try:
        hits, total = answer["data"]["hits"], answer["data"]["pagination"]["total"]
        if all(isinstance(hit, dict) for hit in hits) and total in range(MOST):
            return hits, total
    except (TypeError, KeyError):
        pass
    raise InputError(f"{url}: its answer has no data.hits and data.pagination.total as the GDC's; is --server right?")


def all_files(url, projects, timeout, pause):
    """Every page: the files by id, each once, and how many were listed again. From the start if the total changes
    midway: then the list is another one, and files may have moved from page to page."""
    for _ in range(TRIES):
        found, totals, start, total = {}, set(), 0, 1
        with tqdm(desc="files at the GDC", unit="", leave=False) as bar:
            while start < total:
                hits, total = page(url, projects, start, timeout, pause)
                before = len(found)
                found.update({str(hit.get("file_id") or number): hit for number, hit in enumerate(hits, start)})
                totals.add(total)
                start += len(hits)
                bar.total = total
                bar.update(len(hits))
                if len(found) == before and start < total:
                    raise InputError(f"{url}: speaks of {total} files and gives only {before}; try again later")
        if len(totals) == 1:
            return [found[key] for key in sorted(found)], start - len(found)
    raise InputError(f"{url}: the number of files changed while they were listed, {TRIES} times; try again later")


def read_hit(data, hit):
    """A file as the GDC describes it: (the slide as a dict, "") or (None, why it is left out)."""
    slide = {name: str(hit.get(name) or "") for name in FIELDS}
    for name, pattern in FIELDS.items():
        if not re.fullmatch(pattern, slide[name], re.ASCII):
            return None, f"{name} not usable" if slide[name] else f"no {name}"
    try:
        [case] = hit["cases"]
        project, patient, diagnoses = case["project"]["project_id"], case["submitter_id"], case.get("diagnoses") or []
        of_study = [d for d in diagnoses if str(d.get("diagnosis_is_primary_disease")).lower() == "true"]
        names = {d["primary_diagnosis"] for d in of_study or diagnoses if d.get("primary_diagnosis")}
        names = {project} if data == "lung" else names
        labels = {LABELS[data].get(name.lower()) for name in names}
    except (TypeError, KeyError, ValueError, AttributeError):
        return None, "cases not usable"
    if project not in PROJECTS[data] or not re.fullmatch(r"[\w-]+", str(patient), re.ASCII):
        return None, "project or patient not usable"
    if len(labels) != 1 or None in labels:
        return None, one_line(" + ".join(sorted(names))) or "no primary diagnosis"
    return {**slide, "slide": slide["file_name"][:-len(".svs")], "label": labels.pop(), "patient": patient}, ""


def usable(data, hits):
    """The slides among them, sorted by name, no name twice; and how many were left out, by reason."""
    found, left_out = {}, Counter()
    for slide, why in (read_hit(data, hit) for hit in hits):
        if slide is None or slide["slide"] in found:
            left_out[why or "file_name of another slide"] += 1
        else:
            found[slide["slide"]] = slide
    return [found[name] for name in sorted(found)], left_out


# ---------------------------------------------------------------- labels.csv and manifest.tsv

def manifest(data, root="datasets", limit=None, server=SERVER, timeout=60.0, force=False, pause=2.0):
    """Asks for the slides of "lung" or "brca", writes <root>/<data>/labels.csv and manifest.tsv, says what is in them.

    limit: so many slides. timeout, pause: seconds to wait for an answer, and before the second try. force: write over
    a labels.csv that differs. Gives the slides, a dict each.
    """
    for good, flag in ((data in PROJECTS, f"--data {data}: the GDC has {' and '.join(PROJECTS)} for this paper"),
                       (limit is None or limit >= 2, f"--limit {limit}: two at least, a slide of each class"),
                       (0 < timeout <= 3600, f"--timeout {timeout:g}: seconds, above 0 and up to 3600"),
                       (re.fullmatch(r"https?://[!-~]+", server), f"--server {one_line(server)}: say it like {SERVER}")):
        if not good:
            raise InputError(flag)
    url, folder = f"{server.rstrip('/')}/files", Path(root) / data
    hits, again = all_files(url, PROJECTS[data], timeout, pause)
    slides, left_out = usable(data, hits)
    left_out = [f"{count} x {why}" for why, count in (left_out + Counter({"listed twice": again})).most_common(50)]
    classes = {label: [slide for slide in slides if slide["label"] == label] for label in CLASSES[data]}
    for label in classes:
        if not classes[label]:
            raise InputError(f"{url}: no slide of {label} among {len(hits)} files (left out: "
                             f"{', '.join(left_out[:3]) or 'none'}); is --server right?")
    turns = [slide for turn in zip_longest(*classes.values()) for slide in turn if slide]  # one of each class, and again
    chosen = sorted(turns[:limit], key=lambda slide: slide["slide"])
    write(folder, chosen, force)
    gib = sum(int(slide["file_size"]) for slide in chosen) / 2 ** 30
    listed, target = (shlex.quote(str(folder / name)) for name in ("manifest.tsv", "slides"))
    named = data if Path(root) == Path("datasets") else f"{shlex.quote(str(folder))} --mpp 2"  # A.1: 5x
    print(f"{len(hits)} diagnostic slides of {' and '.join(PROJECTS[data])} at {server}")
    for line in left_out:
        print(f"  left out: {line}")
    for label in classes:
        patients = [slide["patient"] for slide in chosen if slide["label"] == label]
        print(f"  {label}: {len(patients)} slides of {len(set(patients))} patients")
    print(f"  {gib:.1f} GiB in all" + (f", {len(chosen)} of {len(slides)} slides by --limit" if limit else ""))
    print(f"Wrote {folder / 'labels.csv'} and manifest.tsv. Next:\n  gdc-client download -m {listed} -d {target}\n"
          f"  python data.py check --data {named}\n  python train.py --data {named}")
    return chosen


def write(folder, slides, force):
    """labels.csv and manifest.tsv, and the empty slides/ that gdc-client wants to find; refuses other labels there."""
    table, rows = folder / "labels.csv", ["id\tfilename\tmd5\tsize\tstate\n"]
    rows += ["{file_id}\t{file_name}\t{md5sum}\t{file_size}\t{state}\n".format(**slide) for slide in slides]
    labels = ["slide,label,patient\n"] + ["{slide},{label},{patient}\n".format(**slide) for slide in slides]
    try:
        (folder / "slides").mkdir(parents=True, exist_ok=True)
        same = not table.exists() or table.read_bytes() == "".join(labels).encode()
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; mend that or give another --root") from None
    if not same and not force:
        raise InputError(f"{table}: differs from these {len(slides)} slides; rename it, or write over it with --force")
    for path, lines in ((folder / "manifest.tsv", rows), (table, labels)):
        with renamed(path) as temp:
            temp.write_bytes("".join(lines).encode())


# ---------------------------------------------------------------- what gdc-client has fetched

def unfinished(folder):
    """Names of the files under a folder whose download is unfinished (a .partial is there), sorted."""
    return sorted(path.name[:-len(".partial")] for path in Path(folder).rglob("*.partial") if path.is_file())


def file_status(path, size, md5):
    """"ok", or what is wrong with a file."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        if path.stat().st_size != size:
            return "size differs"
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "ok" if digest.hexdigest() == md5 else "md5 differs"


def md5_check(folder, manifest_path, workers=4):
    """[(filename, status), ...] in the manifest's order: ok, missing, unfinished, size differs, md5 differs, or cannot
    be read (why). Names are looked up among the files under the folder, <id>/<filename> first: none leads outside."""
    try:
        with open(manifest_path, encoding="utf-8-sig", newline="") as file:
            rows = [(row["id"], row["filename"], int(row["size"]), row["md5"].lower())
                    for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
        if not rows:
            raise ValueError("no row in it")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise InputError(f"{manifest_path}: cannot be read as id, filename, md5, size ({one_line(error)}); "
                         "python data.py manifest writes it") from None
    files = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        files.setdefault(path.name, path)
        files[path.parent.name, path.name] = path

    def check(row):
        file_id, name, size, md5 = row
        path, part = (files.get((file_id, n)) or files.get(n) for n in (name, f"{name}.partial"))
        return name, file_status(path, size, md5) if path else "unfinished" if part else "missing"

    pool = ThreadPoolExecutor(max(1, workers))  # threads will do: hashlib lets go of the interpreter
    try:
        with tqdm(desc="md5", total=sum(row[2] for row in rows), unit="B", unit_scale=True, leave=False) as bar:
            return [bar.update(row[2]) or result for row, result in zip(rows, pool.map(check, rows))]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for a thousand slides
