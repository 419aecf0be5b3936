"""The shape of the project, read from its imports: what stands where, and which way the arrows run."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHOD = ("dirl.py", "mil.py", "prior.py", "data.py", "train.py", "eval.py")
FOLDERS = ("common", "wsi", "demo", "experiments", "lab")
CODE = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for path in [ROOT / name for name in METHOD] + [p for f in FOLDERS for p in (ROOT / f).rglob("*.py")]}


def module_of(file):
    """The name by which a file of CODE is imported."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(tree):
    """(name of a module, node) of every import; `from a import b` is a.b where that is a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if file_of(whole) else node.module, node


def file_of(name):
    """The file of one of our own modules, or None."""
    file = name.replace(".", "/") + ".py"
    return file if file in CODE else None


ARROWS = {file: {file_of(name) for name, _ in imported(tree)} - {None} for file, tree in CODE.items()}


def test_no_module_reaches_itself():
    reached = {file: set(to) for file, to in ARROWS.items()}
    for _ in reached:
        for file, to in reached.items():
            to |= {further for one in list(to) for further in reached[one]}
    assert not [file for file, to in reached.items() if file in to]


def test_arrows_run_downwards():
    """Who may import whom: a file's own folder, and what stands behind it here."""
    method = ("dirl.py", "mil.py", "prior.py")
    common = (*method, "common/")
    wsi = (*common, "wsi/")
    data = (*wsi, "data.py", "demo/")
    scripts = (*data, "train.py", "eval.py")
    below = {"lab/": (*scripts, "lab/"), "experiments/": (*scripts, "experiments/"), "train.py": data,
             "eval.py": data, "demo/": data, "data.py": wsi, "wsi/": wsi, "common/": common, "prior.py": (),
             "dirl.py": (), "mil.py": ()}
    for file, to in ARROWS.items():
        allowed = next(names for start, names in below.items() if file.startswith(start))
        assert all(other.startswith(allowed) for other in to) if allowed else not to, (file, to)


def test_the_method_can_be_copied_out():
    allowed = {"dirl.py": {"torch"}, "mil.py": {"torch"}, "prior.py": {"torch", "numpy", "scipy", "PIL"}}
    for file, packages in allowed.items():
        roots = {name.split(".")[0] for name, _ in imported(CODE[file])}
        assert roots <= packages | sys.stdlib_module_names, file


def test_training_starts_without_what_only_evaluation_needs():
    """Every worker that cuts slides imports train.py again, and scikit-learn would cost it a second."""
    reached = {"train.py"}
    for _ in CODE:
        reached |= {further for file in reached for further in ARROWS[file]}
    at_top = {name.split(".")[0] for file in reached for name, node in imported(CODE[file])
              if node in CODE[file].body}
    assert {"torch", "numpy"} <= at_top and "sklearn" not in at_top


def test_own_modules_are_imported_at_the_top():
    for file, tree in CODE.items():
        at_top = set(tree.body)
        inside = [name for name, node in imported(tree) if file_of(name) and node not in at_top]
        assert not inside, (file, inside)


def test_functions_fit_a_screen_and_a_half():
    for file, tree in CODE.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and "argument" not in node.name:
                assert node.end_lineno - node.lineno < 80, (file, node.name)


def test_top_level_is_what_the_readme_shows():
    files = {path.name for path in ROOT.glob("*.py")}
    assert files == {*METHOD, "test_dirl.py"}


def test_the_readme_names_what_is_there():
    """Its table: `a.py: `name`, `name.attribute``."""
    text = (ROOT / "README.md").read_text()
    cells = re.findall(r"([\w/]+\.py): ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(cells) >= 18
    for file, names in cells:
        for name in re.findall(r"`([\w.]+)`", names):
            kinds = ast.FunctionDef, ast.ClassDef
            defined = {node.name for node in ast.walk(CODE[file]) if isinstance(node, kinds)}
            defined |= {node.id for node in ast.walk(CODE[file])
                        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            assert set(name.split(".")) <= defined, (file, name)
