"""A look before hours of training: python data.py check --data NAME, and python data.py look SLIDE."""
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data as data_py
import gdc
import patches
import prior
from data import DATASETS, FOLDERS, SLIDE_TYPES
from errors import InputError, renamed
from slides import CROP, MASK_MPP, Slide, cut_tiles, tissue_mask

SLIDES_LAYOUT = "{0}/slides/ (in folders of their own too), {0}/labels.csv: slide,label[,patient][,split], {0}/cells/<slide>.*"
WHERE = {  # where a data set is to be had, and how it has to lie there
    "demo": ("made by python train.py; synthetic", SLIDES_LAYOUT),
    "lung": ("the GDC: python data.py manifest --data lung; LUAD, LUSC", SLIDES_LAYOUT),
    "brca": ("the GDC: python data.py manifest --data brca; IDC, ILC", SLIDES_LAYOUT),
    "paad": ("slides from the GDC (project TCGA-PAAD, diagnostic slides, portal.gdc.cancer.gov); basal or classical per "
             "patient is in the supplement of TCGA's PAAD paper (Raphael et al. 2017), to be written into labels.csv", SLIDES_LAYOUT),
    "bright": ("research.ibm.com/haifa/Workshops/BRIGHT, after registering; labels PB, UDH, FEA, ADH, DCIS, IC, split train "
               "or validation (the paper tests on the official validation part); for bright3 and bright6 alike", SLIDES_LAYOUT),
    "mhist": ("bmirds.github.io/MHIST, after registering", "{0}/images/*.png, {0}/annotations.csv as it comes"),
    "chaoyang": ("bupt-ai-cz.github.io/HSA-NRL, after registering", "{0}/train.json, {0}/test.json, images at the names in them"),
}


# ---------------------------------------------------------------- check

def slide_mpp_of(path, slide_mpp):
    """The property that says a slide's um/px, its um/px, and what is odd about it."""
    slide = Slide(path, slide_mpp)
    return slide.source, slide.mpp, slide.warning


def check(args):
    """Prints what lies there, what is missing and where to get it; gives the exit code: 1 where something is missing."""
    name = FOLDERS.get(args.data, args.data)
    folder = Path(args.root) / name if args.data in DATASETS or name in WHERE else Path(args.data)
    where, layout = WHERE.get(name, ("your own", SLIDES_LAYOUT + ", or crops/, or images with a labels.csv of image,label"))
    print(f"{args.data}: {where}\nexpected: {layout.format(folder)}")
    if not folder.is_dir():
        print(f"missing: {folder}/ is not there")
        return 1
    if name in patches.SETTINGS:
        return check_patches(args.data, args.root)
    problems = [f"{path}: unfinished; run gdc-client download again" for path in gdc.unfinished(folder / "slides")]
    try:
        found = data_py.find_data(args.data, args.mpp or 0.5, args.slide_mpp, args.seed, args.prior, args.root)
    except InputError as error:
        print("missing:", error)
        return 1
    print(f"{found.kind}: {len(found.images)}")
    if found.kind == "slides":
        sources, levels = Counter(), Counter()
        tasks = [(path, args.slide_mpp) for path in found.images.values()]
        for _, result, error in data_py.each(slide_mpp_of, tasks, args.workers, "slides"):
            if error:
                problems.append(error)
                continue
            sources[result[0]] += 1
            levels[f"{result[1]:.3g}"] += 1
            problems += [result[2]] if result[2] else []
        print("um/px recorded by:", ", ".join(f"{s} {n}" for s, n in sources.most_common()) or "none")
        print("um/px:", ", ".join(f"{s} ({n})" for s, n in levels.most_common(8)) or "none")
        made = sum(data_py.tile_info(found, name) is not None for name in found.images)
        print(f"tiles cut: {made} of {len(found.images)} slides")
    if found.labels:
        for part in ("train", "val", "test"):
            rows = [found.labels[name] for name in found.split(part)]
            counts = Counter(row["label"] for row in rows)
            print(f"{part}: {len(rows)} {found.kind} of {len({row['patient'] for row in rows})} patients or groups; "
                  + ", ".join(f"{label} {counts[label]}" for label in found.classes))
    else:
        print("no labels.csv: all is for pre-training")
    cells = Counter()
    for name in found.images:
        file = data_py.cell_file(found, name if found.kind == "slides" else str(Path(name).with_suffix("")))
        try:
            if file is None and found.prior not in ("auto", "builtin"):
                problems.append(f"{found.images[name]}: no cells of {found.prior}")
            cells["the built-in detector" if file and file.parent.name == "builtin" else prior.cell_format(file) if file else "none yet"] += 1
        except InputError as error:
            problems.append(str(error))
    print("cells:", ", ".join(f"{kind} {n}" for kind, n in cells.most_common()))
    if args.md5:
        problems += [f"{file}: {status}" for file, status in gdc.md5_check(folder / "slides", folder / "manifest.tsv") if status != "ok"]
    for line in problems:
        print("look at:", line)
    print(f"{len(problems)} to look at" if problems else "all is there")
    return 1 if problems else 0


def check_patches(data, root):
    """The same for a set of patches with an official test part."""
    try:
        rows, classes = patches.find_patches(data, root=root)
    except InputError as error:
        print("missing:", error)
        return 1
    for part in ("train", "test"):
        counts = Counter(classes[row["label"]] for row in rows if row["part"] == part)
        print(f"{part}: {sum(counts.values())} images; " + ", ".join(f"{label} {counts[label]}" for label in classes))
    print("all is there")
    return 0


# ---------------------------------------------------------------- look

def look(args):
    """Draws a slide, its tissue, its tiles and one tile with its cells and P_c, as training would get them."""
    path = Path(args.slide)
    if path.suffix.lower() not in SLIDE_TYPES:
        raise InputError(f"{path}: not a slide ({' '.join(sorted(SLIDE_TYPES))})")
    slide = Slide(path, args.slide_mpp)
    mpp = args.mpp or 2.0
    with tempfile.TemporaryDirectory() as folder:
        cut_tiles(path, Path(folder), mpp, args.slide_mpp, args.tissue)
        files = sorted((Path(folder) / path.stem).glob("*.jpg"))
        corners = np.array([[int(v) for v in file.stem.split("_")] for file in files])
        tiles = [Image.open(file).convert("RGB") for file in files[:: max(1, len(files) // 64)]]
        shown = corners[:: max(1, len(files) // 64)]
    side = CROP * mpp / slide.mpp  # level-0 px of a tile
    if args.cells:
        xy = prior.read_cells(args.cells, slide.mpp, (slide.width, slide.height))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for error in data_py.segment_all([(path, args.slide_mpp)], "builtin", Path(folder), args.workers).values():
                raise InputError(error)
            xy = prior.read_cells(Path(folder) / "builtin" / f"{path.stem}.npz")
    inside = [xy[((xy >= corner) & (xy < corner + side)).all(1)] for corner in corners]
    priors = torch.stack([prior.bin_centroids((cells - corner) * (CROP / side), CROP) for cells, corner in zip(inside, corners)])
    area = len(corners) * (CROP * mpp / 1000) ** 2  # mm2
    count, share = sum(map(len, inside)), priors.mean().item()
    print(f"{path}: {slide.width} x {slide.height} px, {slide.mpp:g} um/px by {slide.source}" + (f"; {slide.warning}" if slide.warning else ""))
    print(f"{len(corners)} tiles at {mpp:g} um/px with {args.tissue:.0%} tissue; {count} cells in them, {count / area:.0f} per mm2, "
          f"in {share:.1%} of the patches")
    out = Path(args.out or f"look_{path.stem}.png")
    best = int(np.argsort([len(cells) for cells in inside])[len(inside) * 3 // 4])  # a tile with many cells, not the most
    near = int(np.abs(shown - corners[best]).sum(1).argmin())
    best = int(np.abs(corners - shown[near]).sum(1).argmin())
    draw(slide, corners, side, tiles[near], (inside[best] - corners[best]) * (CROP / side), priors[best], out)
    print(f"Wrote {out}. If the tissue, the tiles or the cells are wrong, training learns from it: "
          "see --tissue, --mpp, --slide-mpp and --prior of train.py.")
    return 0


def draw(slide, corners, side, tile, cells, p_c, out):
    """Four pictures in one: slide, tissue mask, tile grid, a tile with its cells and P_c."""
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp * max(slide.width, slide.height) / 2000))
    figure = Figure(figsize=(13, 13 * min(1.6, max(0.5, picture.shape[0] / picture.shape[1])) * 0.95), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, image, title in zip(axes, (picture, tissue_mask(picture, unit * slide.mpp), picture, np.asarray(tile)), (
            f"{slide.path.name}", "tissue", f"{len(corners)} tiles", f"a tile: {len(cells)} cells, P_c in green")):
        axis.imshow(image, cmap="gray")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    axes[2].add_collection(PatchCollection([Rectangle(c / unit, side / unit, side / unit) for c in corners],
                                           facecolor="none", edgecolor="#00a040", linewidth=0.6))
    grid = int(len(p_c) ** 0.5)
    p = CROP / grid
    axes[3].add_collection(PatchCollection([Rectangle((i % grid * p - 0.5, i // grid * p - 0.5), p, p) for i in p_c.nonzero().flatten().tolist()],
                                           facecolor=(0, 0.8, 0.2, 0.15), edgecolor=(0, 0.6, 0.2, 0.5), linewidth=0.5))
    axes[3].plot(cells[:, 0] - 0.5, cells[:, 1] - 0.5, "+", color="#d00000", markersize=7)
    with renamed(out) as temp:
        figure.savefig(temp, format="png", dpi=100)
