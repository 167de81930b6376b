"""The report: the content of the page, the list of runs left out, and its behaviour in a browser."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from maml.config.compose import compose_experiment
from maml.config.identity import training_config
from maml.paper.cells import Source, load_tables
from maml.paper.report import load_departures, measured_readings, render
from maml.record.index import find_runs
from tests.browser import Browser, find_browser
from tests.paper.fake_runs import make_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
CELL = "table2_multitask/MAML/K5_gradsteps_5"
main = runpy.run_path(str(ROOT / "scripts" / "report.py"))["main"]


def make_runs(root: Path) -> None:
    """Makes two seeds of a finished run with learning curves, one of which diverged, and a run of a baseline."""
    make_run(root, mean=2.4, source=Source("sinusoid_pretrain", "mse", 5))
    for seed, mean in enumerate([0.7, None]):
        folder = make_run(root, mean=mean, seed=seed)
        lines = [json.dumps({"iteration": i, "loss": 5.0 / i}) + "\n" for i in range(1, 1000)]
        (folder / "metrics.jsonl").write_text("".join(lines) + '{"iteration": 10')  # the last line is being written


def report(root: Path) -> str:
    page, problems = render(RESULTS, *find_runs(root))
    assert problems == []
    return page


def panel(page: str, name: str) -> str:
    """Returns the panel of a cell."""
    _, found, rest = page.partition(f'<dialog id="{name}"')
    assert found
    return rest.partition("</dialog>")[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    make_runs(root / "runs")
    (root / "report.html").write_text(report(root / "runs"))
    return root / "report.html"


def test_every_cell_has_a_button_and_a_panel_with_its_command(tmp_path: Path) -> None:
    page = report(tmp_path)
    for table in load_tables(RESULTS):
        for cell in table.cells:
            name = f"{cell.table}/{cell.row}/{cell.column}"
            assert page.count(f'data-opens="{name}"') == 1
            content = panel(page, name)
            assert ("quoted" if cell.quoted else "not run") in content
            assert not cell.source or cell.source.command([]) in content
    assert "0 of 71 cells reproduced" in page


def test_panel_holds_the_evidence(page: Path) -> None:
    content = panel(page.read_text(), CELL)
    for text in (
        "0.700 ± 0.100",
        "worse",
        "diverged",
        "1 of 2 diverged",
        "mean over 1 of 2 runs",
        "python train.py -m +experiment=sinusoid_10shot",
    ):
        assert text in content
    for text in ("0123456+", "CPU, Abacus", "50 s", "5a", "70,000", "inner.step_size", "num_iterations: 70000"):
        assert text in content
    assert 'href="#sinusoid-step-size"' in content
    assert content.count("<svg") == 2
    curve = content.partition('class="curve curve-0"')[0].rpartition("<path")[2]
    assert 100 < curve.count("L") < 200


def test_problems_are_named_and_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrupt = make_run(tmp_path / "runs", seed=1, name="<script>alert(1)") / "report.json"
    corrupt.write_text("{")
    kept, out = make_run(tmp_path / "runs"), tmp_path / "out" / "report.html"
    (kept / "tasks.csv").unlink()
    (kept / "metrics.jsonl").write_text("[]\n")
    assert main(["--runs-dir", str(tmp_path / "runs"), "--out", str(out)]) == 1
    page, errors = out.read_text(), capsys.readouterr().err
    for path in (corrupt, kept / "tasks.csv", kept / "metrics.jsonl"):
        assert f"ERROR, left out: {path} is" in errors
    assert "Left out" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_equal_runs_give_equal_bytes(page: Path) -> None:
    assert report(page.parent / "runs") == page.read_text()


def test_departures_are_complete_and_point_into_the_code() -> None:
    entries = load_departures(RESULTS)
    assert len(entries) == 34
    for entry in entries:
        assert entry.keys() - {"measured"} == {"topic", "paper", "code", "ours", "where"}
        for place in entry["where"]:
            file, _, text = place.partition(": ")
            assert text in (ROOT / file).read_text(), place


def test_departures_are_measured_by_what_they_name() -> None:
    for measured in (entry["measured"] for entry in load_departures(RESULTS) if "measured" in entry):
        choices = []
        for label, source, step in measured_readings(measured):
            config = compose_experiment(source.experiment, source.overrides)
            evaluation, domain = config.evaluation, config.domain
            assert source.num_shots in (evaluation["num_shots"] or [domain["num_shots"]]), label
            assert step <= evaluation["num_steps"]
            choices.append((json.dumps(training_config(config)), json.dumps(evaluation), source.metric, step))
        assert len(set(choices)) == len(choices) == 2, "the choices are the same"


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no browser is installed; apt-get install chromium")
    with Browser(program, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    yield shared_browser
    assert shared_browser.errors == []


def opened(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('dialog[open]')].map(panel => panel.id)")


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
@pytest.mark.parametrize("dark", [False, True])
def test_page_never_scrolls_sideways(browser: Browser, page: Path, width: int, height: int, dark: bool) -> None:
    browser.load(page, width, height, dark)
    browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == width
    browser.click(f'[data-opens="{CELL}"]')
    assert browser.run("document.querySelector('dialog[open]').scrollWidth") <= width
    assert browser.run("document.documentElement.scrollWidth") == width
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 200) == dark


def test_cell_opens_by_mouse_and_key_and_closes_by_escape(browser: Browser, page: Path) -> None:
    browser.load(page, 1280, 900)
    browser.click(f'[data-opens="{CELL}"]')
    assert opened(browser) == [CELL]
    assert browser.run("decodeURI(location.hash)") == f"#{CELL}"
    browser.press("Escape", 27)
    assert opened(browser) == []
    assert browser.run("document.activeElement.dataset.opens") == CELL
    browser.press("Enter", 13)
    assert opened(browser) == [CELL]
    browser.click("dialog[open] .close")
    assert opened(browser) == []


def test_address_of_a_cell_opens_it_and_its_reason_leads_to_the_note(browser: Browser, page: Path) -> None:
    browser.load(page, 390, 844)
    browser.run(f"location.hash = '{CELL}'")
    browser.click("dialog[open] a")
    assert opened(browser) == []
    assert browser.run("location.hash") == "#sinusoid-step-size"
    assert browser.run("document.getElementById('sinusoid-step-size').parentElement.open")


def test_copy_button_takes_the_command(browser: Browser, page: Path) -> None:
    browser.load(page, 1280, 900)
    browser.click(f'[data-opens="{CELL}"]')
    browser.run(
        "button = document.querySelector('dialog[open] .command button');"
        "said = new Promise(done => new MutationObserver(() => done(button.textContent))"
        ".observe(button, {childList: true}));"
        "null"
    )
    browser.click("dialog[open] .command button")
    assert browser.run("said") in ("Copied", "Selected")


def test_column_sorts_both_ways_and_back(browser: Browser, page: Path) -> None:
    browser.load(page, 1280, 900)
    rows = "[...document.querySelectorAll('#table2_multitask > .scroll tbody tr')]"
    methods, papers = f"{rows}.map(row => row.cells[0].innerText)", f"{rows}.map(row => Number(row.cells[1].innerText))"
    printed, numbers = browser.run(methods), browser.run(papers)
    head = "#table2_multitask thead tr + tr th .sorter"
    browser.click(head)
    assert browser.run(papers) == sorted(numbers) != numbers
    browser.click(head)
    assert browser.run(papers) == sorted(numbers, reverse=True)
    browser.click(head)
    assert browser.run(methods) == printed
    browser.click("#table2_multitask thead th .sorter")
    assert browser.run(methods) == sorted(printed, key=str.lower)
    browser.click("#table2_multitask thead tr + tr th + th .sorter")  # "ours": only one row has a number
    assert browser.run(methods)[0] == "pretrain on all tasks"


def test_figures_are_drawn_without_the_network(browser: Browser, page: Path) -> None:
    browser.load(page, 1280, 900)
    browser.run("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    browser.run("Promise.all([...document.images].map(image => image.decode()))")
    assert browser.run("[...document.images].every(image => image.naturalWidth > 0) && document.images.length")
    assert browser.run("performance.getEntriesByType('resource').every(entry => entry.name.startsWith('data:'))")
