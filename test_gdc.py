"""Tests of gdc.py against a small server of canned answers on loopback."""
import argparse
import csv
import hashlib
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data
import gdc
from errors import InputError

DUCT, LOBE, MIXED = "Infiltrating duct carcinoma, NOS", "Lobular carcinoma, NOS", "Infiltrating duct and lobular carcinoma"


def hit(number, project="TCGA-LUAD", diagnosis=DUCT, **change):
    """A file as the GDC describes it."""
    patient = f"TCGA-{number:02d}-0001"
    diagnoses = [{"primary_diagnosis": d} if isinstance(d, str) else d
                 for d in (diagnosis if isinstance(diagnosis, list) else [diagnosis])]
    case = {"submitter_id": patient, "project": {"project_id": project}, "diagnoses": diagnoses}
    out = {"file_id": f"{number:08d}-0000-4000-8000-000000000000", "md5sum": f"{number:032x}", "state": "released",
           "file_name": f"{patient}-01Z-00-DX1.ABCDEF-{number}.svs", "file_size": 1 << 30, "cases": [case], **change}
    return {name: value for name, value in out.items() if value is not None}


def lung(count):
    return [hit(n, "TCGA-LUAD" if n % 3 else "TCGA-LUSC") for n in range(count)]


@pytest.fixture
def server(monkeypatch):
    """serve(answer) -> address; answer(body, number of the call) gives (status, JSON or bytes). serve.asked: the bodies."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = []

    def serve(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                serve.asked.append((self.path, body))
                status, content = answer(body, len(serve.asked))
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content) + getattr(answer, "cut", 0)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client gave up waiting

            def log_message(self, *args):
                pass

        made.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=made[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{made[-1].server_port}"

    serve.asked = []
    yield serve
    for one in made:
        one.shutdown()
        one.server_close()


def paged(hits, size=500):
    """An answer that gives hits page by page, at most size at once."""
    def answer(body, call):
        part = hits[body["from"]: body["from"] + min(size, body["size"])]
        return 200, {"data": {"hits": part, "pagination": {"total": len(hits), "from": body["from"]}}, "warnings": {}}
    return answer


def run(address, tmp_path, data="lung", **kw):
    return gdc.manifest(data, **{"root": tmp_path, "server": address, "pause": 0.0, "timeout": 5.0, **kw})


def table(path, mark=","):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter=mark))


@contextmanager
def refuses(*words):
    """InputError of one line that has these words."""
    with pytest.raises(InputError) as info:
        yield
    text = str(info.value)
    assert "\n" not in text and len(text) < 500 and all(word in text for word in words), text


# ---------------------------------------------------------------- the list

def test_several_pages_make_labels_and_manifest(server, tmp_path, capsys):
    hits = lung(23)
    slides = run(server(paged(hits, 5)), tmp_path)
    assert len(slides) == 23 and [body["from"] for _, body in server.asked] == [0, 5, 10, 15, 20]
    labels, rows = table(tmp_path / "lung/labels.csv"), table(tmp_path / "lung/manifest.tsv", "\t")
    assert [list(labels[0]), list(rows[0])] == [["slide", "label", "patient"], ["id", "filename", "md5", "size", "state"]]
    by_name = {h["file_name"]: h for h in hits}
    assert [row["filename"] for row in rows] == sorted(by_name) == [row["slide"] + ".svs" for row in labels]
    for row, label in zip(rows, labels):
        one = by_name[row["filename"]]
        assert list(row.values()) == [one["file_id"], one["file_name"], one["md5sum"], str(1 << 30), "released"]
        assert label["patient"] == one["cases"][0]["submitter_id"]
        assert "TCGA-" + label["label"] == one["cases"][0]["project"]["project_id"]
    text = capsys.readouterr().out
    assert "LUAD: 15 slides of 15 patients" in text and "LUSC: 8 slides" in text and "23.0 GiB" in text
    assert "gdc-client download -m" in text and "data.py check --data" in text and "train.py --data" in text
    assert "left out" not in text and (tmp_path / "lung/slides").is_dir()
    assert sorted(p.name for p in (tmp_path / "lung").iterdir()) == ["labels.csv", "manifest.tsv", "slides"]


def test_what_is_asked(server, tmp_path):
    run(server(paged(lung(4))), tmp_path)
    [(path, body)] = server.asked
    assert path == "/files" and body["sort"] == "file_id:asc" and body["format"] == "JSON"
    wanted = {f["content"]["field"]: f["content"]["value"] for f in body["filters"]["content"]}
    assert body["filters"]["op"] == "and" and all(f["op"] == "in" for f in body["filters"]["content"])
    assert wanted == {"cases.project.project_id": ["TCGA-LUAD", "TCGA-LUSC"], "data_format": ["SVS"], "access": ["open"],
                      "experimental_strategy": ["Diagnostic Slide"]}
    assert {"file_id", "file_name", "md5sum", "file_size", "state", "cases.submitter_id", "cases.project.project_id",
            "cases.diagnoses.primary_diagnosis"} <= set(body["fields"].split(","))


def test_brca_by_primary_diagnosis_and_the_rest_counted_by_name(server, tmp_path, capsys):
    def of_study(name, yes):
        return {"primary_diagnosis": name, "diagnosis_is_primary_disease": yes}

    kinds = [DUCT, LOBE, MIXED, MIXED, "Lobular carcinoma in situ, NOS", [DUCT, LOBE],
             [of_study(LOBE, "true"), of_study(DUCT, False)],
             [of_study("Malignant melanoma, NOS", False), of_study(DUCT, True)],
             [], [{"primary_diagnosis": None}], [DUCT, DUCT], "INVASIVE LOBULAR CARCINOMA", "Other\x1b[31m\ncarcinoma"]
    hits = [hit(n, "TCGA-BRCA", kind) for n, kind in enumerate(kinds)] + [hit(50, "TCGA-LUAD")]
    slides = run(server(paged(hits)), tmp_path, "brca")
    labels = {int(slide["file_id"][:8]): slide["label"] for slide in slides}
    assert labels == {0: "IDC", 1: "ILC", 6: "ILC", 7: "IDC", 10: "IDC", 11: "ILC"}
    text = capsys.readouterr().out
    for line in (f"2 x {MIXED}", "1 x Lobular carcinoma in situ, NOS", f"1 x {DUCT} + {LOBE}", "2 x no primary diagnosis",
                 "1 x project or patient not usable", "1 x Other[31m carcinoma"):
        assert f"left out: {line}\n" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("limit, luad, lusc", [(2, 1, 1), (5, 3, 2), (12, 8, 4), (99, 8, 4)])
def test_limit_is_balanced_and_the_same_in_any_order(server, tmp_path, limit, luad, lusc):
    hits = lung(12)  # 8 LUAD, 4 LUSC
    one = run(server(paged(hits)), tmp_path / "a", limit=limit)
    two = run(server(paged(hits[::-1], 5)), tmp_path / "b", limit=limit)
    assert one == two and [s["slide"] for s in one] == sorted(s["slide"] for s in one)
    labels = [s["label"] for s in one]
    assert (labels.count("LUAD"), labels.count("LUSC")) == (luad, lusc)
    assert one[0]["slide"] == min(h["file_name"] for h in hits)[:-4]


def test_what_cannot_be_used_is_left_out_and_counted(server, tmp_path, capsys):
    names = ["../../etc/passwd.svs", "/etc/x.svs", "a/b.svs", "a..b.svs", "..\\x.svs", ".hidden.svs", "x.svs\n",
             "x\ty.svs", "x,y.svs", "x.svs.exe", "x.ndpi", "-rf.svs", "=cmd().svs", "sl\u00efde.svs", ["x.svs"], 7]
    hits = lung(6) + [hit(20 + n, file_name=name) for n, name in enumerate(names)]
    hits += [hit(40, md5sum=None), hit(41, file_size="big"), hit(42, file_id="../x"), hit(43, state=None),
             hit(44, cases=None), hit(45, cases=[]), hit(46, cases=lung(1)[0]["cases"] * 2), hit(47, cases="TCGA"),
             hit(48, file_size=-1), hit(49, cases=[{"project": "TCGA-LUAD", "submitter_id": "x"}]),
             hit(50, file_size=True), hit(51, file_id=None),
             hit(52, file_name=lung(1)[0]["file_name"]), hit(53, "TCGA-KIRC"), hit(54, cases=[None]),
             hit(55, cases=[{"project": {"project_id": "TCGA-LUAD"}, "submitter_id": "TCGA-1\n../x"}])]
    assert len(run(server(paged(hits)), tmp_path)) == 6
    text = capsys.readouterr().out
    for line in ("16 x file_name not usable", "6 x cases not usable", "3 x file_size not usable", "1 x no md5sum",
                 "1 x no state", "1 x file_id not usable", "1 x no file_id", "1 x file_name of another slide",
                 "2 x project or patient not usable"):
        assert f"left out: {line}\n" in text, line
    assert {p.name for p in tmp_path.rglob("*")} == {"lung", "slides", "labels.csv", "manifest.tsv"}


def test_files_listed_twice_count_once(server, tmp_path, capsys):
    hits = lung(6)
    assert len(run(server(paged(hits + hits[:2], 4)), tmp_path)) == 6
    assert "left out: 2 x listed twice" in capsys.readouterr().out


def test_a_total_that_changes_starts_the_list_again(server, tmp_path):
    old, new = lung(9), lung(10)

    def answer(body, call):
        return paged(old if call == 1 else new, 4)(body, call)
    assert len(run(server(answer), tmp_path)) == 10
    assert [body["from"] for _, body in server.asked] == [0, 4, 8, 0, 4, 8]


def test_a_total_that_never_settles(server, tmp_path):
    def answer(body, call):
        return paged(lung(8 + call % 2), 5)(body, call)
    with refuses("changed while they were listed", "try again later"):
        run(server(answer), tmp_path)


@pytest.mark.parametrize("same_page", [True, False])
def test_a_server_that_comes_no_further(server, tmp_path, same_page):
    def answer(body, call):
        return 200, {"data": {"hits": lung(4) if same_page or call == 1 else [], "pagination": {"total": 9}}}
    with refuses("speaks of 9 files and gives only 4"):
        run(server(answer), tmp_path)
    assert len(server.asked) == 2


# ---------------------------------------------------------------- servers that fail

@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, monkeypatch, status):
    pauses = []
    monkeypatch.setattr(gdc.time, "sleep", pauses.append)

    def answer(body, call):
        return paged(lung(4))(body, call) if call == 3 else (status, b"busy")
    assert len(run(server(answer), tmp_path, pause=2.0)) == 4
    assert pauses == [0, 2, 4]


def test_an_answer_that_breaks_off_is_asked_for_again(server, tmp_path):
    def answer(body, call):
        answer.cut = 10 if call == 1 else 0
        return paged(lung(4))(body, call)
    assert len(run(server(answer), tmp_path, timeout=0.3)) == 4 and len(server.asked) == 2


@pytest.mark.parametrize("status, content, calls, words", [
    (500, b"", 3, ["answers 500", "3 times", "--server"]),
    (404, b"<html>", 1, ["/files: answers 404 Not Found", "--server"]),
    (400, {"message": "bad"}, 1, ["answers 400"]),
    (307, b"", 1, ["answers 307"]),
    (200, b"{\"data\": {\"hits\": [", 1, ["no JSON", "--server"]),
    (200, b"<html>\n<p>down</p>", 1, ["no JSON"]),
    (200, b"\xff\xfe\x00", 1, ["no JSON"]),
    (200, b"[" * 100_000, 1, ["no JSON"]),
    (200, [], 1, ["data.hits", "--server"]),
    (200, {"data": []}, 1, ["data.hits"]),
    (200, {"data": {"hits": None, "pagination": {"total": 1}}}, 1, ["data.hits"]),
    (200, {"data": {"hits": [1, "x"], "pagination": {"total": 2}}}, 1, ["data.hits"]),
    (200, {"data": {"hits": [], "pagination": {"total": "many"}}}, 1, ["data.hits"]),
    (200, {"data": {"hits": [], "pagination": {"total": 10 ** 9}}}, 1, ["data.hits"]),
    (200, {"data": {"hits": [], "pagination": {"total": 3}}}, 1, ["speaks of 3 files"]),
    (200, {"data": {"hits": [], "pagination": {"total": 0}}}, 1, ["no slide of LUAD among 0"])])
def test_other_answers_end_in_one_line(server, tmp_path, status, content, calls, words):
    with refuses("127.0.0.1", *words):
        run(server(lambda body, call: (status, content)), tmp_path)
    assert len(server.asked) == calls and not list(tmp_path.iterdir())


def test_a_server_that_sleeps(server, tmp_path):
    def answer(body, call):
        time.sleep(0.4)
        return 200, {}
    with refuses("no answer in 0.05 s (--timeout)", "3 times"):
        run(server(answer), tmp_path, timeout=0.05)


def test_nobody_listens(server, tmp_path):
    address = server(paged([]))
    with refuses("refused", "3 times"):
        run(address.rsplit(":", 1)[0] + ":1", tmp_path)


@pytest.mark.parametrize("kw, words", [
    ({"server": "file:///etc/passwd"}, ["--server", "https://"]), ({"server": "api.gdc.cancer.gov"}, ["--server"]),
    ({"server": "http://x:port"}, ["x:port", "--server"]), ({"server": "http://[::1"}, ["--server"]),
    ({"server": "http://a\u00e9..b/\n"}, ["--server"]), ({"data": "paad"}, ["--data paad", "lung and brca"]),
    ({"limit": 1}, ["--limit 1"]), ({"limit": -5}, ["--limit"]), ({"timeout": 0}, ["--timeout"]),
    ({"timeout": float("nan")}, ["--timeout"]), ({"timeout": 1e30}, ["--timeout"])])
def test_flags_that_cannot_be(tmp_path, kw, words):
    with refuses(*words):
        run(kw.pop("server", "http://127.0.0.1:1"), tmp_path, **kw)


def test_the_flags_are_those_of_manifest(server, tmp_path):
    parser = argparse.ArgumentParser()
    gdc.add_arguments(parser)
    args = vars(parser.parse_args(["--server", server(paged(lung(6))), "--limit", "4"]))
    assert len(gdc.manifest("lung", tmp_path, **args)) == 4
    assert parser.parse_args([]).server == gdc.SERVER


# ---------------------------------------------------------------- what is there already

def test_other_labels_are_not_written_over(server, tmp_path):
    address, labels = server(paged(lung(6))), tmp_path / "lung/labels.csv"
    labels.parent.mkdir()
    labels.write_text("slide,label,patient,split\nmine,LUAD,p,train\n")
    with refuses(str(labels), "--force"):
        run(address, tmp_path)
    assert labels.read_text().startswith("slide,label,patient,split") and not (tmp_path / "lung/manifest.tsv").exists()
    run(address, tmp_path, force=True)
    assert len(table(labels)) == 6
    before = labels.read_bytes()
    run(address, tmp_path)  # the same labels are no quarrel
    assert labels.read_bytes() == before
    with refuses("--force"):
        run(address, tmp_path, limit=4)
    assert len(table(tmp_path / "lung/manifest.tsv", "\t")) == 6


def test_a_root_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with refuses("file", "--root"):
        run(server(paged(lung(6))), tmp_path / "file")


# ---------------------------------------------------------------- what was fetched

@pytest.fixture
def fetched(tmp_path):
    """slides/ as gdc-client leaves it, and its manifest."""
    slides, rows = tmp_path / "slides", []
    for n, kind in enumerate(["ok", "size", "md5", "partial", "missing", "elsewhere", "unreadable"]):
        folder, name, content = slides / f"id{n}", f"{kind}.svs", kind.encode() * 1000
        rows.append([f"id{n}", name, hashlib.md5(content).hexdigest().upper(), len(content), "released"])
        if kind != "missing":
            (folder / "logs").mkdir(parents=True)
            (folder / "logs" / f"{name}.parcel").write_text("state")
            (folder / "annotations.txt").write_text("id\n")
            name = name + ".partial" if kind == "partial" else name
            path = slides / name if kind == "elsewhere" else folder / name
            path.write_bytes(content[:-1] if kind == "size" else content[:-1] + b"?" if kind == "md5" else content)
    (slides / "id4").mkdir()
    (slides / "id4" / "ok.svs").write_bytes(b"another file of this name")
    (tmp_path / "outside.svs").write_bytes(b"x")
    rows.append(["..", "outside.svs", hashlib.md5(b"x").hexdigest(), 1, "released"])
    rows.append(["id0", "../../outside.svs", hashlib.md5(b"x").hexdigest(), 1, "released"])
    text = "\n".join("\t".join(map(str, row)) for row in [["id", "filename", "md5", "size", "state"]] + rows) + "\n"
    (tmp_path / "manifest.tsv").write_text(text)
    return tmp_path


def test_md5_check(fetched, monkeypatch):
    honest = open

    def broken(path, *args, **kw):
        if str(path).endswith("unreadable.svs"):
            raise OSError(5, "Input/output error")
        return honest(path, *args, **kw)
    monkeypatch.setattr("builtins.open", broken)
    result = gdc.md5_check(fetched / "slides", fetched / "manifest.tsv")
    assert result == [("ok.svs", "ok"), ("size.svs", "size differs"), ("md5.svs", "md5 differs"),
                      ("partial.svs", "unfinished"), ("missing.svs", "missing"), ("elsewhere.svs", "ok"),
                      ("unreadable.svs", "cannot be read (Input/output error)"),
                      ("outside.svs", "missing"), ("../../outside.svs", "missing")]


def test_unfinished_reads_nothing(fetched, monkeypatch):
    monkeypatch.setattr("builtins.open", None)
    assert gdc.unfinished(fetched / "slides") == ["partial.svs"]
    assert gdc.unfinished(fetched / "nowhere") == []


@pytest.mark.parametrize("text", [None, "", "id\tfilename\tmd5\tsize\tstate\n", "id,filename,md5,size\na,b,c,1\n",
                                  "id\tfilename\tmd5\tsize\na\tb\n",
                                  "id\tfilename\tmd5\tsize\na\tb\tc\tbig\n", b"\xff\x00"])
def test_a_manifest_that_cannot_be_read(tmp_path, text):
    path = tmp_path / "manifest.tsv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refuses(str(path), "data.py manifest"):
        gdc.md5_check(tmp_path, path)


def test_what_manifest_writes_the_others_read(server, tmp_path):
    content = b"slide"
    hits = [hit(n, gdc.PROJECTS["lung"][n % 2], file_size=5, md5sum=hashlib.md5(content).hexdigest()) for n in range(8)]
    for slide in run(server(paged(hits)), tmp_path):
        path = tmp_path / "lung/slides" / slide["file_id"] / slide["file_name"]
        path.parent.mkdir()
        path.write_bytes(content)
        (path.parent / "annotations.txt").write_text("id")
    result = gdc.md5_check(tmp_path / "lung/slides", tmp_path / "lung/manifest.tsv")
    assert len(result) == 8 and {status for _, status in result} == {"ok"}
    found = data.find_data("lung", root=tmp_path)
    assert found.classes == ["LUAD", "LUSC"] and len(found.images) == len(found.labels) == 8
    assert {row["patient"] for row in found.labels.values()} == {one["cases"][0]["submitter_id"] for one in hits}
