"""The list of cells: it is complete, agrees with the paper, and names experiments that exist."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maml.config.compose import compose_experiment
from maml.config.schema import build, build_without_data
from maml.errors import MamlError
from maml.paper import adaptation, trajectories
from maml.paper.cells import Cell, Curve, Table, load_figures, load_levels, load_pictures, load_tables, named_sources
from maml.paper.evidence import measured_by
from maml.record.contents import Source
from tests.paper.printed import printed_tables, published

RESULTS = Path(__file__).parents[2] / "results"
TABLES = printed_tables()
CELLS = {(cell.table, cell.row, cell.column): cell for table in TABLES for cell in table.cells}


def test_cells_are_the_71_of_tables_1_to_5_and_those_of_three_other_sources() -> None:
    names = [path.stem for path in (RESULTS / "paper").glob("table*.csv")]
    printed = {(name, line["method"], line["setting"]) for name in names for line in published(name)}
    assert len(printed) == 71
    others = ["cifar_fs_published", "reptile_published", "vinyals_published"]
    printed |= {(name, line["method"], line["setting"]) for name in others for line in published(name)}
    assert set(CELLS) == printed
    assert len(printed) == sum(len(table.cells) for table in TABLES)


def test_values_and_intervals_equal_the_published_files() -> None:
    for table in TABLES:
        for cell, line in zip(table.cells, published(table.name), strict=True):
            assert cell.value == line["value"]
            if line["ci"]:
                assert cell.ci == line["ci"]


@pytest.mark.parametrize(
    ("table", "figure"), [("table4_pointmass", "fig4_point"), ("table5_cheetah_dir", "fig5_cheetah_dir")]
)
def test_maml_of_tables_4_and_5_takes_its_interval_from_the_figure_of_the_same_numbers(table: str, figure: str) -> None:
    lines = [line for line in published(figure) if line["method"] == "MAML"]
    for step in range(4):
        cell = CELLS[table, "MAML", f"gradsteps_{step}"]
        assert f"{float(lines[step]['mean']):.2f}" == cell.value
        assert cell.ci == lines[step]["ci95_halfwidth"] != ""
        assert not CELLS[table, "context_vector", f"gradsteps_{step}"].ci


def test_rows_of_others_are_quoted() -> None:
    quoted = {cell.row for cell in CELLS.values() if cell.quoted}
    assert quoted == {
        "MANN_noconv", "Siamese", "MatchingNets", "NeuralStatistician", "MemoryModule", "MetaLearnerLSTM",
        "finetune_baseline", "nearest_neighbor_baseline",
    }  # fmt: skip
    run_here = {(cell.table, cell.row) for cell in CELLS.values() if cell.quoted and cell.source}
    assert run_here == {
        ("table1_omniglot", "Siamese"), ("table1_omniglot", "MatchingNets"), ("table1_miniimagenet", "MatchingNets"),
        ("table1_omniglot", "MANN_noconv"),
        ("table1_omniglot", "NeuralStatistician"),
        ("table1_miniimagenet", "MetaLearnerLSTM"),
        ("table1_miniimagenet", "finetune_baseline"), ("table1_miniimagenet", "nearest_neighbor_baseline"),
        ("table1_omniglot", "MemoryModule"),
    }  # fmt: skip


@pytest.mark.parametrize("cell", [pytest.param(cell, id="-".join(key)) for key, cell in CELLS.items() if cell.source])
def test_every_source_composes_and_evaluates_what_the_cell_asks_for(cell: Cell) -> None:
    assert cell.source
    assert_evaluates(cell.source, cell.step)


def test_every_reading_composes_and_evaluates_what_the_cell_asks_for() -> None:
    for cell in CELLS.values():
        for reading in cell.readings:
            assert_evaluates(reading.source, reading.step)


def test_readings_are_after_the_step_of_their_column() -> None:
    steps = [(cell.column, reading.step) for cell in CELLS.values() for reading in cell.readings]
    assert {step for column, step in steps if column.endswith("gradsteps_3")} == {3}
    assert {step for column, step in steps if column.endswith("gradsteps_10")} == {10}


def test_every_curve_and_panel_composes_and_evaluates_what_it_draws() -> None:
    for figure in load_figures(RESULTS):
        for curve in figure.curves:
            assert_evaluates(curve.source, curve.num_steps)
    for picture in load_pictures(RESULTS):
        for panel in picture.panels:
            assert_evaluates(panel.source, max((trajectories if picture.published else adaptation).STEPS))


def assert_evaluates(source: Source, step: int) -> None:
    config = compose_experiment(source.experiment, source.overrides)
    if measured_by(source) == "showing":
        num_shots = build_without_data(config.domain).num_shots
        assert (config.evaluation["num_steps"], source.num_shots) == (0, num_shots)
        assert step < num_shots, "step 0 is the first showing"
        return
    assert step <= config.evaluation["num_steps"]
    assert source.num_shots in (config.evaluation["num_shots"] or [config.domain["num_shots"]])


def test_cells_that_can_be_run_include_those_of_sinusoid_and_omniglot() -> None:
    for step in (1, 5, 10):
        cell = CELLS["table2_multitask", "MAML", f"K5_gradsteps_{step}"]
        assert (cell.source, cell.step) == (Source("sinusoid_10shot", "mse", 5), step)
    omniglot = Source("omniglot_5way_1shot", "accuracy_transductive", 1, scale=100)
    for key in [("table1_omniglot", "MAML_conv", "5way_1shot"), ("table3_context_omniglot", "MAML", "5way_1shot")]:
        assert (CELLS[key].source, CELLS[key].step) == (omniglot, 3)


@pytest.mark.parametrize(
    ("table", "domain", "num_shots"),
    [("table4_pointmass", "point_navigation", 40), ("table5_cheetah_dir", "cheetah_direction", 20)],
)
def test_tables_4_and_5_take_the_returns_of_steps_0_to_3(table: str, domain: str, num_shots: int) -> None:
    for row, algorithm in (("MAML", "maml"), ("context_vector", "context_vector")):
        for step in range(4):
            cell = CELLS[table, row, f"gradsteps_{step}"]
            assert (cell.source, cell.step) == (Source(f"{domain}_{algorithm}", "return", num_shots), step)


def test_every_cell_but_those_quoted_has_an_experiment() -> None:
    assert not [cell for cell in CELLS.values() if cell.source is None and not cell.quoted]
    unpublished = {cell.table for cell in CELLS.values() if not cell.value}
    assert unpublished == {"cifar_fs_published", "vinyals_published"}


def test_the_same_runs_stand_in_table_1_and_in_the_tables_that_quote_it() -> None:
    for table, row, column in CELLS:
        if (table, row) == ("reptile_published", "MAML_transductive"):
            data, _, setting = column.partition("_")
            name = "MAML_conv" if data == "omniglot" else "MAML"
            printed = CELLS[f"table1_{data}", name, setting]
            cell = CELLS[table, row, column]
            assert (cell.source, cell.step, float(cell.value)) == (printed.source, printed.step, float(printed.value))


def test_figures_2_and_7_have_their_tasks_and_one_has_its_points_in_one_half() -> None:
    tasks = {
        picture.name: {panel.task: (panel.source.num_shots, panel.one_half) for panel in picture.panels}
        for picture in load_pictures(RESULTS)
        if not picture.published
    }
    assert list(tasks["figure2"].values()) == [(5, True), (10, False)]
    assert list(tasks["figure7"].values()) == [(5, False)] * 3 + [(10, False)] * 3


def test_pretrained_curves_and_panels_take_the_step_sizes_of_the_papers_legends() -> None:
    evaluation = build(compose_experiment("sinusoid_pretrain").evaluation)
    for figure in load_figures(RESULTS):
        for curve in figure.curves:
            if curve.row.startswith("pretrained_step"):
                size = float(curve.row.removeprefix("pretrained_step"))
                assert evaluation.step_sizes(curve.source.num_shots) == [size] * evaluation.num_steps


def test_figure_3_has_the_rough_levels_of_the_image() -> None:
    (figure,) = (figure for figure in load_figures(RESULTS) if figure.name == "figure3")
    assert figure.curves[0].levels == {0: (3.0, 3.1), 1: (0.3, 0.5), 9: (0.1, 0.2)}
    assert load_levels(RESULTS, "fig3_fig6_sinusoid_approx", "oracle", 5, num_steps=2) == dict.fromkeys(
        range(3), (0.0, 0.05)
    )
    with pytest.raises(MamlError, match="no method sgd at K=5"):
        load_levels(RESULTS, "fig3_fig6_sinusoid_approx", "sgd", 5, num_steps=2)


def test_figure_6_has_no_levels_where_those_of_the_image_are_not_credible() -> None:
    (figure,) = (figure for figure in load_figures(RESULTS) if figure.name == "figure6")
    assert {curve.source.num_shots for curve in figure.curves if curve.levels} == {5, 10}


def test_named_sources_have_the_step_of_a_cell_and_every_step_of_a_curve() -> None:
    steps = {name: [*steps] for name, (_, steps) in named_sources(RESULTS).items()}
    assert steps["table1_omniglot/MAML_conv/5way_1shot"] == [3]
    assert steps["figure4/MAML/fig4_point"] == [0, 1, 2, 3]


CURVES = [curve for figure in load_figures(RESULTS) for curve in figure.curves if curve.cells]


@pytest.mark.parametrize("curve", [pytest.param(curve, id=curve.label) for curve in CURVES])
def test_curves_of_figures_4_and_5_equal_the_published_files(curve: Curve) -> None:
    lines = [line for line in published(curve.cells[0].table) if line["method"] == curve.row][: curve.num_steps + 1]
    assert [(cell.row, cell.value, cell.ci, cell.step) for cell in curve.cells] == [
        (curve.row, line["mean"], line["ci95_halfwidth"], int(line["grad_step"])) for line in lines
    ]
    assert curve.levels == {
        step: (float(line["boot68_low"]), float(line["boot68_high"])) for step, line in enumerate(lines)
    }
    assert {line["plotted_in_paper"] for line in lines} == {"yes" if curve.is_plotted else "no"}
    assert curve.is_plotted == (curve.row != "random" or "velocity" not in curve.panel)


def test_curves_of_figures_4_and_5_are_four_methods_in_each_of_five_panels() -> None:
    experiments = {"MAML": "maml", "pretrained": "pretrain", "random": "random_init", "oracle": "oracle"}
    domains = ["point_navigation", "cheetah_velocity", "cheetah_direction", "ant_velocity", "ant_direction"]
    assert [(curve.source.experiment, curve.num_steps) for curve in CURVES] == [
        (f"{domain}_{name}", 0 if row == "oracle" else 3) for domain in domains for row, name in experiments.items()
    ]
    assert {curve.panel: curve.source.num_shots for curve in CURVES} == {
        "point robot, K=40": 40,
        "half-cheetah, goal velocity, K=20": 20,
        "half-cheetah, forward/backward, K=20": 20,
        "ant, goal velocity, K=20": 20,
        "ant, forward/backward, K=40": 40,
    }
    assert {curve.source.metric for curve in CURVES} == {"return"}


def test_figure_4_has_every_published_trajectory_and_its_goal() -> None:
    (picture,) = (picture for picture in load_pictures(RESULTS) if picture.published)
    assert list(picture.published) == published("fig4_paths_trajectories")
    assert [(panel.row, panel.task) for panel in picture.panels] == [("MAML", 6), ("pretrained", 6)]
    assert set(trajectories.STEPS) == {int(line["grad_step"]) for line in picture.published}


def test_command_names_overrides_and_seeds() -> None:
    source = Source("sinusoid_10shot", "mse", 5, overrides=("evaluation.num_shots=[5]",))
    assert source.command([]) == "python train.py +experiment=sinusoid_10shot 'evaluation.num_shots=[5]'"
    assert Source("a", "mse", 5).command([0]) == "python train.py +experiment=a"
    assert Source("a", "mse", 5).command([3]) == "python train.py +experiment=a seed=3"
    assert Source("a", "mse", 5).command([0, 1, 2]) == "python train.py -m +experiment=a seed=0,1,2"


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("row: MAML_conv, column: 20way_5shot", "row: MAML_conv, column: 20way_50shot", "MAML_conv/20way_50shot"),
        ("K5_gradsteps_10: {step: 10}", "K5_gradsteps_9: {step: 9}", "K5_gradsteps_9, MAML/K5_gradsteps_9"),
        ("MANN_noconv: MANN, no conv", "WOMANN: MANN, no conv", "WOMANN"),
        ("quoted: [MANN_noconv, Siamese,", "quoted: [MatchMakingNets,", "MatchMakingNets"),
    ],
)
def test_a_row_that_the_paper_does_not_have_is_named(right: str, wrong: str, named: str, tmp_path: Path) -> None:
    text = (RESULTS / "cells.yaml").read_text()
    assert right in text
    (tmp_path / "cells.yaml").write_text(text.replace(right, wrong))
    (tmp_path / "paper").symlink_to(RESULTS / "paper")
    with pytest.raises(MamlError, match=f"results/paper/table.*csv has no {named}"):
        load_tables(tmp_path)


def load_with_row(folder: Path, change: Callable[[dict[str, Any]], object]) -> Table:
    """Adds the row ``another`` to Table 2, changes the table's entry, and loads it; a fork may have rows of its own."""
    content = yaml.safe_load((RESULTS / "cells.yaml").read_text())
    entry = content["tables"]["table2_multitask"]
    entry["layout"]["groups"][-1]["another"] = "Another"
    entry["added"] = [*entry.get("added", []), "another"]
    entry["runs"].append({"row": "another", "column": "K5_gradsteps_1", "experiment": "sinusoid_reptile"})
    change(entry)
    (folder / "cells.yaml").write_text(yaml.safe_dump(content))
    if not (folder / "paper").exists():
        (folder / "paper").symlink_to(RESULTS / "paper")
    return next(table for table in load_tables(folder) if table.name == "table2_multitask")


def test_row_that_a_reader_added_is_a_cell_without_a_printed_number(tmp_path: Path) -> None:
    table = load_with_row(tmp_path, lambda entry: None)
    (cell,) = (cell for cell in table.cells if cell.row == "another")
    assert (cell.column, cell.value, cell.step, cell.is_of_paper) == ("K5_gradsteps_1", "", 1, False)
    assert cell.decimals == 3, "as the printed numbers beside it"
    assert all(cell.is_of_paper for cell in table.cells[:15])
    assert not any(cell.is_of_paper for table in TABLES if not table.in_paper for cell in table.cells)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(added="another"),
        lambda entry: entry["added"].append("MAML"),
        lambda entry: entry["added"].append("other"),
        lambda entry: entry["layout"]["own"].append("another"),
        lambda entry: entry["layout"]["groups"][-1].pop("another"),
        lambda entry: entry["runs"][-1].update(row="MAML"),
    ],
)
def test_row_that_is_added_wrongly_is_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    with pytest.raises(MamlError, match=r"table2_multitask: added: .* has to be a list of rows"):
        load_with_row(tmp_path, change)


def test_added_row_of_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MamlError, match=r"has no .*another/K5_gladsteps_1"):
        load_with_row(tmp_path, lambda entry: entry["runs"][-1].update(column="K5_gladsteps_1"))


def test_experiment_that_does_not_exist_is_named(tmp_path: Path) -> None:
    text = (RESULTS / "cells.yaml").read_text()
    (tmp_path / "cells.yaml").write_text(text.replace("experiment: sinusoid_10shot,", "experiment: mine,", 1))
    (tmp_path / "paper").symlink_to(RESULTS / "paper")
    with pytest.raises(MamlError, match=r"names the experiment mine, but there is no .*conf/experiment/mine\.yaml"):
        load_tables(tmp_path)


def test_a_curve_that_the_paper_does_not_have_is_named(tmp_path: Path) -> None:
    text = (RESULTS / "cells.yaml").read_text()
    right, wrong = "panel: fig4_point, row: random", "panel: fig4_point, row: aimless"
    assert right in text
    (tmp_path / "cells.yaml").write_text(text.replace(right, wrong))
    (tmp_path / "paper").symlink_to(RESULTS / "paper")
    with pytest.raises(MamlError, match=r"fig4_point\.csv has no method aimless with steps 0 to 3"):
        load_figures(tmp_path)


def test_figures_have_30_drawn_curves() -> None:
    figures = [figure for figure in load_figures(RESULTS) if figure.in_paper]
    drawn = {figure.name: sum(curve.is_plotted for curve in figure.curves) for figure in figures}
    assert drawn == {"figure3": 3, "figure6": 9, "figure4": 4, "figure5": 14}


def test_every_experiment_belongs_to_a_cell_curve_or_picture_of_the_paper_or_says_that_it_does_not() -> None:
    sources = [cell.source for table in TABLES if table.in_paper for cell in table.cells if cell.source]
    sources += [reading.source for table in TABLES for cell in table.cells for reading in cell.readings]
    sources += [curve.source for figure in load_figures(RESULTS) if figure.in_paper for curve in figure.curves]
    sources += [panel.source for picture in load_pictures(RESULTS) for panel in picture.panels]
    in_paper = {source.experiment for source in sources}
    loaded = {cell.source for table in load_tables(RESULTS) for cell in table.cells}
    own = {source.experiment for source in loaded - {cell.source for cell in CELLS.values()} if source}
    for path in sorted((RESULTS.parent / "conf" / "experiment").glob("*.yaml")):
        if path.stem in own:
            continue
        header = path.read_text().splitlines()[1]
        assert header.startswith("# Not in the paper") != (path.stem in in_paper), path.stem


def test_the_71_cells_of_the_paper_are_those_of_its_own_tables() -> None:
    assert sum(len(table.cells) for table in TABLES if table.in_paper) == 71
    others = {table.name for table in TABLES if not table.in_paper}
    assert others == {"cifar_fs_published", "reptile_published", "vinyals_published"}


def test_only_intervals_of_figures_are_not_printed_beside_the_value() -> None:
    hidden = {(cell.table, cell.row) for cell in CELLS.values() if cell.ci and not cell.ci_is_printed}
    assert hidden == {("table4_pointmass", "MAML"), ("table5_cheetah_dir", "MAML")}


def test_notes_stand_where_numbers_were_missed_and_do_not_change_the_source() -> None:
    cell = CELLS["table2_multitask", "multitask_l2", "K5_gradsteps_5"]
    assert cell.note == "multitask-averaging"
    assert cell.source == Source("sinusoid_multitask_average_l2", "mse", 5)
    assert {curve.note for curve in load_figures(RESULTS)[0].curves} == {"", "pretrained-curves"}


def test_manns_cells_are_showings_2_and_5_and_its_figure_has_these_two_points() -> None:
    for column, step in (("5way_1shot", 1), ("5way_5shot", 4)):
        cell = CELLS["table1_omniglot", "MANN_noconv", column]
        assert (cell.source, cell.step) == (Source("omniglot_sequence_mann", "accuracy", 10, scale=100), step)
    (figure,) = (figure for figure in load_figures(RESULTS) if figure.measured_by == "showing")
    mann, lstm = figure.curves
    assert (figure.in_paper, mann.points, lstm.points) == (False, {1: "82.8", 4: "94.9"}, {})
    assert mann.levels == {
        1: (pytest.approx(82.75), pytest.approx(82.85)),
        4: (pytest.approx(94.85), pytest.approx(94.95)),
    }
