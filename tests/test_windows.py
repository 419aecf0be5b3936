"""The project on Windows, whose Python lacks fcntl, resource, SIGHUP, SIGALRM and os.sysconf."""
import subprocess
import sys
from pathlib import Path

from synthetic import saved, tissue, write_table

ROOT = Path(__file__).resolve().parents[1]
MODULES = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
           for folder in (".", "common", "wsi", "demo", "experiments", "lab")
           for path in sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))]
DATA = ["--data", "in", "--mpp", "1", "--slide-mpp", "1", "--device", "cpu", "--workers", "1"]
TRAIN = [*DATA, "--arch", "vit_t4", "--batch", "4", "--epochs", "1", "--warmup-epochs", "0", "--out-dim", "8",
         "--disentangled-dim", "8", "--local-crops", "0", "--global-size", "32"]
EVAL = [*DATA, "--repeats", "1", "--epochs", "1"]
WITHOUT = f"""
import importlib, os, signal, sys
sys.modules |= dict.fromkeys(["fcntl", "resource"])  # None: importing it is an ImportError
for name in ("SIGHUP", "SIGALRM", "alarm", "setitimer", "ITIMER_REAL"):
    delattr(signal, name)
del os.sysconf
for name in {MODULES}:
    importlib.import_module(name)
import train, eval
assert train.main({TRAIN}) == 0
assert train.main({TRAIN}) == 0  # it finds its lock released and its work done
assert eval.main({EVAL}) == 0
"""


def test_every_module_imports_and_a_run_is_trained_and_evaluated(tmp_path):
    rows = []
    for i, split in enumerate(("train", "train", "val", "val", "test", "test")):
        saved(tmp_path / "in" / "slides" / f"{i}.png", array=tissue(224, seed=i))
        rows.append(f"{i},{'AB'[i % 2]},{split}")
    write_table(tmp_path / "in" / "labels.csv", "slide,label,split", rows)
    ended = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})" + WITHOUT],
                           cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "nothing was trained" in ended.stdout and "slide accuracy" in ended.stdout
