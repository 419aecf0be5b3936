"""The true shares of kinds in tiles where they are known (the demo), and what features tell of them."""
import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from common.figures import plot_slide
from common.files import read_csv, read_npz
from common.metrics import area_under
from common.neighbors import nearest
from common.report import row_of
from demo.slides import KINDS
from wsi.crops import picture_of

ALPHAS = np.logspace(-1, 5, 13)  # of the ridge regression; chosen on the training tiles


def read_truth(folder, name):
    """Returns {level-0 corner (x, y): (shares of KINDS, is it telling)} of a slide's tiles; {} if unknown."""
    path = folder / "truth" / f"{name}_tiles.csv"
    if not path.is_file():
        return {}
    truth = {}
    for _, row in read_csv(path)[1]:
        shares = np.array([float(row[kind]) for kind in KINDS])
        truth[int(row["x"]), int(row["y"])] = (shares, row["telling"] == "1")
    return truth


def tiles_of(found, run, name):
    """Returns a slide's features (N, d), the shares of KINDS in its tiles (N, kinds), and telling (N,)."""
    features = read_npz(run / "features" / f"{name}.npz")
    truth = read_truth(found.source, name)
    shares, telling = zip(*(truth[tuple(corner)] for corner in features["coords"].tolist()))
    return features["features"], np.array(shares), np.array(telling)


def predict_shares(features, shares, queries):
    """Returns the shares of KINDS in queries (M, d) by ridge regression from standardised features (N, d).

    Its alpha is chosen by leaving out one of the N tiles at a time.
    """
    scale = StandardScaler().fit(features)
    model = RidgeCV(ALPHAS).fit(scale.transform(features), shares)
    return model.predict(scale.transform(queries))


def check_with_truth(found, run, names, attention):
    """Returns rows of the results where the truth of the tiles is known (the demo); [] elsewhere.

    The kind that fills most of a test tile, by its 20 nearest neighbours among the training tiles; R2 of the
    shares of kinds in test tiles, predicted from their features, as a mean over the kinds and for each; and
    the mean AUC with which DSMIL's attention finds the telling tiles of slides that also have others.
    attention: {test slide: (repeats, N)}.
    """
    if not read_truth(found.source, names[0]):
        return []
    train = [tiles_of(found, run, name) for name in found.split("train") if name in names]
    test = [tiles_of(found, run, name) for name in found.split("test") if name in names]
    features, shares, _ = map(np.concatenate, zip(*train))
    queries, truth, _ = map(np.concatenate, zip(*test))
    over = f"{len(truth)} test tiles"
    predicted = nearest(features, shares.argmax(1), queries, len(KINDS)).argmax(1)
    rows = [row_of("kind of a tile, 20-NN", [(predicted == truth.argmax(1)).mean()], over)]
    r2 = r2_score(truth, predict_shares(features, shares, queries), multioutput="raw_values")
    rows.append(row_of("shares of kinds in a tile, R2, mean", [r2.mean()], over))
    for kind, value in zip(KINDS, r2):
        rows.append(row_of(f"share of {kind}, R2", [value], over))
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
    kinds = None
    if truth[name]:
        tiles = [truth[name][tuple(corner)] for corner in corners.tolist()]
        kinds = [(KINDS[shares.argmax()], telling) for shares, telling in tiles]
    plot_slide(picture.pixels, corners / picture.unit, picture.side / picture.unit,
               {title: slides[name].mean(0) for title, slides in attention.items()}, kinds,
               f"{name}, {found.labels[name]['label']}", path)
