"""k nearest neighbours, for the probe while training and for evaluation."""
import numpy as np


def nearest(train, labels, test, classes, k=20):
    """Class shares (T, classes) among the k nearest of train (N, d) to each of test (T, d), by cosine."""
    from sklearn.neighbors import KNeighborsClassifier  # takes a second, for --probe alone
    model = KNeighborsClassifier(min(k, len(train)), metric="cosine").fit(train, labels)
    shares = np.zeros((len(test), classes))
    shares[:, model.classes_] = model.predict_proba(test)  # labels (N,) may lack a class
    return shares
