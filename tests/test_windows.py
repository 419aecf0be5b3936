"""The project on Windows, whose Python lacks fcntl, resource, SIGHUP, SIGALRM and os.sysconf."""
import importlib
import os
import signal
import sys

import pytest
from filelock import FileLock
from test_shape import CODE, module_of
from tiny_flags import FOLDER, SET

import train

MODULES = [module_of(file) for file in CODE]


def ours():
    """The modules that were imported from this project, and filelock, by name."""
    packages = {name.split(".")[0] for name in MODULES} | {"filelock"}
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] in packages}


@pytest.fixture
def windows(monkeypatch):
    """Hides what Windows lacks, and all modules that may have been imported with it."""
    for name in ("SIGHUP", "SIGALRM", "alarm", "setitimer", "ITIMER_REAL"):
        monkeypatch.delattr(signal, name)
    monkeypatch.delattr(os, "sysconf")
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    before = ours()
    for name in before:
        del sys.modules[name]
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.filterwarnings("ignore:only soft file lock")
def test_every_module_imports_and_a_run_is_trained_and_evaluated(folder, windows, capsys):
    modules = {name: importlib.import_module(name) for name in MODULES}
    assert modules["train"] is not train and modules["common.checkpoint"].FileLock is not FileLock
    argv = [*FOLDER, "--epochs", "1", "--warmup-epochs", "0"]
    assert modules["train"].main(argv) == 0
    assert modules["train"].main(argv) == 0  # it finds its lock released and its work done
    assert modules["eval"].main([*SET, "--repeats", "1", "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was trained" in printed and "slide accuracy" in printed
