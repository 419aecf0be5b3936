"""Finds the file in cells/ that holds the cells of an image.

Segmenters and QuPath name their results after the image. A cell file is named after its image, with or
without the image file's ending, followed by one of CELL_ENDINGS in any case. QuPath may add the name of the
series: "CMU 1.svs - Series 0.geojson".
"""
import re
import unicodedata
from collections import Counter
from pathlib import PurePosixPath

from common.errors import first_of, printable
from common.files import files_under
from common.pool import call
from wsi.cells import cell_format
from wsi.datasets import NO_CELLS, PRIORS
from wsi.slides import SLIDE_TYPES

CELL_ENDINGS = (  # most preferred first; cellpose always writes _seg.npy, a pickle, which is not read
    ".json", ".geojson", ".csv", ".tsv", ".json.gz", ".geojson.gz", ".csv.gz", ".tsv.gz", ".npz", ".db",
    "_cp_masks.png", "_cp_masks.tif", "_cp_masks.tiff", "_seg.npy")
ANY_TYPE = "|".join(map(re.escape, SLIDE_TYPES))
IMAGE_ENDING = re.compile(rf"(.+?)(?:(?:{ANY_TYPE})(?: - [^/]+)?| - Series \d+)", re.IGNORECASE)


def key_of(data, name):
    """Returns what an image's cell files are named after: a slide's name, or a crop's path without ending."""
    return name if data.kind == "slides" else str(PurePosixPath(name).with_suffix(""))


def image_names(base):
    """Returns the names of images that a cell file may be named after, the most exact first.

    base: the file's name without its CELL_ENDINGS. a.ome.tif is "a" in QuPath and "a.ome" here.
    """
    names = [base]
    match = IMAGE_ENDING.fullmatch(base)
    if match:
        names.append(match[1])
    return names + [f"{name}.ome" for name in names]


def match_files(folder, keys):
    """Returns {key: its cell files under a folder, the preferred first}, and the files that match no key.

    keys: key_of images. A file belongs to the one image that it is most exactly named after; a broken link
    matches none.
    """
    keys = {unicodedata.normalize("NFC", key): key for key in keys}
    ranked = {}
    unmatched = []
    for path in files_under(folder, strict=False):
        name = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
        ending = next((ending for ending in CELL_ENDINGS if name.lower().endswith(ending)), None)
        possible = image_names(name[: -len(ending)]) if ending else []
        rank = next((rank for rank, name in enumerate(possible) if name in keys), None)
        if rank is None or not path.is_file():
            unmatched.append(path)
        else:
            ranked.setdefault(keys[possible[rank]], []).append((rank, CELL_ENDINGS.index(ending), path))
    return {key: [path for _, _, path in sorted(ranks)] for key, ranks in ranked.items()}, unmatched


def first_prior(data):
    """Returns the segmenter whose cells are looked for first, "" with --prior auto and no paper_prior."""
    return data.paper_prior if data.prior == "auto" else data.prior


def places_of(data):
    """Returns the folders to look for cell files in, best first, each with a segmenter or "" for any.

    They are cells/<prior>/, then the files of that segmenter in cells/. With --prior auto they are those of
    the paper's segmenter, if the data set has one, then cells/, then cells/builtin/. The user's folder comes
    before datasets/<name>/.
    """
    given = data.source / "cells"
    work = data.work / "cells"
    places = []
    prior = first_prior(data)
    if prior:
        places += [(given / prior, ""), (work / prior, ""), (given, prior)]
    if data.prior == "auto":
        places += [(given, ""), (given / "builtin", ""), (work / "builtin", "")]
    return places


def candidates(data):
    """Returns {key_of an image: its cell files in the first of places_of that has any}."""
    keys = [key_of(data, name) for name in data.images]
    found = {}
    for place, prior in places_of(data):
        matched, _ = match_files(place, keys)
        for key, files in matched.items():
            if prior:
                files = [path for path in files if call(cell_format, (path,))[0] == prior]
            if files:
                found.setdefault(key, files)
    return found


def cell_files(data):
    """Returns {image: its cell file, or None}."""
    found = {} if data.prior == NO_CELLS else candidates(data)
    return {name: found.get(key_of(data, name), [None])[0] for name in data.images}


def whose_cells(data):
    """Returns a line on how many images have their cells in which folder."""
    places = [place for place, _ in places_of(data)]
    counts = Counter()
    for file in cell_files(data).values():
        if file is None and data.prior not in ("auto", "builtin"):
            counts["missing"] += 1
        elif file is None or not builtin_folders(data).isdisjoint(file.parents):
            counts["by the built-in detector"] += 1
        else:
            counts[f"in {next(place for place in places if place in file.parents)}/"] += 1
    numbers = ", ".join(f"{number} {place}" for place, number in counts.items())
    return printable(f"cells of {len(data.images)} {data.kind} (--prior {data.prior}): {numbers}")


def builtin_folders(data):
    """Returns the folders of the built-in detector's cells: of wsi.segment, and ours."""
    return {folder / "cells" / "builtin" for folder in (data.source, data.work)}


def is_builtin(data, file):
    """Whether a file of cells was written by the built-in detector, here."""
    return file.parent == data.work / "cells" / "builtin"


# ---------------------------------------------------------------- files that are not read

def unmatched_files(data):
    """Returns the files in the user's cells/ and cells/<prior>/ that are not named after an image."""
    given = data.source / "cells"
    keys = [key_of(data, name) for name in data.images]
    # Other segmenters' files, and our own, which are found here if the user's folder is datasets/<name>.
    known = {*PRIORS, "level0", *(f"crops_{prior}.npz" for prior in (*PRIORS, NO_CELLS))}
    _, unmatched = match_files(given, keys)
    unmatched = [path for path in unmatched if path.relative_to(given).parts[0] not in known]
    if first_prior(data) not in ("", "builtin"):
        unmatched += match_files(given / first_prior(data), keys)[1]
    return sorted(unmatched)


def where_to_put(data, unmatched):
    """Returns advice on files of slides one folder too deep, as HoVer-Net and CellViT leave them, or ""."""
    if data.kind != "slides":
        return ""
    names = {name + ending for name in data.images for ending in CELL_ENDINGS}
    for file in map(PurePosixPath, unmatched):
        if file.name in names and file.parent.name not in ("", *PRIORS):
            return f"; move what is in {file.parent}/ to the folder above"
        if file.parent.name in data.images and file.suffix == ".geojson":
            return f"; rename {file} to {file.parent.name}{file.suffix}"
    return ""


def unused_cell_files(data):
    """Returns warnings on files in cells/ that match no image, or that another file is preferred to.

    _seg.npy is not listed next to the masks that Cellpose writes along with it.
    """
    warnings = []
    given = data.source / "cells"
    unmatched = [path.relative_to(given).as_posix() for path in unmatched_files(data)]
    if unmatched:
        image = data.kind.removesuffix("s")
        warnings.append(f"{given}: files that match no {image} and are not read: {len(unmatched)} "
                        f"({first_of(unmatched)}); name each after its {image}, with one of the endings "
                        f"{' '.join(CELL_ENDINGS[:-1])}{where_to_put(data, unmatched)}")
    found = candidates(data)
    has_own = any(builtin_folders(data).isdisjoint(files[0].parents) for files in found.values())
    for prior in PRIORS:
        is_read = prior in ("builtin", data.paper_prior)
        if data.prior == "auto" and not has_own and not is_read and (given / prior).is_dir():
            warnings.append(f"{given / prior}: is read only with --prior {prior}; without the flag the "
                            "built-in detector's cells are used")
    doubled = []
    for files in found.values():
        others = [path.name for path in files[1:] if not path.name.lower().endswith("_seg.npy")]
        if others:
            doubled.append(f"{files[0].name}, not {' or '.join(others)}")
    if doubled:
        warnings.append(f"{given}: {data.kind} with several cell files: {len(doubled)}; the "
                        f"first is read: {first_of(doubled)}; remove the others")
    return warnings
