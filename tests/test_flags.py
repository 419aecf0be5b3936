"""What every script does with a flag that it does not know: one line, exit code 2, nothing else."""
import ast
import importlib

import pytest
from synthetic import refused
from test_shape import CODE, module_of

SCRIPTS = {  # a command line of each script that is right but for its flags
    "train": [[], ["--data", "demo"]],
    "eval": [[], ["slides"], ["patches"]],
    "data": [["check", "--data", "demo"], ["look", "s.svs"], ["manifest", "--data", "lung"],
             ["prepare", "--data", "demo"]],
    "wsi.segment": [["s.svs"]],
    "experiments.benchmark": [[]],
    "experiments.curves": [["run"]],
    "experiments.figures.attention": [["overlay", "--checkpoint", "run"]],
    "experiments.compare": [[], ["--ssl", "byol"]],
    "experiments.figures.heatmap": [["--checkpoint", "run"]],
    "experiments.lc25000": [["images"]],
    "experiments.figures.priors": [["--prior", "builtin", "truth"]],
    "experiments.study": [["claim", "--data", "demo"], ["show"], ["fraction"],
                          ["folds", "--data", "demo", "--splits", "here", "--checkpoint", "run"]],
    "experiments.table": [[]],
    "experiments.figures.tokens": [["--checkpoint", "run"]],
    "experiments.figures.views": [[]],
    "lab.record": [["a=b"]],
}
WITHOUT_FLAGS = {"prior", "lab.small"}
CASES = [(script, argv) for script, lines in SCRIPTS.items() for argv in lines]


def is_script(tree):
    """Whether a file can be run: its last statement is `if __name__ == ...`."""
    last = tree.body[-1]
    return isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)


def test_every_script_is_tried():
    scripts = {module_of(file) for file, tree in CODE.items() if is_script(tree)}
    assert scripts - WITHOUT_FLAGS == SCRIPTS.keys()


@pytest.mark.parametrize("script, argv", CASES, ids=lambda value: " ".join(value) if value else "none")
def test_a_mistyped_flag_is_one_line_that_names_it_and_the_help(tmp_path, monkeypatch, capsys, script, argv):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(script).main
    name = script.rpartition(".")[-1]
    refused(capsys, main, [*argv, "--no-such-flag", "1"], name, "--no-such-flag")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, argv", [
    ("train", ["--arch", "resnet"]), ("train", ["--epochs", "many"]), ("train", ["--data"]),
    ("eval", ["--repeats", "x"]), ("eval", ["patches", "--encoder", "none"]), ("data", []),
    ("data", ["check"]), ("data", ["manifest", "--data", "demo"]),
    ("data", ["manifest", "--data", "lung", "--limit", "1"]), ("wsi.segment", []),
    ("experiments.study", ["claim"]), ("experiments.table", ["--measures", "loss"])])
def test_a_wrong_value_is_one_line_and_the_help_that_it_names_exists(capsys, script, argv):
    main = importlib.import_module(script).main
    refused(capsys, main, argv, "; see python ")
    main(argv)
    words = capsys.readouterr().err.split("; see python ")[1].split()
    named = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    assert named == script and words[-1] == "--help"
    with pytest.raises(SystemExit) as stop:
        main(words[2 if words[0] == "-m" else 1:])
    assert stop.value.code == 0 and "usage: python" in capsys.readouterr().out
