"""Every experiment in conf/experiment/: it composes, builds what it says, and survives +debug=smoke."""

from __future__ import annotations

from pathlib import Path

import pytest

from maml.config import build, compose
from maml.experiment import build_algorithm, run_experiment
from maml.hardware import Hardware
from maml.run import RunFolder, read_json
from tests.runs import ROOT, TinyRuns, assert_same_run

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_survives_smoke(name: str, tmp_path: Path, cache_dir: Path) -> None:
    places = [f"runs_dir={tmp_path}", f"cache_dir={cache_dir}", "hardware=cpu", "hardware.num_threads=1"]
    config, experiment = compose([f"+experiment={name}", "+debug=smoke", *places], ROOT / "conf")
    headline = run_experiment(config, experiment)
    folder = RunFolder(config, experiment).path
    assert folder.parent == tmp_path / name
    report = read_json(folder / "report.json")
    assert report is not None
    assert report["headline"] == headline


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_opens_with_the_number_it_reproduces(name: str) -> None:
    first, second, *_ = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    assert second.startswith(("# Table", "# Figure", "# Not in the paper"))


@pytest.mark.parametrize("experiment", [[], ["+experiment=omniglot_5way_1shot"], ["+experiment=sinusoid_10shot"]])
def test_fomaml_is_first_order_in_config_and_in_the_built_object(experiment: list[str], cache_dir: Path) -> None:
    for algorithm, order in (("maml", 2), ("fomaml", 1)):
        overrides = [*experiment, f"algorithm={algorithm}", f"cache_dir={cache_dir}"]
        config, _ = compose(overrides, ROOT / "conf")
        assert config["inner"]["order"] == order
        assert build(config["inner"]).order == order
        assert build_algorithm(config, Hardware("cpu")).inner.order == order


def test_omniglot_5way_1shot_is_the_papers(cache_dir: Path) -> None:
    config, _ = compose(["+experiment=omniglot_5way_1shot", f"cache_dir={cache_dir}"], ROOT / "conf")
    algorithm = build_algorithm(config, Hardware("cpu"))
    assert (config["meta_batch_size"], config["num_iterations"]) == (32, 60_000)
    assert (algorithm.inner.step_size, algorithm.inner.num_steps, algorithm.inner.order) == (0.4, 1, 2)
    assert build(config["evaluation"]).num_steps == 3
    assert build(config["evaluation"]).num_tasks == 600
    assert sum(value.numel() for value in algorithm.theta.values()) == 640 + 3 * (36_928) + 4 * 64 + 325
    assert not any("shift" in name for name in algorithm.inner.adapted_names(list(algorithm.theta)))


def test_sinusoid_10shot_is_the_papers() -> None:
    config, _ = compose(["+experiment=sinusoid_10shot"], ROOT / "conf")
    algorithm = build_algorithm(config, Hardware("cpu"))
    assert (config["meta_batch_size"], config["num_iterations"]) == (25, 70_000)
    assert (algorithm.inner.step_size, algorithm.inner.num_steps, algorithm.domain.num_shots) == (0.001, 1, 10)
    assert build(config["evaluation"]).num_shots == [5, 10, 20]
    assert sum(value.numel() for value in algorithm.theta.values()) == 1761


def test_multirun_makes_a_folder_for_each_job_and_outlives_those_that_fail(tiny: TinyRuns) -> None:
    process = tiny.start("-m", "seed=0,1,2", "inner.step_size=0.02,-1", "+debug=smoke")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert stderr.count("the config is not usable") >= 3
    for seed in (0, 1, 2):
        assert f"seed={seed} inner.step_size=-1" in stderr, "each job that failed is named"
    records = [read_json(path) for path in tiny.runs_dir.glob("custom/*/run.json")]
    assert sorted((record["seed"], record["status"]) for record in records if record) == [
        (seed, "finished") for seed in (0, 1, 2)
    ]
    last = ("+debug=smoke", "seed=2", "inner.step_size=0.02")
    assert_same_run(tiny.folder(*last), tiny.beside("alone").run(*last))  # nothing of the earlier jobs is in it
