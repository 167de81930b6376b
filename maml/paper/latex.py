"""The tables in LaTeX: the paper's layout with booktabs, and one document with all tables, which compiles alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from maml.paper.cells import Table
from maml.paper.tables import (
    LEGEND,
    NO_REASON,
    NOTHING,
    SYMBOLS,
    Comparison,
    bold_cells,
    layout_rows,
    our_value,
    printed_value,
)

_ESCAPES = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    NOTHING: "--",
    "θ": r"$\theta$",
    "=": "$=$",
    "△": r"$\bigtriangleup$",
    "▽": r"$\bigtriangledown$",
    "○": r"$\circ$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
}


def escape(text: str) -> str:
    """Escapes plain text for LaTeX."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def table_latex(table: Table, comparisons: Sequence[Comparison]) -> str:
    """Returns a table environment in the paper's layout, with our numbers below each row.

    It needs booktabs, and graphicx, which shrinks a table that is wider than the text. The legend of `document`
    explains the symbols. A number of ours that is not reproduced has a footnote, with the iterations done if training
    is not complete, and the section of ``results/notes.md`` that explains the difference.
    """
    layout, bold, footnotes = table.layout, bold_cells(table), list[str]()
    title = f"The paper's {table.title}" if table.in_paper else table.title
    body = []
    for group in layout_rows(table, comparisons):
        body.append(r"\midrule")
        for row in group:
            printed = [_number(printed_value(item.cell) or NOTHING if item else NOTHING) for item in row.items]
            is_bold = [(row.row, column) in bold for column in layout.columns]
            marked = [rf"\textbf{{{text}}}" if strong else text for text, strong in zip(printed, is_bold, strict=True)]
            name = escape(row.name) + (f" {escape(SYMBOLS['quoted'])}" if row.quoted else "")
            body.append(_line(rf"\textbf{{{name}}}" if row.row in layout.own else name, marked))
            if row.is_ours:
                ours = [_number(our_value(item)) + _mark(item, footnotes) if item else "" for item in row.items]
                body.append(_line(r"\quad ours", ours))
            if row.has_runs:
                body.append(_line(r"\quad runs", [_number(item.runs_text) if item else "" for item in row.items]))
    texts = [table.note] if table.note else []
    notes = " ".join(map(escape, [*texts, *(f"{number}: {text}." for number, text in enumerate(footnotes, 1))]))
    below = [r"\par\medskip", r"\begin{minipage}{\linewidth}", r"\scriptsize", notes, r"\end{minipage}"]
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{escape(title)}}}",
            rf"\label{{tab:{table.name.replace('_', '-')}}}",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{4pt}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}"
            rf"{{\begin{{tabular}}{{l{'c' * len(layout.columns)}}}",
            r"\toprule",
            *_header(layout.corner, list(layout.columns.values())),
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *(below if notes else []),
            r"\end{table}",
            "",
        ]
    )


def document(summary: str, tables: Sequence[str]) -> str:
    """Returns a document with all tables that compiles alone.

    Args:
        summary: a line about all tables.
        tables: the results of `table_latex`. They share one legend, which stands before them.
    """
    return "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage{booktabs}",
            r"\usepackage{graphicx}",
            r"\usepackage[margin=2cm]{geometry}",
            r"\begin{document}",
            rf"\noindent {escape(summary)}",
            r"\par\medskip",
            rf"\noindent {escape(LEGEND)}",
            "",
            *tables,
            r"\end{document}",
            "",
        ]
    )


def _header(corner: str, columns: Sequence[Sequence[str]]) -> list[str]:
    """Returns the heading lines; equal words of neighbouring columns are merged into one cell with a line below."""
    *upper, lowest = zip(*columns, strict=True)
    lines = []
    for words in upper:
        spans = [(word, len(list(same))) for word, same in groupby(words)]
        lines.append(_line("", [rf"\multicolumn{{{width}}}{{c}}{{{escape(word)}}}" for word, width in spans]))
        first = 2
        for _, width in spans:
            lines.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
            first += width
    return [*lines, _line(escape(corner), [escape(word) for word in lowest])]


def _line(name: str, cells: Sequence[str]) -> str:
    return " & ".join([name, *cells]) + r" \\"


def _number(text: str) -> str:
    """Escapes a text of numbers and typesets each hyphen as a minus sign."""
    return escape(text).replace("-", "$-$") if text != NOTHING else escape(text)


def _mark(comparison: Comparison, footnotes: list[str]) -> str:
    """Returns the footnote mark of a number of ours, and appends its text to ``footnotes`` if it is new.

    The mark is empty if the number needs no footnote.
    """
    if not (comparison.reason or comparison.evidence.progress):
        return ""
    reason = comparison.reason
    if reason and reason != NO_REASON:
        reason = f"see results/notes.md#{reason}"
    text = "; ".join(filter(None, [comparison.evidence.progress, reason]))
    if text not in footnotes:
        footnotes.append(text)
    return f"$^{{{footnotes.index(text) + 1}}}$"
