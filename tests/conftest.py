import pytest
import torch
from PIL import Image
from synthetic import saved

from wsi import demo


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with in/slides/good.png, a synthetic slide of one tile at 1.0 um/px."""
    here = tmp_path / "here"
    saved(here / "in" / "slides" / "good.png")
    monkeypatch.chdir(here)
    return here


@pytest.fixture(scope="session")
def rendered():
    """One synthetic slide of each class of the demo, as an array, and its nuclei."""
    return {label: demo.render(label, [7, i]) for i, label in enumerate(demo.CLASSES)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, rendered):
    """A folder of eight small plain images of both classes, as slides at 1.0 um/px, with labels.csv."""
    root = tmp_path_factory.mktemp("given") / "tiny set"
    (root / "slides").mkdir(parents=True)
    rows = ["slide,label,patient,split"]
    for label, (image, _) in rendered.items():
        for i, split in enumerate(("train", "train", "val", "test")):
            name = f"{label}_{i}"
            crop = image[600: 1048, 700 + 300 * i: 1148 + 300 * i]
            Image.fromarray(crop).save(root / "slides" / f"{name}.png")
            rows.append(f"{name},{label},p{label}{i},{split}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root
