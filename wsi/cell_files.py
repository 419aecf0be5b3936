"""Which file of cells/ holds the cells of an image: segmenters and QuPath name their results after it.

A file belongs to an image by its name: the slide's name with or without its file's ending, then one of
CELL_ENDINGS in any case. QuPath may append the name of the series: "CMU 1.svs - Series 0.geojson".
"""
import os
import re
from pathlib import Path, PurePosixPath

from common.errors import InputError
from wsi.cells import cell_format
from wsi.datasets import PRIORS
from wsi.slides import SLIDE_TYPES

CELL_ENDINGS = (  # the preferred first; cellpose always writes _seg.npy, a pickle, which is not read
    ".json", ".geojson", ".csv", ".tsv", ".json.gz", ".geojson.gz", ".csv.gz", ".tsv.gz", ".npz",
    "_cp_masks.png", "_cp_masks.tif", "_cp_masks.tiff", "_seg.npy")
ANY_TYPE = "|".join(map(re.escape, SLIDE_TYPES))
IMAGE_ENDING = re.compile(rf"(.+?)(?:{ANY_TYPE})(?: - .+)?", re.IGNORECASE)
SERIES = re.compile(r"(.+) - Series \d+")


def key_of(data, name):
    """Returns what an image's cells are named after: a slide's name, a crop's path without its ending."""
    return name if data.kind == "slides" else str(PurePosixPath(name).with_suffix(""))


def ending_of(file_name):
    """Returns the one of CELL_ENDINGS that the name of a file ends in, in any case, or None."""
    return next((ending for ending in CELL_ENDINGS if file_name.lower().endswith(ending)), None)


def image_names(base):
    """Returns the names of images that a file of cells may be named after, the most exact first.

    base: its name without the one of CELL_ENDINGS. a.ome.tif is "a" in QuPath and "a.ome" here.
    """
    out = [base]
    for pattern in (IMAGE_ENDING, SERIES):
        match = pattern.fullmatch(base)
        if match:
            out.append(match[1])
    return out + [f"{name}.ome" for name in out]


def files_by_name(folder, names, start=""):
    """Returns {name: its files of cells that are directly in folder, the preferred first}.

    A file belongs to the one image among names that it is most exactly named after. start: only files whose
    names begin with it.
    """
    ranked = {}
    file_names = os.listdir(folder) if folder.is_dir() else []
    for file_name in [name for name in file_names if name.startswith(start) and not name.startswith(".")]:
        ending = ending_of(file_name)
        if ending is None:
            continue
        possible = image_names(file_name[: -len(ending)])
        rank = next((rank for rank, name in enumerate(possible) if name in names), None)
        if rank is not None and os.path.isfile(folder / file_name):
            place = rank, CELL_ENDINGS.index(ending), file_name
            ranked.setdefault(possible[rank], []).append(place)
    return {name: [folder / place[-1] for place in sorted(places)] for name, places in ranked.items()}


def names_by_folder(data):
    """Returns {folder inside cells/: names of the images whose files of cells are in it}; "." for slides."""
    if data.kind == "slides":
        return {".": data.images}
    out = {}
    for name in data.images:
        key = PurePosixPath(key_of(data, name))
        out.setdefault(str(key.parent), set()).add(key.name)
    return out


def is_of_prior(path, prior):
    """Is this a file of cells by that segmenter?"""
    try:
        return cell_format(path) == prior
    except InputError:
        return False  # another file, of no use here


def candidates(data, only=None):
    """Returns {key_of an image: its files of cells in the first place that has any}.

    only: for this key alone. The places are cells/<prior>/, then cells/ for the files of that segmenter; with
    --prior auto they are cells/, then cells/builtin/. The user's folder comes before what was made here.
    """
    given, made = data.source / "cells", data.work / "cells"
    if data.prior == "auto":
        places = [given, given / "builtin", made / "builtin"]
    else:
        places = [given / data.prior, made / data.prior, given]
    folders, start = names_by_folder(data), ""
    if only is not None:
        parent = str(PurePosixPath(only).parent)
        folders = {parent: folders[parent]}
        start = PurePosixPath(only).name.removesuffix(".ome")
    out = {}
    for place in places:
        for folder, names in folders.items():
            for name, files in files_by_name(place / folder, names, start).items():
                if place == given and data.prior != "auto":
                    files = [path for path in files if is_of_prior(path, data.prior)]
                if files:
                    out.setdefault((PurePosixPath(folder) / name).as_posix(), files)
    return out


def cell_file(data, key):
    """Returns the file of cells of an image, by its key_of, or None."""
    files = candidates(data, key).get(key)
    return files[0] if files else None


def cell_files(data):
    """Returns {image: its file of cells, or None}."""
    found = candidates(data)
    return {name: found.get(key_of(data, name), [None])[0] for name in data.images}


# ---------------------------------------------------------------- files that are not read

def unmatched_files(data):
    """Returns the files of the user's cells/, and of cells/<prior>/, that are named after no image."""
    given = data.source / "cells"
    kept = {f"crops_{prior}.npz" for prior in PRIORS}  # where the user's folder is ours too
    folders, out = names_by_folder(data), []
    for place in [given] if data.prior in ("auto", "builtin") else [given, given / data.prior]:
        for folder, subfolders, file_names in os.walk(place):
            folder = Path(folder)
            if folder == given:
                subfolders[:] = [name for name in subfolders if name not in (*PRIORS, "level0")]
            names = folders.get(folder.relative_to(place).as_posix(), ())
            read = {path for files in files_by_name(folder, names).values() for path in files}
            out += [folder / name for name in file_names if not name.startswith(".") and name not in kept
                    and folder / name not in read]
    return sorted(out)


def first_three(texts):
    """Returns the first three texts, with dots where there are more."""
    return ", ".join(texts[:3]) + (", ..." if len(texts) > 3 else "")


def unused_cell_files(data):
    """Returns lines on files of cells/: on those that match no image, and on those beside a preferred one.

    _seg.npy is not named beside the masks that Cellpose writes with it.
    """
    lines, given = [], data.source / "cells"
    unmatched = [str(path.relative_to(given)) for path in unmatched_files(data)]
    if unmatched:
        image = data.kind.removesuffix("s")
        lines.append(f"{given}: files that match no {image} and are not read: {len(unmatched)} "
                     f"({first_three(unmatched)}); name each after its {image}, with one of the endings "
                     f"{' '.join(CELL_ENDINGS[:-1])}")
    doubled = []
    for files in candidates(data).values():
        others = [path.name for path in files[1:] if not path.name.lower().endswith("_seg.npy")]
        if others:
            doubled.append(f"{files[0].name}, not {' or '.join(others)}")
    if doubled:
        lines.append(f"{given}: {data.kind} with several files of cells: {len(doubled)}; what is read is "
                     f"{first_three(doubled)}; take the others out")
    return lines
