"""Loads shared_fixtures.py where tests run: the process that hands them out (-n) need not wait for torch."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded; also of the scripts that tests start


def pytest_configure(config):
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that no worker waits for the other at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_paper", "test_processes"))
