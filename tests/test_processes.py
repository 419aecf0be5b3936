"""Divided work against undivided: a batch among processes or in shards, slides among machines."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import refused, rows_of, times, untrained_run
from tiny_flags import FOLDER, SET

import data
import eval as eval_py
import train
from common.files import load_tensors
from experiments import compare

pytestmark = pytest.mark.usefixtures("blank_figures")

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [*FOLDER, "--epochs", "3", "--local-size", "32", "--drop-path", "0", "--precision", "fp32"]


def same_run(one, other):
    """Losses (log.csv has six digits) and weights of two runs are the same."""
    for a, b in zip(rows_of(one / "log.csv"), rows_of(other / "log.csv"), strict=True):
        for name in a:
            if name.startswith(("loss", "both", "cell")) and (a[name] or b[name]):  # empty without cells
                assert float(a[name]) == pytest.approx(float(b[name]), abs=2e-5, rel=2e-6), (a["step"], name)
    a, b = (load_tensors(run / "checkpoint.pt") for run in (one, other))
    for part in ("student", "teacher", "loss"):
        for name, tensor in a[part].items():
            torch.testing.assert_close(b[part][name], tensor, atol=1e-5, rtol=0, msg=name)


ESVIT = [*FLAGS, "--depth", "2", "--ssl", "esvit", "--max-steps", "4"]
SCRIPT = """  # two processes as of torchrun, forked with torch and what an optimiser imports loaded
import os, socket, sys, torch._dynamo, dirl, synthetic, train
from experiments import compare
with socket.create_server(("localhost", 0)) as free:
    port = str(free.getsockname()[1])
other = os.fork()
rank = "0" if other else "1"
os.environ |= {{"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank}}
dirl.DINOHead = synthetic.SmallHead
dirl.ARCHS["vit_t4"] = synthetic.small_vit
leave, train.leave = train.leave, lambda: None  # one group of processes for both: a second one may hang
code = train.main({})
train.join, train.leave = train.leave, leave
code = code or compare.main({})
sys.exit(code or other and os.waitpid(other, 0)[1])
"""


def test_two_processes_train_as_one_does_and_one_resumes(place, folder):
    """9 steps: five of two processes with half of each batch each, the rest of one that resumes.

    The same two processes then begin a comparison.
    """
    assert train.main([*FLAGS, "--run", "runs/one"]) == 0
    assert compare.main([*ESVIT, "--run", "runs/esvit one"]) == 0
    two = [*FLAGS, "--run", "runs/two"]
    script = SCRIPT.format([*two, "--max-steps", "5"], [*ESVIT, "--run", "runs/esvit two"])
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths},
                           capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("Stopped at step 5 of 9") == 1  # rank 0 alone prints
    assert train.main(two) == 0
    same_run(place / "runs" / "one", place / "runs" / "two")
    same_run(place / "runs" / "esvit one", place / "runs" / "esvit two")


def test_a_crops_views_do_not_depend_on_how_the_batch_is_divided():
    crops, cells = torch.randint(0, 256, (4, 3, 64, 64)).byte(), torch.rand(4, 5, 2) * 64

    def views(crops, cells, shard):
        how = data.Augmentation(1, global_size=32, local_size=16)
        (x, *_), (prior, *_) = data.make_views(crops, cells, torch.Generator().manual_seed(5), how, shard)
        return x, prior
    whole = views(crops, cells, (0, 1))
    halves = [views(crops[k: k + 2], cells[k: k + 2], (k // 2, 2)) for k in (0, 2)]
    for got, want in zip(zip(*halves), whole):
        torch.testing.assert_close(torch.cat(got, 1), want)


def test_shards_divide_the_slides_and_touch_no_file_of_one_another(place, folder, capsys):
    before = {}
    for shard in ("0/2", "1/2"):
        assert data.main(["prepare", *SET[:-2], "--shard", shard]) == 0
        now = times(place / "datasets" / "tiny_set", "c*/**/*")
        assert before.items() <= now.items() and len(now) == len(before) + 4 * 3  # tile, its origin, cells
        before = now
    run = untrained_run(place / "runs" / "tiny_set_vit_t4_dirl", data="tiny_set")
    test = [*SET, "--repeats", "1", "--epochs", "1"]
    assert eval_py.main([*test, "--shard", "0/2"]) == 0 and len(times(run / "features")) == 4
    assert eval_py.main([*test, "--shard", "1/2"]) == 0
    written = times(run / "features")
    assert len(written) == 8 and eval_py.main(test) == 0 and times(run / "features") == written
    for shard in ("2/2", "half", "-1/2"):
        refused(capsys, eval_py.main, [*test, f"--shard={shard}"], "--shard")
