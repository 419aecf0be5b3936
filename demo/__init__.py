"""The synthetic data set: drawing its slides, and the truth of their tiles."""
