"""The report: the content of the page, the list of runs left out, and its behaviour in a browser."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Canvas

from maml.paper.cells import load_figures, load_tables
from maml.paper.figures import NOTE
from maml.paper.markup import join
from maml.paper.report import drawing, render
from maml.paper.tables import BOLD, QUOTED, TRANSDUCTIVE, UNPRINTED
from maml.record.contents import Source
from maml.record.index import find_runs
from maml.record.style import PAGE, save, style
from tests.browser import Browser, find_browser
from tests.paper.fake_runs import edit, make_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
CELL = "table2_multitask/MAML/K5_gradsteps_5"
main = runpy.run_path(str(ROOT / "scripts" / "report.py"))["main"]


def make_runs(root: Path) -> None:
    """Makes runs whose learning curves are long: two seeds, one of which diverged, and two seeds of a baseline."""
    for seed in (0, 1):
        make_run(root, mean=2.3 + 0.2 * seed, seed=seed, source=Source("sinusoid_pretrain", "mse", 5))
    for seed, mean in enumerate([0.7, None]):
        folder = make_run(root, mean=mean, seed=seed)
        lines = [json.dumps({"iteration": i, "loss": 5.0 / i}) + "\n" for i in range(1, 1000)]
        (folder / "metrics.jsonl").write_text("".join(lines) + '{"iteration": 10')  # the last line is being written


def report(root: Path, results: Path = RESULTS) -> str:
    page, problems = render(results, *find_runs(root))
    assert problems == []
    return page


@style()
def draw(path: Path, width: float) -> None:
    """Draws an SVG as wide as some figure of the paper."""
    path.parent.mkdir()
    canvas = Canvas(figsize=(width, 2))
    axes = canvas.subplots()
    axes.plot([1, 2], label="a curve")
    axes.legend()
    save(canvas, path)


def panel(page: str, name: str) -> str:
    """Returns the panel of a cell."""
    _, found, rest = page.partition(f'<dialog id="{name}"')
    assert found
    return rest.partition("</dialog>")[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    make_runs(root / "runs")
    results = root / "results"
    results.mkdir()
    for name in ("cells.yaml", "departures.yaml", "notes.md", "paper", "checkpoints"):
        (results / name).symlink_to(RESULTS / name)
    for name, width in (("figure3", 3.0), ("figure5", PAGE)):
        draw(results / name / f"{name}.svg", width)
    (root / "report.html").write_text(report(root / "runs", results))
    return root / "report.html"


def test_every_cell_has_a_button_and_a_panel_with_its_command(tmp_path: Path) -> None:
    page = report(tmp_path)
    for table in load_tables(RESULTS):
        for cell in table.cells:
            name = f"{cell.table}/{cell.row}/{cell.column}"
            assert page.count(f'data-opens="{name}"') == 1
            content = panel(page, name)
            assert ("quoted" if cell.quoted and not cell.source else "not run") in content
            assert not cell.source or cell.source.command([]) in content
    assert "0 of 71 cells reproduced" in page


def test_a_figure_counts_the_curves_that_the_paper_draws(page: Path) -> None:
    text = page.read_text()
    for figure in load_figures(RESULTS):
        article = text.partition(f'<article id="{figure.name}">')[2].partition("</article>")[0]
        drawn = [curve for curve in figure.curves if curve.is_plotted]
        assert f" of {len(drawn)} curves reproduced" in article
        assert article.count("not drawn in the paper") == len(figure.curves) - len(drawn)
    assert text.count("not drawn in the paper") == 2


def test_page_explains_marks_brackets_bands_and_transductive(page: Path) -> None:
    text = page.read_text()
    for explanation in (BOLD, TRANSDUCTIVE, NOTE, "in brackets, the interval over test tasks alone"):
        assert text.count(join(explanation)) == 1
    for table in load_tables(RESULTS):
        article = text.partition(f'<article id="{table.name}">')[2].partition("</article>")[0]
        quoted = {cell.row for cell in table.cells if cell.quoted}
        assert article.count(" †</th>") == len(quoted)
        assert (QUOTED in article) == bool(quoted)


def test_an_interval_that_is_not_printed_stands_in_the_panel_with_its_origin(page: Path) -> None:
    content = panel(page.read_text(), "table4_pointmass/MAML/gradsteps_0")
    assert "-40.41 ± 4.06" in content and join(UNPRINTED) in content


def test_verdicts_of_no_cell_have_no_tile_unless_they_judge(page: Path) -> None:
    text = page.read_text()
    assert re.findall('data-filter="(.*?)"', text) == ["reproduced", "better", "worse", "reduced-budget", "not-run"]


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
    assert content.count("<svg") == 3, "adaptation of the seed that did not diverge, training, test tasks"
    assert "Adaptation at meta-test" in content and "gradient steps</text>" in content
    training = content.partition("Training: loss")[0].rpartition("<svg")[2]
    curve = training.partition('class="curve curve-0"')[0].rpartition("<path")[2]
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
    assert report(page.parent / "runs", page.parent / "results") == page.read_text()


def test_page_names_the_newest_commit_and_date_of_its_runs(tmp_path: Path) -> None:
    assert "Rendered without any evaluated run." in report(tmp_path / "none")
    make_run(tmp_path, mean=0.7)
    folder = make_run(tmp_path, mean=0.8, seed=1)
    record = json.loads((folder / "run.json").read_text())
    later = record["segments"][0] | {"started": "2026-02-03T04:05:06+00:00", "commit": "abcdef0123", "dirty": False}
    edit(folder / "run.json", segments=[*record["segments"], later])
    assert "The numbers come from 2 runs; the newest was trained at commit abcdef0 on 2026-02-03." in report(tmp_path)


def test_numbers_of_several_runs_have_their_range_beside_them(page: Path) -> None:
    button = page.read_text().partition('data-opens="table2_multitask/pretrain_all_tasks/K5_gradsteps_5"')[2]
    button = button.partition("</button>")[0]
    assert "2.400 ± 0.046" in button
    assert '<span class="spread">2 runs, 2.300 to 2.500</span>' in button
    diverged = page.read_text().partition(f'data-opens="{CELL}"')[2].partition("</button>")[0]
    assert '<span class="spread">1 of 2 diverged</span>' in diverged


def test_drawing_keeps_its_text_and_is_described(tmp_path: Path) -> None:
    draw(tmp_path / "figure9" / "figure9.svg", 3.0)
    drawn = drawing(tmp_path / "figure9" / "figure9.svg", "A <title>")
    assert 'aria-label="A &lt;title&gt;"' in drawn and 'role="img"' in drawn
    assert ">a curve</text>" in drawn and "currentColor" in drawn
    assert "<?xml" not in drawn and "<!DOCTYPE" not in drawn and "<style" not in drawn
    assert 'viewBox="0 0 216 144"' in drawn and "width: 378px" in drawn
    assert "wide" not in drawn


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
    rows = (
        "[...document.querySelectorAll('#table2_multitask .numbers tbody tr')].filter(row => +row.cells[1].innerText)"
    )
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


def test_figures_follow_the_colours_of_the_page_without_the_network(browser: Browser, page: Path) -> None:
    ink = "getComputedStyle(document.querySelector('#figure3 .drawing text')).fill"
    for dark in (False, True):
        browser.load(page, 1280, 900, dark)
        assert browser.run("document.querySelectorAll('.drawing svg').length") == 2
        red, green, blue = map(int, browser.run(ink)[4:-1].split(","))
        assert (red + green + blue > 600) == dark
        assert browser.run("getComputedStyle(document.querySelector('.drawing svg')).backgroundColor") == NOTHING
    assert browser.run("performance.getEntriesByType('resource').every(entry => entry.name.startsWith('data:'))")


NOTHING = "rgba(0, 0, 0, 0)"
SHOWN = "[...document.querySelectorAll('tbody tr, .openers button, #notes details')].filter(e => e.offsetParent)"


def shown(browser: Browser, what: str = "row.textContent") -> list[str]:
    return browser.run(f"{SHOWN}.map(row => {what})")


def type_in(browser: Browser, text: str) -> None:
    browser.run(f"search.value = {json.dumps(text)}; search.dispatchEvent(new Event('input'))")


def test_search_leaves_what_has_all_words_and_hides_empty_parts(browser: Browser, page: Path) -> None:
    browser.load(page, 1280, 900)
    everything = len(shown(browser))
    type_in(browser, "mod. KAISER")
    (row,) = shown(browser)
    assert row.startswith("memory mod. (Kaiser et al., 2017)")
    assert browser.run("document.getElementById('found').textContent").startswith("1 of ")
    assert browser.run("document.getElementById('table2_multitask').offsetParent") is None
    assert browser.run("document.getElementById('notes').offsetParent") is None
    for text, expected in [
        ("figure 5 ant oracle K=20", 1),  # the title above and the label
        ("2.300 ± 0.100", 5),  # a run behind the number: a row of Table 2 and curves of Figures 3 and 6
        ("no such thing", 0),
    ]:
        type_in(browser, text)
        assert len(shown(browser)) == expected, text
    browser.click("#show-all")
    assert len(shown(browser)) == everything
    assert browser.run("search.value + document.getElementById('found').textContent") == ""
    assert browser.run("document.getElementById('show-all').hidden")


def test_verdict_shows_its_numbers_alone_and_a_second_click_all(browser: Browser, page: Path) -> None:
    browser.load(page, 1280, 900)
    everything = len(shown(browser))
    browser.click('[data-filter="worse"]')
    assert browser.run("document.querySelector('[data-filter=\\'worse\\']').ariaPressed") == "true"
    assert 0 < len(shown(browser)) < everything
    assert all(" worse" in text for text in shown(browser))
    faded = browser.run(
        "[...document.querySelectorAll('main [data-opens].faded')].every(button => button.dataset.verdict !== 'worse')"
    )
    assert faded and browser.run("document.querySelectorAll('main [data-opens].faded').length")
    type_in(browser, "table 2")
    assert browser.run("[...document.querySelectorAll('article')].filter(e => e.offsetParent).map(e => e.id)") == [
        "table2_multitask"
    ]
    type_in(browser, "")
    browser.click('[data-filter="not-run"]')
    assert all(" not run" in text for text in shown(browser))
    browser.click('[data-filter="not-run"]')
    assert len(shown(browser)) == everything


def test_verdict_says_how_many_numbers_and_curves_are_shown(browser: Browser, page: Path) -> None:
    browser.load(page, 1280, 900)
    text = "document.getElementById('found').textContent"
    browser.click('[data-filter="worse"]')
    visible = "[...document.querySelectorAll('main [data-opens]')].filter(e => e.offsetParent && !e.matches('.faded'))"
    count = browser.run(f"{visible}.length")
    assert browser.run(text) == f"{count} numbers and curves, also of figures and later papers"
    type_in(browser, "table2_multitask/MAML/K5_gradsteps_5")
    assert (
        browser.run(text) == f"{browser.run(f'{visible}.length')} numbers and curves, also of figures and later papers"
    )


def test_methods_keep_their_colours_words_and_distance(browser: Browser, tmp_path: Path) -> None:
    make_run(tmp_path / "runs", mean=0.5)
    make_run(tmp_path / "runs", mean=0.75, source=Source("sinusoid_pretrain", "mse", 5))
    (tmp_path / "report.html").write_text(report(tmp_path / "runs"))
    section = "document.getElementById('same-tasks')"
    edges = f"[{section}.querySelector('p'), {section}.querySelector('article')].map(e => e.getBoundingClientRect())"
    colours = f"[...{section}.querySelectorAll('tbody td')].map(cell => getComputedStyle(cell).color)"
    for width, height in ((390, 844), (1280, 900)):
        browser.load(tmp_path / "report.html", width, height)
        assert browser.run(f"(([p, card]) => card.top - p.bottom)({edges})") >= 12
        assert len(set(browser.run(colours))) == 1
        # A name is at least as wide as its longest word.
        assert browser.run(
            f"[...{section}.querySelectorAll('tbody th')].every(cell => {{"
            "  const wanted = document.createElement('span');"
            "  wanted.textContent = cell.textContent;"
            "  wanted.style.cssText = 'position: absolute; width: min-content; overflow-wrap: normal';"
            "  cell.append(wanted);"
            "  const width = wanted.getBoundingClientRect().width;"
            "  wanted.remove();"
            "  return cell.getBoundingClientRect().width >= width;"
            "})"
        )
    type_in(browser, "sinusoid_pretrain (")
    assert browser.run(f"{section}.querySelectorAll('tbody tr:not([hidden])').length") == 3


def test_link_to_what_is_filtered_away_shows_it(browser: Browser, page: Path) -> None:
    browser.load(page, 1280, 900)
    type_in(browser, "Siamese")
    browser.run("location.hash = 'sinusoid-step-size'")
    browser.run("new Promise(done => setTimeout(done, 50))")
    assert browser.run("document.getElementById('sinusoid-step-size').closest('[hidden]')") is None


@pytest.mark.parametrize(("width", "scrolls"), [(390, True), (1280, False)])
def test_hint_says_that_a_table_or_figure_scrolls_where_it_does(
    browser: Browser, page: Path, width: int, scrolls: bool
) -> None:
    browser.load(page, width, 900)
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    for part in ("table2_multitask", "figure5"):
        hint = f"document.querySelector('#{part} .hint')"
        assert (browser.run(f"{hint}.offsetParent") is not None) == scrolls, part
        box = f"{hint}.nextElementSibling"
        assert browser.run(f"{box}.scrollWidth > {box}.clientWidth + 1") == scrolls
    assert browser.run("document.querySelector('#figure3 .hint').hidden"), "a narrow figure fits"
