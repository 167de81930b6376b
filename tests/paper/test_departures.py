"""The list of departures: what it names exists, and its table shows the effects of runs."""

import json
from pathlib import Path

from maml.config.compose import compose_experiment
from maml.config.identity import training_config
from maml.paper.departures import departures_table, load_departures, readings_of
from maml.paper.evidence import Evidence, find_evidence
from maml.record.index import find_runs
from tests.paper.fake_runs import make_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def test_departures_are_complete_and_point_into_the_code() -> None:
    entries = load_departures(RESULTS)
    assert len(entries) == 36
    for entry in entries:
        assert entry.keys() - {"measured"} == {"topic", "paper", "code", "ours", "where"}
        for place in entry["where"]:
            file, _, text = place.partition(": ")
            assert text in (ROOT / file).read_text(), place


def test_departures_are_measured_by_what_they_name() -> None:
    for measured in (entry["measured"] for entry in load_departures(RESULTS) if "measured" in entry):
        choices = []
        for label, source, step in readings_of(measured):
            config = compose_experiment(source.experiment, source.overrides)
            evaluation, domain = config.evaluation, config.domain
            assert source.num_shots in (evaluation["num_shots"] or [domain["num_shots"]]), label
            assert step <= evaluation["num_steps"]
            choices.append((json.dumps(training_config(config)), json.dumps(evaluation), source.metric, step))
        assert len(set(choices)) == len(choices) == 2, "the choices are the same"


def test_table_has_a_row_for_each_departure_and_the_readings_of_its_runs(tmp_path: Path) -> None:
    entries = load_departures(RESULTS)
    without = departures_table(RESULTS, lambda source: Evidence())
    assert without.count("<tr>") == 1 + len(entries)
    assert "effect not measured" in without and "not run" in without
    measured = next(entry["measured"] for entry in entries if "measured" in entry)
    (_, source, _), *_ = readings_of(measured)
    make_run(tmp_path, mean=0.123, source=source)
    runs, _ = find_runs(tmp_path)
    assert "0.12 ± 0.10" in departures_table(RESULTS, lambda each: find_evidence(each, runs))
