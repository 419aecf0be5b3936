"""The synthetic data set: its slides, and what is known of them."""
