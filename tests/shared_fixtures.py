"""The fixtures of all tests, and what is set for them."""
import pytest
import torch
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure
from synthetic import SmallHead, saved, small_vit, write_one_px, write_table

import dirl
from common import metrics
from demo import slides as demo

dirl.ARCHS["vit_t4"] = small_vit  # --arch vit_t4 of the scripts that run in this process

# pytest --hypothesis-profile=long for a longer search
for name, examples in (("default", 300), ("long", 20_000)):
    settings.register_profile(name, max_examples=examples, deadline=None, derandomize=name == "default",
                              database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def blank_figures(monkeypatch):
    """Pictures are written as one px, for tests that draw by the way; test_windows.py draws eval.py's."""
    monkeypatch.setattr(Figure, "savefig", write_one_px)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with in/slides/good.png, a synthetic slide of one tile at 1 um/px, and SmallHeads."""
    here = tmp_path / "here"
    saved(here / "in" / "slides" / "good.png")
    monkeypatch.chdir(here)
    monkeypatch.setattr(dirl, "DINOHead", SmallHead)
    return here


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """The test runs in an empty folder; the bootstrap draws a few times only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "DRAWS", 50)


@pytest.fixture(scope="session")
def rendered():
    """Two synthetic slides, as the demo's, as arrays, and their nuclei; without and with nests."""
    return {label: demo.render(kind, [7, 0], size=(3, 8))[:2]
            for label, kind in zip(("glands", "nests"), demo.CLASSES)}


@pytest.fixture
def folder(place, rendered):
    """"tiny set": eight small plain images of both classes, as slides at 1.0 um/px, with labels.csv."""
    rows = []
    for label, (image, _) in rendered.items():
        for i, split in enumerate(("train", "train", "val", "test")):
            crop = image[200: 648, 400 + 300 * i: 848 + 300 * i]
            saved(place / "tiny set" / "slides" / f"{label}_{i}.png", array=crop)
            rows.append(f"{label}_{i},{label},p{label}{i},{split}")
    write_table(place / "tiny set" / "labels.csv", "slide,label,patient,split", rows)
    return place / "tiny set"


@pytest.fixture(scope="session")
def ten(rendered, tmp_path_factory):
    """A folder to copy: ten slides of two tiles at 1.0 um/px, of both classes, with labels.csv."""
    here, rows = tmp_path_factory.mktemp("ten"), []
    for label, (image, _) in rendered.items():
        for i, split in enumerate(("train", "train", "val", "test", "test")):
            saved(here / "slides" / f"{label}_{i}.png", array=image[200: 648, 140 * i: 896 + 140 * i])
            rows.append(f"{label}_{i},{label},{label}{i},{split}")
    write_table(here / "labels.csv", "slide,label,patient,split", rows)
    return here
