"""Tests of wsi/gdc.py against a small server of canned answers on loopback."""
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from common.errors import InputError
from common.files import read_csv
from wsi import gdc
from wsi.check import check_md5
from wsi.folders import not_read

DUCT, LOBE = "Infiltrating duct carcinoma, NOS", "Lobular carcinoma, NOS"
MIXED = "Infiltrating duct and lobular carcinoma"


def hit(number, project="TCGA-LUAD", diagnoses=(), **change):
    """A file as the GDC describes it; diagnoses: (name, is it the disease under study), ..."""
    patient = f"TCGA-{number:02d}-0001"
    named = [{"primary_diagnosis": name, "diagnosis_is_primary_disease": mark} for name, mark in diagnoses]
    case = {"submitter_id": patient, "project": {"project_id": project}, "diagnoses": named}
    return {"file_id": f"{number:08d}-0000-4000-8000-000000000000", "file_size": 1 << 30, "state": "released",
            "file_name": f"{patient}-01Z-00-DX1.ABCDEF-{number}.svs", "cases": [case],
            "md5sum": hashlib.md5(b"slide").hexdigest(), **change}


def lung(count):
    """Of three files, one is LUSC and two are LUAD."""
    return [hit(n, "TCGA-LUAD" if n % 3 else "TCGA-LUSC") for n in range(count)]


@pytest.fixture
def server(monkeypatch):
    """A server at gdc.URL; .answer(body) gives (status, JSON or bytes) and .asked lists (path, body)."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, body))
            status, content = self.server.answer(body)
            self.send_response(status, "Bad\x1b[31m" if status == 404 else None)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        log_message = lambda *args: None  # no log on stderr

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.asked = []
        monkeypatch.setattr(gdc, "URL", f"http://127.0.0.1:{http.server_port}/files")
        http.handle_error = lambda *args: None  # a client that no longer waits
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield http
        http.shutdown()


def page(hits, total):
    return 200, {"data": {"hits": hits, "pagination": {"total": total}}}


def run(server, hits, root, data="lung", size=500, **flags):
    """gdc.manifest with a server that has these hits and gives at most size of them at once."""
    server.answer = lambda body: page(hits[body["from"]: body["from"] + size], len(hits))
    return gdc.manifest(data, root, **flags)


def test_several_pages_make_labels_and_manifest(server, tmp_path, capsys):
    hits = lung(23)
    assert len(run(server, hits, tmp_path, size=5)) == 23
    assert sorted(p.name for p in (tmp_path / "lung").iterdir()) == ["labels.csv", "manifest.tsv", "slides"]
    labels = [["slide", "label", "patient"]]
    manifest = [["id", "filename", "md5", "size", "state"]]
    for n, one in enumerate(hits):
        labels.append([one["file_name"][:-4], "LUAD" if n % 3 else "LUSC", f"TCGA-{n:02d}-0001"])
        manifest.append([one["file_id"], one["file_name"], one["md5sum"], str(1 << 30), "released"])
    for name, expected in (("labels.csv", labels), ("manifest.tsv", manifest)):
        columns, rows = read_csv(tmp_path / "lung" / name)
        assert [columns] + [list(row.values()) for _, row in rows] == expected
    text = capsys.readouterr().out
    for words in ("LUAD: 15 slides of 15 patients", "LUSC: 8 slides", "23.0 GiB", "gdc-client download -m",
                  "data.py check --data", "train.py --data"):
        assert words in text


def test_what_is_asked(server, tmp_path):
    run(server, lung(6), tmp_path, size=4)
    (path, body), (_, second) = server.asked
    assert path == "/files" and body["from"] == 0 and second == {**body, "from": 4}
    wanted = {f["content"]["field"]: f["content"]["value"] for f in body["filters"]["content"]}
    assert wanted == {"cases.project.project_id": ["TCGA-LUAD", "TCGA-LUSC"], "data_format": ["SVS"],
                      "access": ["open"], "experimental_strategy": ["Diagnostic Slide"]}
    assert {"file_id", "md5sum", "cases.diagnoses.primary_diagnosis"} <= set(body["fields"].split(","))


def test_brca_is_labelled_by_the_diagnosis_under_study(server, tmp_path, capsys):
    kinds = [[(DUCT, None)], [(LOBE.upper(), None)], [(MIXED, None)], [(DUCT, None), (LOBE, None)],
             [(LOBE, "true"), (DUCT, False)], [(DUCT, True), ("Melanoma", False)], [], [(None, None)],
             [(DUCT, None), (DUCT, None)], [("Other\x1b[31m\u202ecarcinoma", None)]]
    slides = run(server, [hit(n, "TCGA-BRCA", kind) for n, kind in enumerate(kinds)], tmp_path, "brca")
    labels = {int(slide["file_id"][:8]): slide["label"] for slide in slides}
    assert labels == {0: "IDC", 1: "ILC", 4: "ILC", 5: "IDC", 8: "IDC"}
    text = capsys.readouterr().out
    hostile = "1 x Other\\x1b[31m\\u202ecarcinoma"
    for why in (f"1 x {MIXED}", f"1 x {DUCT} + {LOBE}", "2 x no primary diagnosis", hostile):
        assert f"skipped: {why}\n" in text


def test_limit_is_balanced_and_the_same_in_any_order(server, tmp_path):
    hits = lung(12)  # 8 LUAD, 4 LUSC
    for limit, luad, lusc in [(2, 1, 1), (5, 2, 2), (12, 6, 4), (99, 8, 4)]:
        slides = run(server, hits, tmp_path, limit=limit, force=True)
        assert slides == run(server, hits[::-1], tmp_path, limit=limit, size=5)
        labels = [slide["label"] for slide in slides]
        assert (labels.count("LUAD"), labels.count("LUSC")) == (luad, lusc)


def test_what_cannot_be_used_is_skipped_and_counted(server, tmp_path, capsys):
    names = ["../../etc/passwd.svs", "/etc/x.svs", "a..b.svs", "..\\x.svs", ".hidden.svs", "x.svs\n",
             "x\ty.svs", "x,y.svs", "x.svs.exe", "-rf.svs", "=cmd().svs", "sl\u00efde.svs", ["x.svs"], 7]
    bad_patient = {"project": {"project_id": "TCGA-LUAD"}, "submitter_id": "TCGA-1\n../x"}
    hits = lung(6) + [hit(20 + n, file_name=name) for n, name in enumerate(names)]
    hits += [hit(40, md5sum=None), hit(41, file_size=-1), hit(42, file_id="../x"), hit(43, "TCGA-KIRC"),
             hit(44, cases=hits[0]["cases"] * 2), hit(45, cases=[bad_patient])]
    assert len(run(server, hits, tmp_path)) == 6
    text = capsys.readouterr().out
    for why in ("14 x file_name", "1 x md5sum", "1 x file_size", "1 x file_id", "3 x project or patient"):
        assert f"skipped: {why} not usable\n" in text
    assert {p.name for p in tmp_path.rglob("*")} == {"lung", "slides", "labels.csv", "manifest.tsv"}


@pytest.mark.parametrize("answer, words", [
    ((404, b"<html>"), "HTTP Error 404: Bad\\x1b[31m"),
    ((200, b"<html>"), "JSONDecodeError"),
    (page(["x"], 1), "AttributeError"),
    (page([hit(1)], "many\x1b\n"), "TypeError"),
    (page(lung(4), 9), "4 files, 9 announced"),  # the same page twice
    (page([hit(1)], 1), "no slide of LUSC among 1 files")])
def test_other_answers_end_in_one_line(server, tmp_path, answer, words):
    server.answer = lambda body: answer
    with pytest.raises(InputError) as info:
        gdc.manifest("lung", tmp_path)
    text = str(info.value)
    assert text.startswith(f"{gdc.URL}: ") and words in text and "try again later" in text
    assert text.isprintable() and len(text) < 400 and not list(tmp_path.iterdir())


def test_no_answer_at_all(server, tmp_path, monkeypatch):
    server.answer = lambda body: time.sleep(0.3)
    monkeypatch.setattr(gdc, "TIMEOUT", 0.1)
    for url, why in ((gdc.URL, "timed out"), ("http://127.0.0.1:1/files", "refused")):
        monkeypatch.setattr(gdc, "URL", url)
        with pytest.raises(InputError, match=f"{url}.*{why}.*try again later"):
            gdc.manifest("lung", tmp_path)


def test_other_labels_are_not_written_over(server, tmp_path):
    labels = tmp_path / "lung/labels.csv"
    labels.parent.mkdir()
    labels.write_text("slide,label,patient,split\nmine,LUAD,p,train\n")
    with pytest.raises(InputError, match="labels.csv: differs .*--force"):
        run(server, lung(6), tmp_path)
    assert "mine" in labels.read_text() and len(list(labels.parent.iterdir())) == 1
    run(server, lung(6), tmp_path, force=True)
    run(server, lung(6), tmp_path)  # the same labels do not differ
    assert len(read_csv(labels)[1]) == 6


def test_what_was_fetched_is_compared_with_the_manifest(server, tmp_path):
    listed = run(server, lung(6), tmp_path)
    folder, names = tmp_path / "lung/slides", [slide["file_name"] for slide in listed]
    paths = [folder / slide["file_id"] / slide["file_name"] for slide in listed]
    paths[2] = paths[2].with_name(f"{names[2]}.partial")
    paths[3] = folder / names[3]  # moved out of its folder by the user
    paths[4] = tmp_path / names[4]  # not under slides/
    for path, content in zip(paths[:5], [b"slide", b"slid", b"sli", b"slide", b"slide"]):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    expected = ["ok", "md5 differs", "unfinished", "ok", "missing", "missing"]
    manifest = tmp_path / "lung/manifest.tsv"
    assert gdc.md5_check(folder, manifest) == list(zip(names, expected))
    assert not_read(folder.parent) == [f"{paths[2]}: unfinished; run gdc-client download again"]
    unreadable = gdc.file_status({"filename": "x.svs"}, {"x.svs": folder})
    assert unreadable == "cannot be read (Is a directory)"
    damaged, missing = gdc.md5_check(folder, manifest)[1][0], names[5]
    found = SimpleNamespace(source=folder.parent, absent={names[4].removesuffix(".svs"): {}})
    assert check_md5(found) == [  # what is unfinished or absent from labels.csv's rows is named elsewhere
        f"{manifest}: 1 of 6 files are missing ({missing}); run gdc-client download again",
        f"{damaged}: md5 differs; delete it and run gdc-client download again"]
    for text in ("", "id\tfilename\tmd5\n", "id,name,md5\na,b,c\n", "id\tfilename\tmd5\na\tb\n"):
        manifest.write_text(text)
        with pytest.raises(InputError, match="manifest.tsv: no rows"):
            gdc.md5_check(folder, manifest)
        assert check_md5(found)[0].startswith(f"{manifest}: no rows")
