"""Several networks side by side in eval.py: which, their names, one table, each one's own results."""
import shutil
from pathlib import Path
from types import SimpleNamespace

from synthetic import refused, rows_of, times, untrained_run, write, write_table
from tiny_flags import SET

import eval as eval_py
from common.files import load_tensors, save_tensors
from common.networks import describe, files_of, named
from experiments import table

EVAL = [*SET, "--repeats", "2", "--epochs", "2", "--overlays", "1"]


def run_of(method, seed=0, finished=True, folder=None, images=()):
    """A run of "tiny set" with an encoder that was never trained."""
    run = untrained_run(folder or f"runs/tiny_set_vit_t4_{method}", method, "tiny_set", images=images,
                        seed=seed, step=3, ssl="dino")
    write(run / "config.json", {"arch": "vit_t4", "method": method, "data": "tiny_set", "mpp": 2.0,
                                "seed": seed, "epochs": 3, "crops": 4, "batch": 4})
    if method == "baseline":
        state = load_tensors(run / "encoder.pt")
        state["encoder"]["blocks.3.attn.qkv.weight"] *= 99  # its attention is uneven
        save_tensors(run / "encoder.pt", state)
    loss = "loss_f" if method == "baseline" else "loss_c"
    write_table(run / "log.csv", f"step,epoch,loss,{loss},ln_out_dim",
                [f"{step},{step},1,{step},3" for step in range(3 if finished else 2)])
    return run


def test_all_finished_runs_are_in_one_table_and_each_has_its_own_results(folder, capsys):
    last = run_of("dirl", seed=3)
    baseline = run_of("baseline", seed=1)
    stopped = SimpleNamespace(path=run_of("cellback", finished=False) / "encoder.pt",
                              about={"method": "cellback", "arch": "vit_t4", "data": "tiny_set", "step": 1})
    describe([stopped])
    assert "tiny_set, step 1, unfinished\n" in capsys.readouterr().out
    argv = [*EVAL, "--checkpoint", str(last), "--compare", "random", "all"]
    assert eval_py.main(argv) == 0
    out = capsys.readouterr().out
    assert "skipped: runs/tiny_set_vit_t4_cellback: is not finished" in out and ", unfinished" not in out
    assert f"Wrote {baseline}/results.csv, slides.csv, predictions.csv, dsmil_<seed>.pt" in out
    rows = rows_of(last / "compared.csv")
    names = ["random start", "baseline (DINO)", "DiRL"]
    assert list(rows[0]) == ["measure", *[name + sd for name in names for sd in ("", " sd")], "over"]
    for name, run in zip(names, (last / "random_start", baseline, last)):
        own = {row["measure"]: row for row in rows_of(run / "results.csv")}
        assert {measure: (row["mean"], row["sd"]) for measure, row in own.items()} == {
            row["measure"]: (row[name], row[f"{name} sd"]) for row in rows if row[name]}
        assert len(rows_of(run / "predictions.csv")) == 2 and (run / "dsmil_1.pt").is_file()
    start = [(row["random start"], row["random start sd"]) for row in rows if row["random start"]]
    assert start == [(row["DiRL"], row["DiRL sd"]) for row in rows if row["random start"]]  # of its seed
    losses = {row["measure"]: [row[name] for name in names] for row in rows if "loss" in row["measure"]}
    assert losses == {"loss of f, last epoch": ["", "2.0000", ""],
                      "loss of f_c, last epoch": ["", "", "2.0000"]}
    printed = [line for line in out.splitlines() if line.startswith("slide AUC, DSMIL")]
    auc = next(row for row in rows if row["measure"] == "slide AUC, DSMIL")
    cells = [f"{float(auc[name]):.3f} ± {float(auc[f'{name} sd']):.3f}" for name in names]
    assert len(printed) == 1 and all(cell in printed[0] for cell in cells)
    for name in ("attention_slide.png", "attention_overlay.png", "attention_distribution.png"):
        assert (last / name).stat().st_size > 10_000 and not (baseline / name).exists()

    kept = times(Path("runs"), "*.npz")
    assert len(kept) == 3 * 8
    assert eval_py.main([*EVAL, "--checkpoint", str(baseline)]) == 0  # alone: the same, in the same place
    assert times(Path("runs"), "*.npz") == kept  # no feature is computed again
    assert "baseline" not in capsys.readouterr().out.split("measure ")[1].splitlines()[0]
    assert {row["measure"]: row["mean"] for row in rows_of(baseline / "results.csv")} == {
        row["measure"]: row["baseline (DINO)"] for row in rows if row["baseline (DINO)"]}
    assert table.main(["runs", "--measures", "accuracy", "middle"]) == 0
    lines = [line.split("|")[1].strip() for line in Path("runs/table.md").read_text().splitlines()[2:4]]
    assert lines == ["Baseline-T4", "DiRL-T4"]


def test_every_encoder_that_saw_a_test_slide_is_refused(folder, capsys):
    last = run_of("dirl")
    leaking = run_of("cellback", images={"nests_3": 1})
    for compare in ("all", str(leaking)):
        refused(capsys, eval_py.main, [*EVAL, "--checkpoint", str(last), "--compare", compare],
                f"{leaking}/encoder.pt: was trained on 1 of these 2 test images")
    refused(capsys, eval_py.main, [*EVAL, "--checkpoint", str(last), "--compare", "runs/gone"],
            "--compare runs/gone", "is missing")
    assert not list(Path("runs").rglob("features"))


def test_which_runs_are_compared(place):
    args = eval_py.slides_arguments
    demo = args(["--data", "demo"])
    assert demo.compare == ["random", "all"] and (demo.mil_lr, demo.mil_weight_decay) == (2e-3, 5e-3)
    assert (demo.epochs, demo.repeats, demo.standardize) == (100, 3, True)
    assert args(["--data", "lung"]).compare == ["none"]
    assert args(["--data", "demo", "--compare", "none"]).compare == ["none"]
    dirl, other = run_of("dirl") / "encoder.pt", run_of("dirl", folder="elsewhere/a") / "encoder.pt"
    baseline = run_of("baseline") / "encoder.pt"
    shutil.copytree(dirl.parent, "runs/tiny_set_2_vit_t4_dirl")
    assert files_of(str(dirl.parent), ["none"], "tiny_set") == [dirl]
    assert files_of(str(dirl), ["all", "random"], "tiny_set") == [dirl, baseline]
    assert files_of(str(other), ["runs/tiny_set_vit_t4_dirl", "all"], "tiny_set") == [other, dirl, baseline]


def test_names_are_the_papers_and_tell_runs_of_one_method_apart():
    def network(method, path, **about):
        return SimpleNamespace(about={"method": method} | about, path=Path(path))
    networks = [network("dirl", "runs/a/encoder.pt"), network("dirl", "runs/a/encoder_3.pt"),
                network("baseline", "runs/b/encoder.pt", ssl="byol"), network("dino_s", "dino_s.pth"),
                network("none", "runs/a/encoder.pt"), network("baseline", "runs/c/encoder.pt")]
    assert list(named(networks)) == ["random start", "baseline, byol", "baseline (DINO)", "DiRL, a",
                                     "DiRL, a/encoder_3", "dino_s"]
    assert list(named(networks[:1] + networks[4:])) == ["random start", "baseline (DINO)", "DiRL"]


def test_a_control_is_not_named_as_the_method_that_it_controls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    networks = []
    for folder, method, config in (("shuffled", "dirl", {"shuffle_prior": True}),
                                   ("heads", "baseline", {"heads": [4, 4]}),
                                   ("plain", "cellback", {"heads": None, "shuffle_prior": False}),
                                   ("shuffled", "none", {"shuffle_prior": True})):
        path = Path("runs", folder, "encoder.pt")
        write(path.parent / "config.json", config)
        networks.append(SimpleNamespace(about={"method": method}, path=path))
    assert list(named(networks)) == ["random start", "baseline (DINO), heads", "Cellback", "DiRL, shuffled"]
