"""The true kinds of tiles where they are known (the demo), and how well features and attention match them."""
import numpy as np

from common.classify import nearest
from common.figures import plot_slide
from common.files import read_csv, read_npz
from common.metrics import area_under
from common.report import row_of
from wsi.crops import picture_of


def read_truth(folder, name):
    """Returns {level-0 corner (x, y): (kind, whether it is telling)} of a slide's tiles; {} if unknown."""
    path = folder / "truth" / f"{name}_tiles.csv"
    if not path.is_file():
        return {}
    return {(int(row["x"]), int(row["y"])): (row["kind"], row["telling"] == "1")
            for _, row in read_csv(path)[1]}


def tiles_of(found, run, name):
    """Returns a slide's features (N, d), the kinds of its tiles (N,), and whether each is telling (N,)."""
    features = read_npz(run / "features" / f"{name}.npz")
    truth = read_truth(found.source, name)
    kinds, telling = zip(*(truth[tuple(corner)] for corner in features["coords"].tolist()))
    return features["features"], np.array(kinds), np.array(telling)


def check_with_truth(found, run, names, attention):
    """Returns rows of the results where the kinds of the tiles are known (the demo); [] elsewhere.

    Two rows: the accuracy of the kinds of test tiles by their 20 nearest neighbours among the training tiles,
    and the mean AUC with which DSMIL's attention finds the telling tiles of slides that also have others.
    attention: {test slide: (repeats, N)}.
    """
    if not read_truth(found.source, names[0]):
        return []
    train = [tiles_of(found, run, name) for name in found.split("train") if name in names]
    test = [tiles_of(found, run, name) for name in found.split("test") if name in names]
    features, kinds, _ = map(np.concatenate, zip(*train))
    queries, truth, _ = map(np.concatenate, zip(*test))
    kind_names, labels = np.unique(kinds, return_inverse=True)
    predicted = kind_names[nearest(features, labels, queries, len(kind_names)).argmax(1)]
    rows = [("kind of a tile, 20-NN", f"{(predicted == truth).mean():.4f}", "", f"{len(truth)} test tiles")]
    areas = []  # slides x repeats
    for name, (_, _, telling) in zip(attention, test):
        if telling.any() and not telling.all():
            areas.append([area_under(telling, weights) for weights in attention[name]])
    if areas:
        means = np.mean(areas, 0)
        rows.append(row_of("telling tiles by DSMIL's attention, AUC", means,
                           f"{len(areas)} positive test slides, {len(means)} seeds"))
    return rows


def draw_slide(found, folder, attention, path):
    """Draws a test slide with each network's DSMIL attention on it, and the true kinds where they are known.

    attention: {network: {test slide: (repeats, N)}}. The slide is the first with telling tiles, else the
    first of the last class.
    """
    names = list(next(iter(attention.values())))
    truth = {}
    telling_slides = []
    for name in names:
        truth[name] = read_truth(found.source, name)
        if any(telling for _, telling in truth[name].values()):
            telling_slides.append(name)
    last = [name for name in names if found.labels[name]["label"] == found.classes[-1]]
    name = (telling_slides or last)[0]
    picture = picture_of(found, name, 900)
    corners = read_npz(folder / "features" / f"{name}.npz", "coords")["coords"]
    kinds = [truth[name][tuple(corner)] for corner in corners.tolist()] if truth[name] else None
    plot_slide(picture.pixels, corners / picture.unit, picture.side / picture.unit,
               {title: slides[name].mean(0) for title, slides in attention.items()}, kinds,
               f"{name}, {found.labels[name]['label']}", path)
