"""Cross-validation of slides: DSMIL on folds, each a wsi.folders.Data with its own split; mean and sd."""
import numpy as np
from tqdm import tqdm

from common.bags import SPLITS, labelled, train_each
from common.files import merge_csv, print_table

FOLDS_KEYS = ("folds", "network")  # rows of folds.csv that differ in one of these are kept


def score_fold(slides, run, classes, settings, device, workers):
    """Trains DSMIL on the training slides of a fold, once with each seed, and scores its test slides.

    slides: of common.bags.labelled; run: the folder of features/; classes: their number. Returns the means
    over the seeds: (accuracy, AUC, macro F1), and the scores (T, C).
    """
    [(_, by_seed)] = train_each([run], slides, classes, settings, device, workers)
    trained = by_seed.values()
    return np.mean([one.measures for one in trained], 0), np.mean([one.scores for one in trained], 0)


def score_folds(folds, run, names, settings, device, workers, network, out):
    """Scores DSMIL on folds, {number: Data}, and prints each one's measures, their mean and their sd.

    run: the folder of features/; names: the slides that are in it; network: what made the features. Writes,
    after each fold, out/folds.csv, a row per fold, and out/folds_predictions.csv, a row per test slide; rows
    of other folds or networks in them are kept.
    """
    name = next(iter(folds.values())).split_file.parent.name
    rows, predictions, measured = [], [], []
    for number, found in tqdm(folds.items(), f"{network}, folds", leave=False):
        slides = labelled(found, names)
        values, scores = score_fold(slides, run, len(found.classes), settings, device, workers)
        measured.append(values)
        key = {"folds": name, "network": network, "fold": number}
        counts = {split: sum(of == split for _, of, _ in slides) for split in SPLITS}
        rows.append(key | dict(zip(("accuracy", "auc", "macro_f1"), texts(values))) | counts)
        test_names = [slide for slide, split, _ in slides if split == "test"]
        for slide, of_slide in zip(test_names, scores):
            columns = [f"score {label}" for label in found.classes]
            predictions.append(key | {"slide": slide, "label": found.labels[slide]["label"]}
                               | dict(zip(columns, texts(of_slide))))
        merge_csv(out / "folds.csv", FOLDS_KEYS, rows)  # now: the next fold may take an hour
        merge_csv(out / "folds_predictions.csv", FOLDS_KEYS, predictions)
    table = [("fold", "accuracy", "AUC", "macro F1", *SPLITS)]
    table += [tuple(map(str, list(row.values())[2:])) for row in rows]
    table.append(("mean", *texts(np.mean(measured, 0)), "", "", ""))
    table.append(("sd", *texts(np.std(measured, 0, ddof=1)), "", "", ""))
    print(f"{network}: DSMIL by {name}, {len(settings.seeds)} trainings a fold")
    print_table(table)
    print(f"Wrote {out}/folds.csv, folds_predictions.csv")


def texts(values):
    """Numbers with four digits."""
    return [f"{value:.4f}" for value in values]
