"""Measures of scores: AUC, macro F1, and bootstrap intervals over groups."""
import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import f1_score

DRAWS = 1000  # bootstrap draws


def auc(truth, scores):
    """Area under the ROC curve of scores (N, C); for more than two classes the mean of one against the rest.

    Computed from ranks (Mann and Whitney), because scikit-learn's roc_auc_score takes a hundred times as
    long and the bootstrap calls it a thousand times.
    """
    if scores.shape[1] == 2:
        values = scores[:, 1:] - scores[:, :1]
        positive = truth[:, None] == [1]
    else:
        values = scores
        positive = truth[:, None] == np.arange(scores.shape[1])
    positives = positive.sum(0)
    negatives = len(truth) - positives
    rank_sum = (rankdata(values, axis=0) * positive).sum(0)
    return float(np.mean((rank_sum - positives * (positives + 1) / 2) / (positives * negatives)))


def area_under(truth, scores):
    """AUC of scores (N,) for truth (N,), bool; NaN if truth has one value only."""
    return auc(np.asarray(truth).astype(int), np.stack([-np.asarray(scores), scores], 1))


def macro_f1(truth, scores):
    """The unweighted mean of the classes' F1: BRIGHT's measure (A.2)."""
    return f1_score(truth, scores.argmax(1), labels=range(scores.shape[1]), average="macro", zero_division=0)


def measures_of(truth, scores):
    """Accuracy, AUC and macro F1 of scores (N, C)."""
    return (scores.argmax(1) == truth).mean(), auc(truth, scores), macro_f1(truth, scores)


def bootstrap_indices(groups, seed=0):
    """DRAWS arrays of indices of groups (N,): whole groups are drawn with replacement."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(DRAWS):
        drawn = rng.integers(len(members), size=len(members))
        draws.append(np.concatenate([members[i] for i in drawn]))
    return draws


def score_statistics(truth, scores, draws):
    """Returns accuracy and AUC of scores (R, N, C) in each of draws, means over the R folds or trainings.

    The paper has such means, not those of an ensemble. An AUC is NaN if a draw lacks a class.
    """
    right = (scores.argmax(2) == truth).mean(0)
    accuracy = np.array([right[index].mean() for index in draws])
    area = np.full(len(draws), np.nan)
    for i, index in enumerate(draws):
        if len(np.unique(truth[index])) == scores.shape[2]:
            area[i] = np.mean([auc(truth[index], one[index]) for one in scores])
    return accuracy, area


def bootstrap(truth, scores, groups, seed=0):
    """95 % intervals (low, high) of the accuracy and of the AUC of scores (N, C): (2, 2).

    A draw that lacks a class has no AUC and does not count for its interval.
    """
    values = score_statistics(truth, scores[None], bootstrap_indices(groups, seed))
    return np.nanpercentile(values, (2.5, 97.5), axis=1).T
