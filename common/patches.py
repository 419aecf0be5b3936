"""Folds of labelled patches (4.1, Table 2): training, scores, what is printed and written."""
import numpy as np

from common import classify
from common.encoders import in_batches, represent
from common.files import merge_csv
from common.metrics import DRAWS, bootstrap, measures_of

PATCH_KEYS = ("data", "encoder", "training")  # rows of patches.csv with other keys stay


def fold_results(encoder, images, labels, folds, test, classes, args, name):
    """Trains on each fold, scores the test images: yields (scores (T, C), val loss, what was kept)."""
    linear = args.linear or encoder is None
    if encoder is not None:
        encoder.to(args.device)
    if encoder is None:
        features = classify.pixel_statistics(images)
    elif linear:
        features = in_batches(lambda x: represent(encoder, x, args.bf16), images, args.batch,
                              "features").numpy()
    for k, (train, val) in enumerate(folds, 1):
        if linear:
            predict, loss, kept = classify.fit_linear(features, labels, train, val)
            yield predict(features[test]), loss, kept
        else:
            predict, loss, kept = classify.fine_tune(encoder, images, labels, train, val, classes, args,
                                            1000 * args.seed + k, f"{name}, fold {k}")
            yield predict(images[test]), loss, kept


def report_folds(results, folds, truth, groups, key, run, args):
    """Prints and writes each fold's accuracy and AUC as it is done; gives the mean score (T, C).

    At the end it prints the folds' mean and the bootstrap's interval of the mean score.
    """
    name, width = key["encoder"], max(24, len(key["encoder"]) + 14)

    def show(what, accuracy, area, note):
        print(f"{f'{name}, {what}':<{width}}{accuracy:<26}{area:<26}{note}")
    show("", "accuracy", "AUC", "")
    table, values, mean = [], [], 0
    for k, (scores, loss, kept) in enumerate(results, 1):
        values.append(measures_of(truth, scores)[:2])
        mean = mean + scores / len(folds)
        accuracy, area = (f"{value:.4f}" for value in values[-1])
        show(f"fold {k}", accuracy, area, f"{kept}, val loss {loss:.4f}")
        table.append(key | {"fold": k, "accuracy": accuracy, "auc": area, "val_loss": f"{loss:.4f}",
                            "kept": kept, "train": len(folds[k - 1][0]), "val": len(folds[k - 1][1]),
                            "test": len(truth)})
        merge_csv(run / "patches.csv", PATCH_KEYS, table)  # now: the next fold may take an hour
    spreads = (f"{np.mean(v):.4f} ± {np.std(v, ddof=1):.4f}" for v in zip(*values))
    show("mean", *spreads, f"{key['training']}, sd over {len(folds)} folds")
    intervals = bootstrap(truth, mean, groups, args.seed)
    bounded = (f"{v:.4f} ({low:.4f} to {high:.4f})"
               for v, (low, high) in zip(measures_of(truth, mean), intervals))
    show("mean score", *bounded, f"95 %, {DRAWS} draws of {len(set(groups))} test {classify.unit(groups)}")
    return mean
