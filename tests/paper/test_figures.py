"""Figures with runs and without."""

import csv
import runpy
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from maml.errors import MamlError
from maml.paper.cells import Curve, Figure, Panel, Picture, load_figures
from maml.paper.evidence import Evidence, find_evidence
from maml.paper.figures import CurveComparison, DrawnCurve, bootstrap_interval, plot_figure, prepare_curve
from maml.paper.plan import WATERMARK
from maml.record.contents import Source
from maml.record.index import find_runs
from maml.record.labels import AXIS
from maml.record.style import style
from tests.paper.fake_runs import POINT, SINUSOID, make_run, make_run_with_checkpoint

ROOT = Path(__file__).parents[2]
KINDS = ("png", "pdf", "svg")
PICTURE = Picture("figure2", "Figure 2", ())
PANEL = Panel("MAML", 0, False, SINUSOID)
main = runpy.run_path(str(ROOT / "scripts" / "paper_figures.py"))["main"]


@pytest.fixture
def painted() -> None:
    """Asks for pictures. A test that does not has none: to paint seven of them takes nearly all of its time."""


@pytest.fixture(scope="module")
def unrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with all pictures as they are without runs."""
    folder = tmp_path_factory.mktemp("unrun")
    render(folder)
    return folder


@pytest.fixture(autouse=True)
def _painted_on_demand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "painted" not in request.fixturenames:
        monkeypatch.setattr(Canvas, "savefig", lambda *_, **__: None)


def render(tmp_path: Path, figure: str = "figure3", status: int = 0) -> list[dict[str, str]]:
    (tmp_path / "runs").mkdir(exist_ok=True)
    assert main(["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path)]) == status
    return rendered(tmp_path, figure)


def rendered(tmp_path: Path, figure: str) -> list[dict[str, str]]:
    with open(tmp_path / figure.partition("_")[0] / f"{figure}.csv", newline="") as file:
        return list(csv.DictReader(file))


def pictures(tmp_path: Path) -> dict[str, bytes]:
    names = {"figure2", "figure3", "figure4", "figure4_trajectories", "figure5", "figure6", "figure7"}
    found = {path.name: path.read_bytes() for path in tmp_path.glob("figure*/*.[ps][ndv]*")}
    assert set(found) == {f"{name}.{kind}" for name in names for kind in KINDS}
    for name, content in found.items():
        assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[name[-3:]])
        assert b"CreationDate" not in content and b"<dc:date>" not in content
    return found


def evidence(root: Path, source: Source = SINUSOID) -> Evidence:
    return find_evidence(source, find_runs(root)[0])


def test_without_runs_figure_3_shows_the_papers_levels_and_says_not_run(
    unrun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in render(tmp_path) if row["curve"] == "MAML"]
    assert "Figure 3: sinusoid, MAML, K=10: not run" in capsys.readouterr().out
    assert "| MAML, K=10 | not run |" in (tmp_path / "figures.md").read_text()
    assert [row["grad_step"] for row in rows] == [str(step) for step in range(10)]
    assert {(row["ours"], row["verdict"]) for row in rows} == {("", "not run")}
    assert (rows[1]["paper_low"], rows[1]["paper_high"], rows[2]["paper_low"]) == ("0.3", "0.5", "")
    assert rendered(tmp_path, "figure2") == []
    pictures(unrun)


@pytest.mark.usefixtures("painted")
def test_a_finished_run_is_drawn_and_the_same_run_gives_the_same_bytes(unrun: Path, tmp_path: Path) -> None:
    without = pictures(unrun)
    make_run_with_checkpoint(tmp_path / "runs", mean=0.5, ci95=0.1)
    rows = [row for row in render(tmp_path) if row["curve"] == "MAML"]
    assert {(row["ours"], row["ours_ci95"]) for row in rows} == {("0.5", "0.1")}
    # The printed curve was read off at 0, 1 and 9 only: 3.0 to 3.1, 0.3 to 0.5, 0.1 to 0.2.
    assert [row["verdict"] for row in rows] == ["better", "reproduced", *["measured"] * 7, "worse"]
    with_run = pictures(tmp_path)
    render(tmp_path)
    assert with_run == pictures(tmp_path)
    assert {name for name, content in without.items() if with_run[name] == content} == {
        f"{name}.{kind}" for name in ("figure4", "figure4_trajectories", "figure5") for kind in KINDS
    }
    overview = (tmp_path / "figures.md").read_text()
    assert [overview.index(f"## Figure {number}:") for number in (2, 3, 6, 7)] == sorted(
        overview.index(f"## Figure {number}:") for number in (2, 3, 6, 7)
    )
    # Figures 2 and 7 have no verdict, Figure 6 has.
    assert overview.count("| MAML, K=5 | finished | 0 | 0123456+ | CPU, Abacus | `python train.py +experiment=") == 2
    assert "| MAML, K=5 | better, no reason known yet (2 of 3 steps reproduced) | 0 | 0123456+ |" in overview
    assert "\n0 of 30 curves reproduced, 1 better, 2 worse, 1 measured, 0 reduced budget, 26 not run. " in overview
    assert "The verdicts are those of the 30 curves that the paper draws.\n" in overview


def test_figure_6_has_the_steps_0_to_9_at_every_k(tmp_path: Path) -> None:
    rows = [row for row in render(tmp_path, "figure6") if row["curve"] == "MAML"]
    assert [(int(row["num_shots"]), int(row["grad_step"])) for row in rows] == [
        (num_shots, step) for num_shots in (5, 10, 20) for step in range(10)
    ]


def test_an_unfinished_run_is_reduced_budget_and_its_tasks_are_not_drawn(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path / "runs", done=30_000, status="interrupted")
    rows = [row for row in render(tmp_path) if row["curve"] == "MAML"]
    assert {(row["iteration"], row["verdict"]) for row in rows} == {("30000", "reduced budget")}
    assert rendered(tmp_path, "figure7") == []


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ((0.3, 0.5), "reproduced"),  # the range lies in our interval, 0.3 to 0.7
        ((0.6, 3.0), "reproduced"),  # the range and our interval overlap
        ((0.7, 0.9), "reproduced"),  # the range touches our interval
        ((0.8, 0.9), "better"),
        ((0.1, 0.2), "worse"),
        ((0.5, 0.5), "reproduced"),
        ((0.25, 0.25), "worse"),
    ],
)
def test_a_step_read_off_the_image_is_reproduced_if_intervals_overlap(
    level: tuple[float, float], expected: str, tmp_path: Path
) -> None:
    make_run(tmp_path, mean=0.5, ci95=0.2)
    curve = Curve("MAML", "K=5", SINUSOID, 2, {1: level}, note="a-note")
    judged = CurveComparison(curve, evidence(tmp_path))
    assert judged.steps == ["measured", expected, "measured"]
    assert (judged.verdict, judged.reason) == (expected, "" if expected == "reproduced" else "a-note")
    assert CurveComparison(curve, Evidence()).verdict == "not run"


def test_a_curve_is_reproduced_if_every_step_is_and_else_what_its_last_missed_step_is(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5, ci95=0.1)
    found, near, low, high = evidence(tmp_path), (0.4, 0.5), (0.1, 0.2), (0.8, 0.9)
    for levels, expected in [
        ([near, near, near], "reproduced"),
        ([near, near, low], "worse"),
        ([low, near, high], "better"),
        ([low, near, near], "worse"),
    ]:
        judged = CurveComparison(Curve("MAML", "K=5", SINUSOID, 2, dict(enumerate(levels))), found)
        assert judged.verdict == expected
    assert judged.text == "worse, no reason known yet (2 of 3 steps reproduced)"


def test_a_diverged_curve_is_worse(tmp_path: Path) -> None:
    make_run(tmp_path, mean=None)
    judged = CurveComparison(Curve("MAML", "K=5", SINUSOID, 0, {0: (0.1, 9.0)}), evidence(tmp_path))
    assert judged.verdict == "worse"


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    report = make_run(tmp_path / "runs") / "report.json"
    report.write_text("{")
    render(tmp_path, status=1)
    assert f"**ERROR, left out:** {report} is damaged" in (tmp_path / "figures.md").read_text()


def test_a_finished_run_without_its_checkpoint_is_named_once_and_its_curves_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", mean=0.5)
    assert render(tmp_path, status=1)[0]["ours"] == "0.5"
    overview = (tmp_path / "figures.md").read_text()
    assert overview.count(f"**ERROR, left out:** there is no checkpoint at {folder / 'checkpoint.pt'}") == 1


def test_each_k_is_a_panel_and_what_never_adapts_a_flat_line(monkeypatch: pytest.MonkeyPatch) -> None:
    items: list[DrawnCurve] = []
    for num_shots in (5, 20):
        adapts, flat = (
            Curve(row, f"K={num_shots}", Source(row, "mse", num_shots), num_steps, {0: (0.0, 0.1)})
            for row, num_steps in (("MAML", 2), ("oracle", 0))
        )
        items += [DrawnCurve(adapts, [(3.0, 0.1), (2.0, 0.1), (1.0, 0.1)])]
        items += [DrawnCurve(flat, [(0.5, 0.1)])]
    canvas = drawn_canvas(Figure("figure6", "Figure 6", "mse", ()), items, monkeypatch)
    assert [axes.get_title() for axes in canvas.axes] == ["K=5", "K=20"]
    for axes in canvas.axes:
        assert [np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()] == [
            [3.0, 2.0, 1.0],
            [0.5, 0.5, 0.5],
        ]


def test_bootstrap_interval_equals_a_slow_reference() -> None:
    values = np.random.default_rng(1).normal(-40.0, 13.0, size=40)
    chosen = np.random.default_rng(0).integers(40, size=5000 * 40).tolist()
    means = sorted(sum(values[index] for index in chosen[40 * n : 40 * n + 40]) / 40 for n in range(5000))

    def percentile(percent: float) -> float:
        below, part = divmod((len(means) - 1) * percent / 100, 1)
        return means[int(below)] + part * (means[int(below) + 1] - means[int(below)])

    assert bootstrap_interval(values) == pytest.approx((percentile(16), percentile(84)), rel=1e-12)


def test_bootstrap_interval_is_about_one_standard_error_to_both_sides() -> None:
    # MAML's first row in fig4_point.csv: the published mean and spread over goals; the band is -42.43 to -38.40.
    values = np.random.default_rng(1).normal(size=40)
    low, high = bootstrap_interval(-40.4072 + 12.9246 * (values - values.mean()) / values.std())
    assert (low, high) == pytest.approx((-42.4292, -38.4041), abs=0.25)


def test_without_runs_figure_4_has_the_papers_numbers_and_says_not_run(tmp_path: Path) -> None:
    rows = render(tmp_path, "figure4")
    assert [(row["curve"], row["grad_step"]) for row in rows] == [
        *((curve, str(step)) for curve in ("MAML", "pretrained", "random") for step in range(4)),
        ("oracle", "0"),
    ]
    assert {(row["ours"], row["ours_ci95"], row["ours_low68"], row["verdict"]) for row in rows} == {
        ("", "", "", "not run")
    }
    paper = "paper", "paper_ci95", "paper_low68", "paper_high68"
    assert [rows[1][name] for name in paper] == ["-11.6800", "2.1915", "-12.7365", "-10.5682"]
    shown = [
        (row["panel"], row["plotted_in_paper"]) for row in rendered(tmp_path, "figure5") if row["curve"] == "random"
    ]
    assert [flag for _, flag in shown] == ["no"] * 4 + ["yes"] * 4 + ["no"] * 4 + ["yes"] * 4
    overview = (tmp_path / "figures.md").read_text()
    assert "| random initialization, ant, goal velocity, K=20 | not run |" in overview
    assert "![Figure 4, bottom: first rollout to one of the goals](figure4/figure4_trajectories.png)" in overview
    assert "with a step size of 0.25 at every step" in overview.replace("\n", " ")


def test_figure_4_judges_every_step_of_a_finished_run_as_the_tables_do(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path / "runs", source=POINT, mean=-11.0, ci95=0.1)
    rows = [row for row in render(tmp_path, "figure4", status=1) if row["curve"] == "MAML"]  # without the trajectory
    assert [row["verdict"] for row in rows] == ["better", "reproduced", "worse", "worse"]
    assert {(row["ours"], row["ours_ci95"]) for row in rows} == {("-11.0", "0.1")}
    expected = bootstrap_interval(-11.0 + np.linspace(-1, 1, 40))
    assert [(float(row["ours_low68"]), float(row["ours_high68"])) for row in rows] == [pytest.approx(expected)] * 4


def test_figure_4_judges_nothing_that_was_not_trained_to_the_end(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", source=POINT, mean=-11.68, done=30, status="interrupted")
    rows = [row for row in render(tmp_path, "figure4") if row["curve"] == "MAML"]
    assert {(row["ours"], row["verdict"], row["iteration"]) for row in rows} == {("-11.68", "reduced budget", "30")}
    assert {row["by"] for row in rendered(tmp_path, "figure4_trajectories")} == {"paper"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, r"tasks\.csv is missing or damaged"),
        ("num_shots,metric,task\n40,return,0\n", r"tasks\.csv is missing or damaged"),
        ("num_shots,metric,task,step_0\n40,return,0,-12\n", r"tasks\.csv does not belong to the report"),
    ],
)
def test_values_per_task_that_are_missing_or_not_the_reports_are_refused(
    tmp_path: Path, content: str | None, named: str
) -> None:
    path = make_run(tmp_path, source=POINT, mean=-11.0) / "tasks.csv"
    path.unlink()
    if content:
        path.write_text(content)
    with pytest.raises(MamlError, match=named):
        evidence(tmp_path, POINT).evaluated[0][1].per_task(POINT, 0)


def test_a_curve_without_its_values_per_task_is_named_and_left_out(tmp_path: Path) -> None:
    (make_run_with_checkpoint(tmp_path / "runs", source=POINT, mean=-11.0) / "tasks.csv").unlink()
    rows = [row for row in render(tmp_path, "figure4", status=1) if row["curve"] == "MAML"]
    assert {(row["ours"], row["verdict"]) for row in rows} == {("", "not run")}
    assert (tmp_path / "figures.md").read_text().count("tasks.csv is missing or damaged") == 1


def drawn_canvas(figure: Figure, items: list[DrawnCurve], monkeypatch: pytest.MonkeyPatch) -> Canvas:
    canvases: list[Canvas] = []
    monkeypatch.setattr(Canvas, "savefig", lambda self, *_, **__: canvases.append(self))
    monkeypatch.setattr("maml.record.style.write_bytes_atomically", lambda path, content: None)
    plot_figure(figure, items, Path("unused.png"))
    assert len(canvases) == len(KINDS)
    return canvases[0]


def legend(canvas: Canvas) -> list[str]:
    (only,) = canvas.legends
    assert not any(axes.get_legend() for axes in canvas.axes)
    return [text.get_text() for text in only.get_texts()]


def explanation(axes: Axes) -> str:
    return " ".join(text.get_text() for text in axes.texts).replace("\n", " ")


def test_figure_5_draws_the_published_curve_in_each_panel_and_leaves_out_what_the_paper_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (figure,) = (figure for figure in load_figures(ROOT / "results") if figure.name == "figure5")
    canvas = drawn_canvas(figure, [prepare_curve(curve, Evidence()) for curve in figure.curves], monkeypatch)
    assert len(canvas.axes) == 4
    assert legend(canvas) == ["MAML", "pretrained", "random initialization", "oracle", "paper"]
    for axes in canvas.axes:
        curves = [curve for curve in figure.curves if curve.panel == axes.get_title().replace("\n", " ")]
        names = [curve.row for curve in curves if curve.row != "random" or "velocity" not in curve.panel]
        lines = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
        assert list(lines) == [f"{name.replace('random', 'random initialization')}, paper" for name in names]
        assert explanation(axes) == "ours not run"
        assert lines["MAML, paper"] == [float(cell.value) for cell in curves[0].cells]
        assert lines["oracle, paper"] == [float(curves[-1].cells[0].value)] * 4


def test_figure_4_has_the_papers_axis_and_widens_it_for_a_curve_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (figure,) = (figure for figure in load_figures(ROOT / "results") if figure.name == "figure4")
    for mean, limits in ((-11.0, (-100, -2)), (-1.0, (-100, pytest.approx(-0.8, abs=0.15)))):
        make_run(tmp_path, source=POINT, mean=mean)
        items = [prepare_curve(curve, evidence(tmp_path, curve.source)) for curve in figure.curves]
        (axes,) = drawn_canvas(figure, items, monkeypatch).axes
        assert (axes.get_yscale(), axes.get_ylim()) == ("symlog", limits)
        lines = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
        assert lines["MAML, ours"] == [mean] * 4
        assert axes.get_ylabel() == "average return (symlog axis)"


def test_every_axis_of_every_figure_has_a_label_and_whole_gradient_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, mean=0.5)
    for figure in load_figures(ROOT / "results"):
        items = [prepare_curve(curve, evidence(tmp_path, curve.source)) for curve in figure.curves]
        canvas = drawn_canvas(figure, items, monkeypatch)
        with style():
            canvas.draw_without_rendering()
        first = canvas.axes[0]
        for axes in canvas.axes:
            assert axes.get_xlabel() == AXIS[figure.measured_by]
            assert axes.get_ylabel() or axes in first.get_shared_y_axes().get_siblings(first)
            assert all(float(tick).is_integer() for tick in axes.get_xticks())
        assert first.get_ylabel().startswith(figure.ylabel)


def test_a_method_has_one_colour_and_one_name_in_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    colours: dict[str, set[str]] = {}
    for figure in load_figures(ROOT / "results"):
        items = [DrawnCurve(curve, [(1.0, 0.1)] * (curve.num_steps + 1)) for curve in figure.curves]
        canvas = drawn_canvas(figure, items, monkeypatch)
        assert not any("_" in name for name in legend(canvas))
        for line in (line for axes in canvas.axes for line in axes.get_lines()):
            colours.setdefault(str(line.get_label()).partition(",")[0], set()).add(str(line.get_color()))
    assert list(colours) == ["MAML", "pretrained", "oracle", "random initialization", "MANN", "LSTM"]
    assert [len(each) for each in colours.values()] == [1] * 6
    assert len(set.union(*colours.values())) == 6


def test_a_reduced_budget_is_dashed_and_a_curve_without_runs_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, fourth = (
        Curve(row, "K=5", Source(row, "mse", 5), 1, {0: (0.9, 1.1)} if row == "a" else {}) for row in "abcd"
    )
    items = [
        DrawnCurve(first, [(1.0, 0.1), (0.5, 0.1)], num_runs=3),
        DrawnCurve(second, [(2.0, 0.1), (1.5, 0.1)], missing="20 of 50 iterations"),
        DrawnCurve(third, [], missing="not run"),
        DrawnCurve(fourth, [], missing="not run"),
    ]
    canvas = drawn_canvas(Figure("figure6", "Figure 6", "mse", ()), items, monkeypatch)
    (axes,) = canvas.axes
    full, reduced = axes.get_lines()
    assert (full.get_linestyle(), reduced.get_linestyle()) == ("-", "--")
    assert full.get_markerfacecolor() == full.get_color() and reduced.get_markerfacecolor() == "none"
    assert legend(canvas) == ["a (3 runs)", "b", "paper, read off its image", "ours", "ours, reduced budget"]
    assert explanation(axes) == "b: 20 of 50 iterations ours not run: c, d"
    canvas = drawn_canvas(Figure("figure6", "Figure 6", "mse", ()), items[1:3], monkeypatch)
    assert legend(canvas) == ["b", "ours, reduced budget"]


def test_ranges_that_cannot_be_read_are_neither_drawn_nor_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, mean=0.5)
    (figure,) = (figure for figure in load_figures(ROOT / "results") if figure.name == "figure6")
    for curve in figure.curves:
        assert bool(curve.levels) == (curve.source.num_shots != 20)
        if not curve.levels and curve.row == "MAML":
            judged = CurveComparison(curve, evidence(tmp_path, curve.source))
            assert (judged.verdict, set(judged.steps)) == ("measured", {"measured"})
    canvas = drawn_canvas(figure, [prepare_curve(curve, Evidence()) for curve in figure.curves], monkeypatch)
    assert [len(axes.patches) > 0 for axes in canvas.axes] == [True, True, False]
    assert "not credible" in figure.note


def test_the_svg_has_the_colour_of_the_page_and_keeps_its_text(unrun: Path) -> None:
    svg = (unrun / "figure5" / "figure5.svg").read_text()
    assert "currentColor" in svg
    assert "gradient steps</text>" in svg and "goal velocity, K=20</text>" in svg
    assert "<g id=" not in svg
    background = svg[: svg.index("<text")]
    assert "#ffffff" not in background and "fill: white" not in background


def test_a_smoke_test_says_so_in_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for title, expected in [("Figure 6", ""), (f"{WATERMARK}. Figure 6", WATERMARK)]:
        curve = Curve("a", "K=5", Source("a", "mse", 5), 1, {})
        canvas = drawn_canvas(Figure("figure6", title, "mse", ()), [DrawnCurve(curve, [(1.0, 0.1)] * 2)], monkeypatch)
        assert canvas.get_suptitle() == expected
