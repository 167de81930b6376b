"""The tables in LaTeX: they are well formed, and compile if a compiler is installed."""

import re
import runpy
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from maml.paper.cells import Cell, Layout, Table, load_tables
from maml.paper.evidence import Evidence, find_evidence
from maml.paper.latex import document, escape, table_latex
from maml.paper.tables import LEGEND, Comparison, bold_cells, compare
from maml.record.index import find_runs
from tests.paper.fake_runs import SINUSOID, make_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
TABLES = load_tables(RESULTS)
main = runpy.run_path(str(ROOT / "scripts" / "paper_tables.py"))["main"]

COMMANDS = re.compile(
    r"begin|end|documentclass|usepackage|noindent|input|centering|caption|label|footnotesize|scriptsize|setlength"
    r"|tabcolsep|par|medskip|linewidth|(top|mid|bottom|cmid)rule|multicolumn|textbf|quad|textbackslash|textasciitilde"
    r"|resizebox|ifdim|width|else|fi|textasciicircum|pm|theta|bigtriangleup|bigtriangledown|circ|dagger|ddagger"
)


def assert_well_formed(text: str) -> None:
    """A strict check of LaTeX: ASCII, known commands, braces, mathematics, environments, widths of rows."""
    assert text.isascii()
    assert all(COMMANDS.fullmatch(name) for name in re.findall(r"\\([A-Za-z]+)", text))
    bare = re.sub(r"\\(\\|[&%$#_{}])", "", text)  # without line breaks and escaped characters
    assert not re.search(r"\\[^A-Za-z]", bare)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    words = re.sub(r"\\(input|label|begin|end)\{[^}]*\}", "", bare)  # file names and labels are not text
    outside = "".join(words.split("$")[::2])
    assert not set("%#_^~") & set(outside)
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    assert_rows_have_their_columns(text)


def assert_rows_have_their_columns(text: str) -> None:
    inside = re.findall(r"\\begin\{tabular\}\{(l?c*)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(inside) == text.count(r"\begin{tabular}")
    for columns, body in inside:
        rows = re.sub(r"\\(top|mid|bottom)rule|\\cmidrule\(lr\)\{\d+-\d+\}", "", body).split(r"\\")
        assert not rows.pop().strip()
        for row in rows:
            cells = re.split(r"(?<!\\)&", row)
            wide = sum(int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", row))
            assert len(cells) + wide == len(columns), row
        for first, last in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", body):
            assert 2 <= int(first) <= int(last) <= len(columns)
    assert text.replace(r"\&", "").count("&") == sum(body.replace(r"\&", "").count("&") for _, body in inside)


@pytest.mark.parametrize(
    "wrong",
    [
        "θ",
        r"\foo",
        "{",
        "}{",
        "$",
        "5 %",
        "a_b",
        "a & b",
        r"\begin{table}",
        r"\begin{table}\begin{minipage}\end{table}\end{minipage}",
        r"\begin{tabular}{lc}a & b & c \\ \end{tabular}",
        r"\begin{tabular}{lc}a & b \end{tabular}",
        r"\begin{tabular}{lc}& \multicolumn{2}{c}{a} \\ \end{tabular}",
        r"\begin{tabular}{lc}a & b \\ \cmidrule(lr){2-3} \end{tabular}",
    ],
)
def test_the_reader_refuses_what_latex_would(wrong: str) -> None:
    with pytest.raises(AssertionError):
        assert_well_formed(wrong)


def test_escape_leaves_no_special_character() -> None:
    assert escape(r"50 % & a_b #1 {x} $ ^~\ ±") == (
        r"50 \% \& a\_b \#1 \{x\} \$ \textasciicircum{}\textasciitilde{}\textbackslash{} $\pm$"
    )


def numbers(text: str) -> list[list[str]]:
    r"""Returns the cells of each row, as plain text; bold cells start with ``*``."""
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = []
    for line in body.splitlines():
        if line.endswith(r"\\"):
            cells = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
            plain = (re.sub(r"\\textbf\{(.*)\}", r"*\1", cell.strip()) for cell in cells)
            rows.append([cell.replace(r"$\pm$", "±").replace("$-$", "-").replace(r"\&", "&") for cell in plain])
    return rows


@pytest.mark.parametrize("table", [pytest.param(table, id=table.name) for table in TABLES])
def test_without_runs_each_table_has_the_papers_rows_numbers_and_bold(table: Table) -> None:
    text = table_latex(table, compare([table], lambda source: Evidence())[table.name])
    assert_well_formed(text)
    rows, bold = numbers(text), bold_cells(table)
    cells = {(cell.row, cell.column): cell for cell in table.cells}
    for row, name in (item for group in table.layout.groups for item in group.items()):
        own = [cell for cell in table.cells if cell.row == row]
        quoted = any(cell.quoted for cell in own)
        printed, *ours = rows[: 1 if quoted and not any(cell.source for cell in own) else 2]
        rows = rows[1 + len(ours) :]
        expected = []
        for column in table.layout.columns:
            cell = cells.get((row, column))
            ci = f" ± {cell.ci}" if cell and cell.ci and cell.ci_is_printed else ""
            expected.append("*" * ((row, column) in bold) + (f"{cell.value}{ci}" if cell and cell.value else "--"))
        title = name.replace("θ", r"$\theta$") + (r" $\dagger$" if quoted else "")
        assert printed == ["*" * (row in table.layout.own) + title, *expected]
        if ours:
            assert ours[0][0] == r"\quad ours"
            assert set(ours[0][1:]) <= {"not run", ""}
    assert not rows


def cell_of(row: str = "MAML", note: str = "") -> Cell:
    return Cell("table2_multitask", row, "K5_gradsteps_1", "0.67", "", False, SINUSOID, 1, note=note)


def one_row(comparison: Comparison) -> str:
    layout = Layout("", {comparison.cell.column: ["1"]}, [{comparison.cell.row: "name"}])
    return table_latex(Table("table9_x", "T", (comparison.cell,), layout), [comparison])


@pytest.mark.parametrize(
    ("mean", "note", "ours", "footnote"),
    [
        (0.6, "a-note", "0.600 ± 0.100 $=$", ""),
        (0.5, "a-note", r"0.500 ± 0.100 $\bigtriangleup$$^{1}$", r" 1: see results/notes.md\#a-note."),
        (0.9, "", r"0.900 ± 0.100 $\bigtriangledown$$^{1}$", " 1: no reason known yet."),
        (None, "", r"diverged $\bigtriangledown$$^{1}$", " 1: no reason known yet."),
    ],
)
def test_a_miss_has_a_footnote_with_its_reason(
    mean: float | None, note: str, ours: str, footnote: str, tmp_path: Path
) -> None:
    make_run(tmp_path, mean=mean)
    text = one_row(Comparison(cell_of(note=note), find_evidence(SINUSOID, find_runs(tmp_path)[0])))
    assert_well_formed(text)
    assert numbers(text)[1] == [r"\quad ours", ours]
    if footnote:
        assert text.endswith(f"\\scriptsize\n{footnote.strip()}\n\\end{{minipage}}\n\\end{{table}}\n")
    else:
        assert text.endswith("\\end{tabular}}\n\\end{table}\n"), "there is nothing to explain"


def test_a_reduced_budget_has_its_iterations_in_the_footnote_and_runs_a_row(tmp_path: Path) -> None:
    make_run(tmp_path / "a", mean=0.67, done=69_999, status="interrupted")
    comparison = Comparison(cell_of(), find_evidence(SINUSOID, find_runs(tmp_path / "a")[0]))
    assert numbers(one_row(comparison))[1] == [r"\quad ours", r"0.670 ± 0.100 $\circ$$^{1}$"]
    assert r"1: 69,999 of 70,000 iterations; see results/notes.md\#reduced-budget." in one_row(comparison)
    for seed in (0, 1):
        make_run(tmp_path / "b", mean=0.6 + seed, seed=seed)
    comparison = Comparison(cell_of(), find_evidence(SINUSOID, find_runs(tmp_path / "b")[0]))
    assert numbers(one_row(comparison))[2] == [r"\quad runs", "2: 0.600 to 1.600 (± 0.046)"]


def test_remark_on_the_table_stands_below_it(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.6)
    comparison = Comparison(cell_of(), find_evidence(SINUSOID, find_runs(tmp_path)[0]))
    table = Table(
        "table9_x", "T", (comparison.cell,), Layout("", {"K5_gradsteps_1": ["1"]}, [{"MAML": "name"}]), "A & B."
    )
    text = table_latex(table, [comparison])
    assert_well_formed(text)
    assert "\\scriptsize\nA \\& B.\n\\end{minipage}" in text


def test_equal_footnotes_are_one(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.9)
    evidence = find_evidence(SINUSOID, find_runs(tmp_path)[0])
    later = [Comparison(replace(cell_of(), column=f"{step}", step=step), evidence) for step in (1, 5)]
    layout = Layout("", {"1": ["a", "1"], "5": ["a", "5"]}, [{"MAML": "MAML"}])
    text = table_latex(Table("x", "T", tuple(item.cell for item in later), layout), later)
    assert_well_formed(text)
    assert text.count("$^{1}$") == 2
    assert "$^{2}$" not in text
    assert r" & \multicolumn{2}{c}{a} \\" + "\n" + r"\cmidrule(lr){2-3}" in text


def test_document_holds_every_table_and_its_legend_once() -> None:
    tables = [table_latex(table, compare([table], lambda source: Evidence())[table.name]) for table in TABLES]
    text = document("1 of 71 cells, 100 %.", tables)
    assert_well_formed(text)
    assert text.count(escape(LEGEND)) == 1 and text.index(escape(LEGEND)) < text.index(r"\begin{table}")
    assert not any(escape(LEGEND)[:60] in table for table in tables)
    assert re.findall(r"\\label\{tab:([^}]*)\}", text) == [table.name.replace("_", "-") for table in TABLES]
    assert r"\input" not in text and r"\include" not in text, "it needs no other file"
    used = {
        package for line in re.findall(r"\\usepackage(?:\[[^]]*\])?\{([^}]*)\}", text) for package in line.split(",")
    }
    assert used == {"booktabs", "graphicx", "geometry"}, "all are in every LaTeX distribution"


def test_the_document_compiles_and_no_table_is_too_wide(tmp_path: Path) -> None:
    compiler = shutil.which("pdflatex") or shutil.which("tectonic")
    if compiler is None:
        pytest.skip("neither pdflatex nor tectonic is installed")
    assert main(["--runs-dir", str(RESULTS / "runs"), "--out", str(tmp_path)]) == 0
    options = ["-interaction=nonstopmode", "-halt-on-error"] if compiler.endswith("pdflatex") else []
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "tables.tex").rename(alone / "tables.tex")
    done = subprocess.run(
        [compiler, *options, "tables.tex"], cwd=alone, capture_output=True, text=True, errors="replace", timeout=300
    )
    if "tectonic" in compiler and "network" in done.stderr.lower():
        pytest.skip("tectonic cannot fetch its packages")
    assert done.returncode == 0, done.stdout[-3000:]
    assert (alone / "tables.pdf").read_bytes().startswith(b"%PDF")
    assert "Overfull" not in done.stdout
