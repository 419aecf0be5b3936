"""The lab: dirl.ipynb works through the paper in six parts; start it with `jupyter lab lab/dirl.ipynb`."""
