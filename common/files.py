"""Atomic writing, tensors without pickled code, JSON, npz and CSV."""
import csv
import errno
import glob
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sys
import zlib
from argparse import Namespace
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from common.errors import DiskFull, InputError


def temp_path(path):
    """Returns this process's temporary name next to path.

    Removes the temporary files for the same path that killed processes of this machine left behind.
    """
    host = f"{zlib.crc32(platform.node().encode()):08x}"  # short, since file names are limited to 255 bytes
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{host}-*.part"):
        process = leftover.name.removesuffix(".part").rsplit("-", 1)[1]
        if not process.isdigit() or is_alive(int(process)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{host}-{os.getpid()}.part")


def is_alive(process):
    """Whether this machine runs this process; True on Windows, where os.kill(process, 0) would end it."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's process
    return True


def not_written(path, error):
    """Returns the InputError (DiskFull if it is) for an OSError while path was written."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
    why = os.strerror(error.errno) if error.errno else error  # tifffile's errors have no number
    return kind(f"{path}: cannot be written ({why}); free disk space, or run in a folder where you may write")


@contextmanager
def atomic_write(path):
    """Yields a temporary path; the file written to it is renamed to path if the block ends without an error.

    The temporary name holds the process number, since two runs may prepare the same slide. DiskFull, or
    another InputError, if the file cannot be written.
    """
    path = Path(path)
    temp = temp_path(path)
    try:
        temp.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        os.replace(temp, path)
    except OSError as error:
        raise not_written(path, error) from None
    finally:
        with suppress(OSError):
            temp.unlink()


def check_writable(folder):
    """InputError if a folder, or the first of its parents that exists, cannot be written."""
    path = Path(folder).resolve()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{folder}: cannot be written; change {existing}'s permissions, or name another")


def files_under(folder, strict=True):
    """Yields the files under a folder and in linked folders, each once; no hidden ones (macOS writes ._*).

    InputError for a subfolder that cannot be read; strict=False skips it, and yields broken links, too.
    """
    def refuse(error):
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); change its permissions")
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse if strict else None):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            listed = path.is_file() or not strict and path.is_symlink()
            if not name.startswith(".") and listed:
                yield path


def save_tensors(path, state):
    """Writes a dict of tensors and plain values, to be read by load_tensors."""
    with atomic_write(path) as temp, open(temp, "wb") as file:  # given a path, torch hides a full disk
        try:
            torch.save(state, file)
        except RuntimeError as error:  # raised while torch closes its archive after the file's own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_tensors(path):
    """Returns a file's tensors and plain values, on the CPU; InputError for others: no code of it runs."""
    try:
        with torch.serialization.safe_globals([Namespace]):  # DINO's flags, harmless to construct
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise InputError(f"{path}: {why_not_loaded(path, error)}") from None


def why_not_loaded(path, error):
    """Returns why torch.load failed with this error, and what to do about it."""
    path = Path(path)
    if not path.is_file():
        return "is missing, or not a file"
    with suppress(OSError), open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            return "is a Git LFS pointer: run git lfs pull to fetch the file itself"
    if path.suffix.lower() == ".safetensors":
        return ("is a safetensors file; convert it: torch.save(safetensors.torch.load_file(FILE), "
                "'weights.pt')")
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        return (f"holds a Python object ({foreign[1]}), which is not loaded because it may run code; save "
                "the state dict alone, or use another copy")
    return f"cannot be loaded ({type(error).__name__}); delete it or use another copy"


def stamp(**inputs):
    """Returns 16 hex digits of the SHA-256 of named inputs, by which a result of other inputs is recognised.

    inputs: plain values; for a file, its file_stamp or wsi.slides.file_identity.
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def file_stamp(path):
    """Returns the first 16 hex digits of the SHA-256 of a file's contents."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_json(path, value):
    """Writes a plain value as JSON."""
    with atomic_write(path) as temp:
        temp.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path):
    """Returns the JSON object in a file; {} if the file is missing or holds no JSON object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_npz(path, *names):
    """Returns {name: array} of an npz (all arrays by default), or None if one is missing or corrupt."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error):
        return None


def open_bytes(path):
    """Opens a file to read its bytes, decompressed if it is a gzip file."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if is_gzip else open(path, "rb")


def read_csv(path, only=None):
    """Returns a CSV file's contents as ([column, ...], [(line number, {column: value}), ...]).

    The delimiter is the comma, semicolon or tab; a BOM is ignored. Columns are lower-cased, values stripped
    and blank lines skipped. only: the columns to keep, to save memory. InputError for a file that cannot be
    read, a row with more fields than columns (with its line), or a column that appears twice.
    """
    rows = []
    try:
        with open_bytes(path) as file:
            if file.read(4) == b"PK\3\4":
                raise InputError(f"{path}: is an Excel workbook or a zip file; save it as CSV")
        with io.TextIOWrapper(open_bytes(path), "utf-8-sig", newline="") as file:
            head = file.readline()
            skipped = int(head.lower().startswith("sep="))  # Excel's line before the columns
            if skipped:
                head = file.readline()
            reader = csv.reader(chain([head], file), delimiter=max(",;\t", key=head.count))
            names = [name.strip().lower() for name in next(reader, [])]
            kept = [(i, name) for i, name in enumerate(names) if only is None or name in only]
            for row in reader:
                if any(row[len(names):]):
                    raise InputError(f"{path}: line {reader.line_num + skipped} has {len(row)} fields, the "
                                     f"first line {len(names)}; put quotes around a field that holds the "
                                     "delimiter")
                if any(row):
                    values = {name: row[i].strip() for i, name in kept if i < len(row)}
                    rows.append((reader.line_num + skipped, values))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, csv.Error, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error}); save it as UTF-8") from None
    repeated = [name for name in names if name and names.count(name) > 1]
    if repeated:
        raise InputError(f"{path}: two columns are named {repeated[0]}; rename one")
    return names, rows


def write_csv(path, rows):
    """Writes rows (lists of values) as CSV; the first row holds the column names."""
    with atomic_write(path) as temp, open(temp, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def read_rows(path):
    """Returns the rows of a CSV of ours as dicts; [] without it. Of columns with one name the last counts."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def merge_csv(path, keys, rows):
    """Writes rows (dicts) to a CSV file; a row of the file with the same values of keys is replaced."""
    def key_of(row):
        return tuple(row.get(key) for key in keys)
    replaced = set(map(key_of, rows))
    merged = [row for row in read_rows(path) if key_of(row) not in replaced] + rows
    columns = list(dict.fromkeys(name for row in merged for name in row))
    lines = [columns]
    for row in merged:
        lines.append([row.get(name, "") for name in columns])
    write_csv(path, lines)


def print_table(rows):
    """Prints rows of texts in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
