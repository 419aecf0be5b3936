"""What stands in the tiles of slides where that is known, as in the demo, and what a network makes of it."""
import numpy as np

from common.classify import nearest
from common.figures import plot_slide
from common.files import read_csv, read_npz
from common.metrics import area_under
from common.report import row_of
from wsi.cache import tile_info, tile_side
from wsi.slides import Slide


def read_truth(folder, name):
    """{(x, y): (kind, is it telling)} of a slide's tiles by their level-0 corner; {} if none is known."""
    path = folder / "truth" / f"{name}_tiles.csv"
    if not path.is_file():
        return {}
    return {(int(row["x"]), int(row["y"])): (row["kind"], row["telling"] == "1")
            for _, row in read_csv(path)[1]}


def tiles_of(found, run, name):
    """A slide's features (N, d), and of each tile its kind and whether it is telling."""
    kept, truth = read_npz(run / "features" / f"{name}.npz"), read_truth(found.source, name)
    kinds, telling = zip(*(truth[tuple(corner)] for corner in kept["coords"].tolist()))
    return kept["features"], np.array(kinds), np.array(telling)


def check_with_truth(found, run, names, attention):
    """Rows of the table where the truth of the tiles is known (the demo); [] elsewhere.

    20 nearest neighbours among the training slides' tiles name the kind of each test slide's tile; DSMIL's
    attention is to find the telling tiles of a slide that has both sorts: the mean of these slides' AUC.
    """
    if not read_truth(found.source, names[0]):
        return []
    train, test = ([tiles_of(found, run, name) for name in found.split(part) if name in names]
                   for part in ("train", "test"))
    (x, kinds, _), (queries, truth, _) = (map(np.concatenate, zip(*part)) for part in (train, test))
    names, labels = np.unique(kinds, return_inverse=True)
    said = names[nearest(x, labels, queries, len(names)).argmax(1)]
    rows = [("kind of a tile, 20-NN", f"{(said == truth).mean():.4f}", "", f"{len(truth)} test tiles")]
    mixed = [(telling, attention[name]) for name, (_, _, telling) in zip(attention, test)
             if telling.any() and not telling.all()]
    if mixed:
        areas = np.mean([[area_under(telling, one) for one in repeats] for telling, repeats in mixed], 0)
        rows.append(row_of("telling tiles by DSMIL's attention, AUC", areas,
                           f"{len(mixed)} positive test slides, {len(areas)} seeds"))
    return rows


def draw_slide(found, folder, attention, path):
    """A test slide with DSMIL's attention over it, of each network, and the truth where it is known.

    attention: {network: {test slide: (repeats, N)}}. The slide is the first that has telling tiles, else the
    first of the last class.
    """
    names = list(next(iter(attention.values())))
    truth = {name: read_truth(found.source, name) for name in names}
    told = [name for name in names if any(telling for _, telling in truth[name].values())]
    last = [name for name in names if found.labels[name]["label"] == found.classes[-1]]
    name = (told or last)[0]
    info = tile_info(found, name)
    slide = Slide(found.images[name], said_mpp=info["slide_mpp"])
    picture, unit = slide.picture(max(info["width"], info["height"]) * slide.mpp / 900)
    corners = read_npz(folder / "features" / f"{name}.npz", "coords")["coords"]
    kinds = [truth[name][tuple(corner)] for corner in corners.tolist()] if truth[name] else None
    plot_slide(picture, corners / unit, tile_side(info) / unit,
               {title: slides[name].mean(0) for title, slides in attention.items()}, kinds,
               f"{name}, {found.labels[name]['label']}", path)
