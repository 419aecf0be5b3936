"""Files that are complete or absent: atomic writing, tensors without pickled code, CSV."""
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from common.errors import InputError


def part_of(path):
    """A temporary name beside path, of this process; removes what killed processes of this machine left."""
    host = f"{zlib.crc32(platform.node().encode()):08x}"  # short: names of files may have 255 bytes
    for left in path.parent.glob(f".{glob.escape(path.name)}.{host}-*.part"):
        number = left.name.removesuffix(".part").rsplit("-", 1)[1]
        if number.isdigit() and not is_alive(int(number)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{host}-{os.getpid()}.part")


def is_alive(process):
    """Is there a process of this number on this machine?"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


@contextmanager
def atomic_write(path):
    """Gives a temporary name beside path to write to; it takes path's name when the block ends without error.

    The name holds the process number, as two runs may prepare the same slide.
    """
    path = Path(path)
    temp = part_of(path)
    try:
        temp.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        os.replace(temp, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); "
                         "make room or run where you may write") from None
    finally:
        with suppress(OSError):
            temp.unlink()


def files_under(folder):
    """Yields the files under a folder. Linked folders are followed, each folder once; hidden names (macOS
    writes ._*) are left out.
    """
    visited = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(at, name)
            if not name.startswith(".") and path.is_file():
                yield path


def save_tensors(path, state):
    """Writes a dict of tensors and plain values, which load_tensors reads."""
    with atomic_write(path) as temp, open(temp, "wb") as file:  # an open file: a full disk is then an OSError
        torch.save(state, file)


def load_tensors(path, allowed=()):
    """A file of tensors and plain values, on the CPU; InputError for anything else, and no code is run.

    allowed: classes that the file may hold besides; building one must run no code.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise InputError(f"{path}: {why_not_loaded(path, error)}") from None


def why_not_loaded(path, error):
    """Why torch.load failed with this error, and what to do."""
    path = Path(path)
    if not path.is_file():
        return "is missing, or is no file"
    with suppress(OSError), open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            return "is a Git LFS pointer: run git lfs pull, which fetches the file itself"
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        return (f"holds a Python object ({foreign[1]}), which is not loaded, as it may run code; save the "
                "state dict alone, or take another copy")
    return f"cannot be loaded ({type(error).__name__}); delete it or take another copy"


def file_stamp(path):
    """The first 16 hex digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def stamp_of(value):
    """The first 16 hex digits of the SHA-256 of a plain value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path, value):
    with atomic_write(path) as temp:
        temp.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path):
    """A JSON object; {} if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_npz(path, *names):
    """{name: array} of an npz; None if the file, or one of the names in it, is not there or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error):
        return None


def is_gzip(path):
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_bytes(path):
    """Opens a file to read its bytes; those of a gzip file are inflated."""
    return gzip.open(path) if is_gzip(path) else open(path, "rb")


def read_csv(path, only=None):
    """A CSV file as ([column, ...], [(line number, {column: value}), ...]).

    Commas, semicolons or tabs; with or without a BOM. Columns are lower-cased, values stripped, blank lines
    skipped. only: the columns to keep, to save memory. InputError, with the line, for anything else.
    """
    rows = []
    try:
        with io.TextIOWrapper(open_bytes(path), "utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=head.count))
            names = [name.strip().lower() for name in next(reader, [])]
            kept = [(i, name) for i, name in enumerate(names) if only is None or name in only]
            for row in reader:
                if any(row[len(names):]):
                    raise InputError(f"{path}: line {reader.line_num} has {len(row)} fields, the first line "
                                     f"{len(names)}; put quotes around a field that holds the delimiter")
                if any(row):
                    values = {name: row[i].strip() for i, name in kept if i < len(row)}
                    rows.append((reader.line_num, values))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, csv.Error, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error}); save it as UTF-8") from None
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise InputError(f"{path}: two columns are named {twice[0]}; rename one")
    return names, rows


def write_csv(path, rows):
    """Writes rows (lists), the column names first."""
    with atomic_write(path) as temp, open(temp, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def merge_csv(path, keys, rows):
    """Writes rows (dicts) to a CSV; its rows that differ from all of these in a value of keys are kept."""
    new, old = {tuple(row[key] for key in keys) for row in rows}, []
    if path.is_file():
        with open(path, encoding="utf-8", newline="") as file:
            old = [row for row in csv.DictReader(file) if tuple(row.get(key) for key in keys) not in new]
    columns = list(dict.fromkeys(name for row in old + rows for name in row))
    write_csv(path, [columns, *([row.get(name, "") for name in columns] for row in old + rows)])


def print_table(rows):
    """Prints rows of texts in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
