"""The evidence behind one number: what is shown with runs, without them, and with damaged files."""

import json
import re
from base64 import b64decode
from pathlib import Path

from maml.paper.evidence import Evidence, find_evidence
from maml.paper.evidence_view import EvidenceView
from maml.pictures import Lines
from maml.record.contents import Source
from maml.record.gallery import draw
from maml.record.index import find_runs
from tests.paper.fake_runs import SINUSOID, make_run


def evidence(root: Path) -> Evidence:
    return find_evidence(SINUSOID, find_runs(root)[0])


def test_without_runs_the_command_and_settings_are_shown() -> None:
    shown = EvidenceView(set()).show("a/b/c", SINUSOID, Evidence(), 1, "0.67")
    assert "python train.py +experiment=sinusoid_10shot" in shown and "num_iterations" in shown
    assert "<svg" not in shown and "make verify" not in shown
    assert "mean squared error at K=5, step 1" in shown


def test_curves_of_adaptation_and_training_have_a_line_for_each_run(tmp_path: Path) -> None:
    for seed in range(3):
        folder = make_run(tmp_path, mean=0.5 + seed, seed=seed)
        lines = [json.dumps({"iteration": 100 * i, "loss": 1 / i}) + "\n" for i in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    view = EvidenceView({"a/b/c"})
    shown = view.show("a/b/c", SINUSOID, evidence(tmp_path), 1, "0.67")
    adaptation, training, tasks = shown.split("<figure>")[1:]
    for part, label in ((adaptation, "gradient steps"), (training, "iterations")):
        assert part.count("<path") == 3 and f"{label}</text>" in part
        assert [f"seed {seed}</span>" in part for seed in range(3)] == [True] * 3
    assert "Adaptation at meta-test" in adaptation and "loss (log axis)" in training
    assert "mean over 3 of 3 runs" in tasks
    assert "make verify CELL=a/b/c" in shown
    assert view.problems == []


def test_accuracies_of_all_charts_are_in_percent_where_the_paper_prints_percent(tmp_path: Path) -> None:
    source = Source("omniglot_5way_1shot", "accuracy_transductive", 1, scale=100.0)
    folder = make_run(tmp_path, mean=0.9, source=source)
    lines = [json.dumps({"iteration": i, "loss": 1.0, "accuracy": i / 4}) + "\n" for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    shown = EvidenceView(set()).show("a/b/c", source, find_evidence(source, find_runs(tmp_path)[0]), 1, "98.7")
    adaptation, training, tasks = shown.split("<figure>")[1:]
    assert "accuracy transductive (%)</text>" in adaptation
    assert "accuracy (%)</text>" in training and ">60</text>" in training and ">0.6</text>" not in training
    assert "accuracy transductive (%)</text>" in tasks


def test_a_training_loss_is_not_in_percent(tmp_path: Path) -> None:
    source = Source("omniglot_5way_1shot", "accuracy_transductive", 1, scale=100.0)
    folder = make_run(tmp_path, mean=0.9, source=source)
    lines = [json.dumps({"iteration": i, "loss": 1.0 / i}) + "\n" for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    shown = EvidenceView(set()).show("a/b/c", source, find_evidence(source, find_runs(tmp_path)[0]), 1, "98.7")
    (training,) = (part for part in shown.split("<figure>") if "Training:" in part)
    assert "loss (log axis)</text>" in training and ">0.5</text>" in training


def test_pictures_of_the_algorithm_are_part_of_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path, seed=3)
    draw("gates", Lines("gates", "step", "mean", {"forget": [1.0, 0.5]}), folder)
    shown = EvidenceView(set()).show("a/b/c", SINUSOID, evidence(tmp_path), 1, "0.67")
    (content,) = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="gates, seed 3">', shown)
    assert b64decode(content) == (folder / "picture_gates.png").read_bytes()


def test_damaged_files_are_problems_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "metrics.jsonl").write_text("[]\n")
    (folder / "tasks.csv").unlink()
    view = EvidenceView(set())
    shown = view.show("a/b/c", SINUSOID, evidence(tmp_path), 1, "0.67")
    assert "Adaptation at meta-test" in shown and "Training:" not in shown
    for name, problem in zip(("metrics.jsonl", "tasks.csv"), view.problems, strict=True):
        assert str(folder / name) in problem
