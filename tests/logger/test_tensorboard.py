"""The TensorBoard mirror: the content of its event files, and a run without TensorBoard installed."""

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maml.logger.tensorboard import TensorBoard

REPORT = {
    "experiment": "omniglot_5way_1shot",
    "run_id": "1f2e3d",
    "iteration": 30,
    "headline": 0.5,
    "bank": {},
    "curves": [
        {
            "num_shots": 1,
            "metric": "accuracy",
            "steps": [
                {"step": 0, "mean": 0.25, "ci95": 0.125, "num_tasks": 600},
                {"step": 1, "mean": 0.5, "ci95": 0.0625, "num_tasks": 600},
            ],
        }
    ],
}


def test_event_file_holds_metrics_and_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    picture = tmp_path / "curve.png"
    Image.new("RGB", (4, 3)).save(picture)
    logger = TensorBoard()
    logger.start(tmp_path, "omniglot_5way_1shot", "1f2e3d", {"inner": {"step_size": 0.5}}, False)
    for iteration in (10, 20):
        logger.log({"loss": 1 / iteration, "accuracy": 0.5}, iteration)
    logger.report(REPORT, {"curve": picture})
    logger.finish("finished")

    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/accuracy_1shot")] == [(0, 0.25), (1, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("headline")] == [(30, 0.5)]
    (image,) = events.Images("pictures/curve")
    assert (image.width, image.height, image.step) == (4, 3, 30)
    assert b'"step_size": 0.5' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert not caplog.records


def test_diverged_evaluation_leaves_out_its_numbers_and_keeps_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    diverged = {"step": 1, "mean": None, "ci95": None, "num_tasks": 600}
    curve: Any = REPORT["curves"][0]  # type: ignore[index]
    report = REPORT | {"headline": None, "curves": [curve | {"steps": [curve["steps"][0], diverged]}]}
    logger = TensorBoard()
    logger.start(tmp_path, "omniglot_5way_1shot", "1f2e3d", {}, False)
    logger.report(report, {})
    logger.finish("finished")

    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["evaluation/accuracy_1shot"]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/accuracy_1shot")] == [(0, 0.25)]
    assert not caplog.records


def test_showings_are_counted_from_one(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoard()
    logger.start(tmp_path, "omniglot_sequence_mann", "1f2e3d", {}, False)
    logger.report(REPORT | {"measured_by": "showing"}, {})
    logger.finish("finished")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("evaluation/accuracy_1shot")] == [(1, 0.25), (2, 0.5)]


def test_resumed_run_replaces_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # Without a checkpoint, a run that was killed begins again, and is not resumed.
    for resumed, iterations in ((False, (10, 20)), (False, (10, 20, 30)), (True, (20, 30, 40))):
        logger = TensorBoard()
        logger.start(tmp_path, "omniglot_5way_1shot", "1f2e3d", {}, resumed)
        for iteration in iterations:
            logger.log({"loss": 1.0}, iteration)
        logger.finish("interrupted")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 30, 40]


def test_missing_tensorboard_gives_one_warning_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger = TensorBoard()
    logger.start(tmp_path, "omniglot_5way_1shot", "1f2e3d", {}, False)
    logger.log({"loss": 1.0}, 1)
    logger.finish("failed")
    assert "TensorBoard stopped" in caplog.records[0].getMessage() and len(caplog.records) == 1
