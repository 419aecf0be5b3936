"""Which files of a folder are slides, which are not read, and how a replaced file is noticed."""
import gzip
import platform
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image
from synthetic import prepared, refused, saved, tissue, write, write_table

import data
import train
from common.errors import InputError
from common.files import files_under, stamp
from common.networks import features_stamp
from wsi import folders, gdc, segment, splits
from wsi.cache import ready_cells, tile_info, tiles_folder
from wsi.folders import find_folder
from wsi.headers import dicom_series
from wsi.slides import file_identity, sample_hash
from wsi.splits import find_data

NETWORK = SimpleNamespace(stamp="the encoder's stamp")
CHECK = ["check", "--data", "in", "--slide-mpp", "1", "--workers", "1"]


def vms(folder, name="s"):
    """Writes a Hamamatsu VMS: two JPEGs of 384 x 512 px at 0.5 um/px; one file has the slide's stem."""
    image = Image.fromarray(tissue(768)[:512])
    images = {f"{name}.jpg": image.crop((0, 0, 384, 512)), f"{name}(1,0).jpg": image.crop((384, 0, 768, 512)),
              f"{name}_map2.jpg": image.reduce(8), f"{name}_macro.jpg": image.reduce(8)}
    for file, pixels in images.items():
        saved(folder / file, array=np.asarray(pixels), restart_marker_blocks=4, subsampling=0)
    write(folder / f"{name}.vms", "\r\n".join([
        "[Virtual Microscope Specimen]", "NoLayers=1", "NoJpegColumns=2", "NoJpegRows=1",
        f"ImageFile={name}.jpg", f"ImageFile(1,0)={name}(1,0).jpg", f"MapFile={name}_map2.jpg",
        f"MacroImage={name}_macro.jpg", "SourceLens=20", "PhysicalWidth=384000", "PhysicalHeight=256000"]))


def dicom(path, series, explicit=True):
    """The header of a DICOM file of a series that refers to another series in a sequence before its own."""
    def element(group, number, text):
        value = text.encode() + b"\0" * (len(text) % 2)
        size = b"UI" + struct.pack("<H", len(value)) if explicit else struct.pack("<I", len(value))
        return struct.pack("<HH", group, number) + size + value
    item = element(0x20, 0xe, "1.2.3.999")
    item = struct.pack("<HHI", 0xfffe, 0xe000, len(item)) + item
    sequence = struct.pack("<HH", 8, 0x1115) + (b"SQ\0\0" if explicit else b"") + struct.pack("<I", len(item))
    uids = element(0x20, 0xd, "1.2.3.4") + element(0x20, 0xe, series)
    write(path, b"\0" * 128 + b"DICM" + sequence + item + uids + struct.pack("<HH", 0x20, 0x10))


def tiled(path):
    """A whole slide in any file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, tissue(), tile=(128, 128), photometric="rgb")


# ---------------------------------------------------------------- which files are slides

def test_a_hamamatsu_vms_is_one_slide_and_its_parts_are_none(place, capsys):
    vms(place / "in" / "slides")
    found, failed = prepared(mpp=0.5, slide_mpp=0.5)
    assert sorted(found.images) == ["good", "s"] and failed == []
    assert (tile_info(found, "s")["slide_mpp"], tile_info(found, "s")["tiles"]) == (0.5, 6)
    assert folders.not_read(found.source) == []
    (place / "in" / "slides" / "s_map2.jpg").unlink()  # openslide refuses it now: this slide alone is lost
    (place / "datasets" / "in" / "crops" / "0.5um" / "s.json").unlink()
    found, failed = prepared(mpp=0.5, slide_mpp=0.5)
    assert sorted(found.images) == ["good", "s"]
    assert len(failed) == 1 and "s.vms: cannot be opened" in failed[0]


@pytest.mark.parametrize("explicit", [True, False])
def test_two_dicom_series_in_a_folder_are_refused_by_name(tmp_path, explicit):
    folder = tmp_path / "slides" / "p1"
    dicom(folder / "0.dcm", "1.2.3.5", explicit)
    dicom(folder / "1.dcm", "1.2.3.5", explicit)
    assert dicom_series(folder / "0.dcm") == b"1.2.3.5"
    assert list(find_folder(str(tmp_path)).images) == ["p1"]
    dicom(folder / "2.dcm", "1.2.3.55", explicit)
    with pytest.raises(InputError, match="2.dcm: belongs to another DICOM series than 0.dcm; put each"):
        find_folder(str(tmp_path))
    dicom(tmp_path / "slides" / "p2" / "2.dcm", "1.2.3.55", explicit)
    (folder / "2.dcm").unlink()
    assert sorted(find_folder(str(tmp_path)).images) == ["p1", "p2"]


def test_linked_folders_are_followed_once(place):
    saved(place / "elsewhere" / "deep" / "linked.png")
    folder = place / "in" / "slides"
    (folder / "link").symlink_to(place / "elsewhere")
    (folder / "again").symlink_to(place / "elsewhere")
    (folder / "up").symlink_to(folder)
    (place / "elsewhere" / "back").symlink_to(place / "elsewhere")
    assert sorted(find_folder("in").images) == ["good", "linked"]
    saved(place / "c" / "real" / "a.png")
    (place / "c" / "crops").mkdir()
    (place / "c" / "crops" / "link").symlink_to(place / "c" / "real")
    assert list(find_folder("c").images) == ["link/a.png"]


def test_hidden_files_are_ignored_everywhere(place, capsys):
    for path in ("in/slides/._good.png", "in/slides/._b.svs", "in/slides/._c.vsi", "in/slides/.Trash/e.png",
                 "in/more/._d.svs", "in/cells/._good.json", "c/crops/._a.png", "in/slides/._f.svs.partial"):
        write(place / path, b"\0\5\x16\7")
    saved(place / "c" / "crops" / "a.png")
    found, failed = prepared()
    assert list(found.images) == ["good"] and failed == []
    assert data.main(CHECK) == 0 and "look at" not in capsys.readouterr().out
    assert list(find_folder("c").images) == ["a.png"]
    saved(place / "flat" / "a.png")
    write(place / "flat" / "._a.vsi", b"\0\5\x16\7")
    assert list(find_folder("flat").images) == ["a"] and folders.not_read(place / "flat") == []
    assert [path.name for path in files_under(place / "c")] == ["a.png"]
    write_table(place / "in" / "manifest.tsv", "filename\tmd5", ["._b.svs\t0"])
    assert gdc.md5_check(place / "in" / "slides", place / "in" / "manifest.tsv") == [("._b.svs", "missing")]


@pytest.mark.parametrize("ending", [".qptiff", ".btf", ".QPTIFF"])
def test_every_ending_of_a_tiled_tiff_is_read(place, ending):
    tiled(place / "in" / "slides" / f"more{ending}")
    found, failed = prepared()
    assert failed == [] and sorted(found.images) == ["good", "more"]


# ---------------------------------------------------------------- files that are not read

UNREAD = ("a.vsi", "b.isyntax", "c.svs.gz", "d.zip", "e.nd2", "f.lif", "g.bmp", "h.jp2", "i.lsm", "j.SDPC")


def test_check_names_every_file_that_looks_like_a_slide_and_is_not_read(place, capsys):
    folder = place / "in" / "slides"
    for name in UNREAD:
        write(folder / "sub" / name, gzip.compress(b"x"))
    tiled(folder / "k.sys")
    tiled(folder / "l")
    for name in ("Data0000.dat", "Slidedat.ini", "annotations.txt", "logs.parcel", "m.xml"):
        write(folder / "good" / name, "x")
    assert data.main(CHECK) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    for name in (*UNREAD, "k.sys", "l"):
        assert sum(f"/{name}: " in line for line in lines) == 1, name
    assert len(lines) == len(UNREAD) + 2
    _, failed = prepared()
    out = capsys.readouterr().out
    assert failed == [] and out.count("warning:") == 1 and "12 files or folders look like slides" in out


def test_check_names_them_where_nothing_is_read(place, capsys):
    for name in UNREAD[:3]:
        write(place / "x" / "slides" / name, "x")
    assert data.main(["check", "--data", "x"]) == 1
    out = capsys.readouterr().out
    assert all(out.count(f"/{name}: ") == 1 for name in UNREAD[:3]), out


def test_gdc_client_run_into_the_folder_costs_one_line(place, capsys):
    for k in range(30):
        write(place / "g" / f"uuid{k:02}" / f"slide{k}.svs", "x")
    refused(capsys, train.main, ["--data", "g", "--mpp", "1"],
            "no slides in it", "30 subfolders", "uuid00", "only g/slides/", "move them there")
    for k in range(30):
        write(place / "in" / f"uuid{k:02}" / f"slide{k}.svs", "x")
    saved(place / "in" / "figures" / "thumbnail.png")  # next to slides/, plain images are not slides
    prepared()
    assert capsys.readouterr().out.count("30 subfolders") == 1
    assert data.main(CHECK) == 1 and capsys.readouterr().out.count("uuid00") == 1


def test_slides_in_subfolders_of_a_folder_of_slides_are_named(tmp_path):
    saved(tmp_path / "a.png")
    saved(tmp_path / "more" / "b.png")
    assert list(find_folder(str(tmp_path)).images) == ["a"]
    assert len(folders.not_read(tmp_path)) == 1 and "(more)" in folders.not_read(tmp_path)[0]


# ---------------------------------------------------------------- one file or another

def core(path, seed):
    """An uncompressed image: each has the same size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, tissue(448, seed), photometric="rgb")


def test_a_second_cohort_of_the_same_names_and_sizes_gets_nothing_of_the_first(place, capsys):
    for k, site in enumerate(("one", "two")):
        for name in ("core1", "core2"):
            core(place / site / "cores" / "slides" / f"{name}.tif", 2 * k + (name == "core2"))
    paths = [place / site / "cores" / "slides" / "core1.tif" for site in ("one", "two")]
    assert paths[0].stat().st_size == paths[1].stat().st_size
    first, failed = prepared("one/cores")
    tiles = {path.name: path.read_bytes() for path in tiles_folder(first).rglob("*.jpg")}
    cells = ready_cells(first, "core1")
    features = features_stamp(NETWORK, tile_info(first, "core1"), False)
    for name in ("file_name", "file_hash", "pixels", "mpp", "slide_mpp", "tissue", "tiles"):
        assert features_stamp(NETWORK, tile_info(first, "core1") | {name: "x"}, False) != features
    record = splits.training_record(first, ["core1"])
    assert failed == [] and len(tiles) == 4
    (place / "one").rename(place / "elsewhere")  # else the second is refused
    second = find_data("two/cores", mpp=1.0, slide_mpp=1.0)
    assert tile_info(second, "core1") is None and ready_cells(second, "core1") is None
    second, failed = prepared("two/cores")
    assert failed == [] and "warning" not in capsys.readouterr().out
    assert tiles_folder(second) == tiles_folder(first)
    assert all(tiles[path.name] != path.read_bytes() for path in tiles_folder(second).rglob("*.jpg"))
    assert not np.array_equal(ready_cells(second, "core1"), cells)
    assert features_stamp(NETWORK, tile_info(second, "core1"), False) != features
    assert record != splits.training_record(second, ["core1"])


def test_a_stamp_changes_with_any_input_and_with_nothing_else():
    one = stamp(mpp=0.5, segmenter="builtin", version=1)
    assert one == stamp(version=1, segmenter="builtin", mpp=0.5) and len(one) == 16
    others = [stamp(mpp=0.25, segmenter="builtin", version=1), stamp(mpp=0.5, segmenter="builtin", version=2),
              stamp(mpp=0.5, segmenter="cells.json", version=1), stamp(mpp=0.5, segmenter="builtin")]
    assert len({one, *others}) == 5


def test_cells_are_segmented_again_where_the_detector_or_its_um_per_px_differ(tmp_path, monkeypatch):
    write(tmp_path / "a.png", b"x")
    stamps = [segment.source_of(tmp_path / "a.png", 0.25), segment.source_of(tmp_path / "a.png", 0.5),
              segment.source_of(tmp_path / "a.png", 0.25, mpp=1.0),
              segment.source_of(tmp_path / "a.png", 0.25, "cellpose")]
    monkeypatch.setattr(segment, "DETECTOR", segment.DETECTOR + 1)
    stamps.append(segment.source_of(tmp_path / "a.png", 0.25))
    assert len(set(stamps)) == 5


def test_tiles_without_a_hash_are_cut_again(place):
    found, _ = prepared()
    assert tile_info(found, "good")
    info = tiles_folder(found) / "good.json"
    info.write_text(info.read_text().replace('"file_hash"', '"other"'))
    assert tile_info(found, "good") is None


@pytest.mark.parametrize("at", [0, 100_000, 199_999])
def test_a_byte_at_the_start_middle_or_end_makes_another_file(tmp_path, at):
    whole = bytearray(200_000)
    write(tmp_path / "a", bytes(whole))
    whole[at] = 1
    write(tmp_path / "b" / "a", bytes(whole))
    one = file_identity(tmp_path / "a")
    other = file_identity(tmp_path / "b" / "a")
    assert one["file_bytes"] == other["file_bytes"] and one["file_hash"] != other["file_hash"]
    write(tmp_path / "a", bytes(whole))
    assert file_identity(tmp_path / "a") == other  # read again since it changed
    assert sample_hash(tmp_path / "gone", 1, 1) == ""


# ---------------------------------------------------------------- long names

def test_the_longest_name_is_written_on_a_machine_of_a_long_name(place, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "h" * 64)
    name = "\u00fc" * 100  # 200 bytes
    saved(place / "in" / "slides" / f"{name}.png")
    found, failed = prepared()
    assert failed == [] and ready_cells(found, name) is not None


def test_a_name_that_is_too_long_costs_its_slide(place, capsys):
    long = "x" * 246
    saved(place / "in" / "slides" / f"{long}.png")
    write(place / "in" / "cells" / "good.csv", "x,y\n10,10\n")
    found, failed = prepared()
    assert len(failed) == 1 and "more than 200 bytes; rename it" in failed[0]
    assert ready_cells(found, "good").tolist() == [[10, 10]]
    assert segment.main(["in/slides", "--slide-mpp", "1", "--workers", "1", "--out", "out"]) == 1
    assert "more than 200 bytes" in capsys.readouterr().err
    assert [path.name for path in (place / "out" / "builtin").iterdir()] == ["good.npz"]


def test_ready_cut_crops_of_long_names_are_used(place):
    long = "x" * 251 + ".png"
    saved(place / "c" / "crops" / long)
    saved(place / "c" / "crops" / "a.png")
    write(place / "c" / "cells" / "a.csv", "x,y\n10,10\n")
    found, failed = prepared("c")
    assert failed == [] and sorted(found.images) == ["a.png", long]
