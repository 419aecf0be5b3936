"""Measures of scores: AUC, macro F1, and bootstrap intervals over groups."""
import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import f1_score

DRAWS = 1000  # of the bootstrap


def auc(truth, scores):
    """Area under the ROC curve of scores (N, C); for more than two classes the mean of one against the rest.

    By ranks (Mann and Whitney): scikit-learn's roc_auc_score takes a hundred times as long, and a bootstrap
    calls it often.
    """
    two = scores.shape[1] == 2
    values = scores[:, 1:] - scores[:, :1] if two else scores
    positive = truth[:, None] == ([1] if two else np.arange(scores.shape[1]))
    count = positive.sum(0)
    ranks = (rankdata(values, axis=0) * positive).sum(0)
    return float(np.mean((ranks - count * (count + 1) / 2) / (count * (len(truth) - count))))


def area_under(truth, scores):
    """AUC of scores (N,) for truth (N,) of bool; ValueError if all of it is the same."""
    return auc(np.asarray(truth).astype(int), np.stack([-np.asarray(scores), scores], 1))


def macro_f1(truth, scores):
    """The unweighted mean of the classes' F1: BRIGHT's measure (A.2)."""
    return f1_score(truth, scores.argmax(1), labels=range(scores.shape[1]), average="macro", zero_division=0)


def measures_of(truth, scores):
    """Accuracy, AUC and macro F1 of scores (N, C)."""
    return (scores.argmax(1) == truth).mean(), auc(truth, scores), macro_f1(truth, scores)


def bootstrap_indices(groups, seed=0):
    """DRAWS arrays of indices: the groups of groups (N,) drawn with replacement, each as a whole."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    rng = np.random.default_rng(seed)
    return [np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
            for _ in range(DRAWS)]


def bootstrap(truth, scores, groups, seed=0):
    """95 % intervals of the accuracy and the AUC of scores (N, C), as (2, 2): low, high.

    A draw that lacks a class has no AUC and is left out there.
    """
    values = []
    for index in bootstrap_indices(groups, seed):
        has_all = len(np.unique(truth[index])) == scores.shape[1]
        values.append(((truth[index] == scores[index].argmax(1)).mean(),
                       auc(truth[index], scores[index]) if has_all else np.nan))
    return np.nanpercentile(values, (2.5, 97.5), axis=0).T
