"""Cross-validation of slides: DSMIL on folds, each a wsi.folders.Data with its own split; mean and sd."""
import numpy as np
from tqdm import tqdm

from common.bags import SPLITS, labelled, train_each
from common.files import merge_csv, print_table

FOLDS_KEYS = ("folds", "network")  # rows of folds.csv that differ in one of these are kept


def score_folds(folds, runs, names, settings, device, workers, network, path, notes=None):
    """Scores DSMIL on folds, {number: Data}, and prints each one's measures, their mean and their sd.

    runs: {number: the folder of its features/}; names: the slides in them; network: what made the features;
    notes: {number: {column: value}}, further columns. Writes, after each fold, a row per fold to path, and a
    row per test slide to <stem>_predictions.csv next to it; rows of other folds or networks are kept.
    """
    name = next(iter(folds.values())).split_file.parent.name
    rows, predictions, measured = [], [], []
    for number, found in tqdm(folds.items(), f"{network}, folds", leave=False):
        slides = labelled(found, names)
        [(_, by_seed)] = train_each([runs[number]], slides, len(found.classes), settings, device, workers)
        values = np.mean([one.measures for one in by_seed.values()], 0)
        scores = np.mean([one.scores for one in by_seed.values()], 0)
        measured.append(values)
        key = {"folds": name, "network": network, "fold": number}
        counts = {split: sum(of == split for _, of, _ in slides) for split in SPLITS}
        counts |= notes[number] if notes else {}
        rows.append(key | dict(zip(("accuracy", "auc", "macro_f1"), texts(values))) | counts)
        test_names = [slide for slide, split, _ in slides if split == "test"]
        for slide, of_slide in zip(test_names, scores):
            columns = [f"score {label}" for label in found.classes]
            predictions.append(key | {"slide": slide, "label": found.labels[slide]["label"]}
                               | dict(zip(columns, texts(of_slide))))
        merge_csv(path, FOLDS_KEYS, rows)  # now: the next fold may take an hour
        merge_csv(path.with_stem(f"{path.stem}_predictions"), FOLDS_KEYS, predictions)
    table = [("fold", "accuracy", "AUC", "macro F1", *counts)]
    table += [tuple(map(str, list(row.values())[2:])) for row in rows]
    table.append(("mean", *texts(np.mean(measured, 0)), *[""] * len(counts)))
    if len(folds) > 1:
        table.append(("sd", *texts(np.std(measured, 0, ddof=1)), *[""] * len(counts)))
    print(f"{network}: DSMIL on the folds of {name}, trainings per fold: {len(settings.seeds)}")
    print_table(table)
    print(f"Wrote {path}, {path.stem}_predictions.csv")


def texts(values):
    """Numbers with four digits."""
    return [f"{value:.4f}" for value in values]
