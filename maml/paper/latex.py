"""The tables in LaTeX: the paper's layout with booktabs, and one document of all of them."""

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
}


def escape(text: str) -> str:
    """Returns plain text as LaTeX."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def table_latex(table: Table, comparisons: Sequence[Comparison]) -> str:
    """Returns a table environment, which needs the package booktabs: the paper's rows and columns, and ours below each.

    What misses the paper's number has a footnote: how far it is, and which section of ``results/notes.md`` says why.
    """
    layout, bold, footnotes = table.layout, bold_cells(table), list[str]()
    title = f"The paper's {table.title}" if table.in_paper else table.title
    body = []
    for group in layout_rows(table, comparisons):
        body.append(r"\midrule")
        for row in group:
            printed = [_number(printed_value(item.cell) or NOTHING if item else NOTHING) for item in row.items]
            places = [(row.row, column) in bold for column in layout.columns]
            marked = [rf"\textbf{{{text}}}" if own else text for text, own in zip(printed, places, strict=True)]
            name = escape(row.name) + (f" {escape(SYMBOLS['quoted'])}" if row.quoted else "")
            body.append(_line(rf"\textbf{{{name}}}" if row.row in layout.own else name, marked))
            if not row.quoted:
                ours = [_number(our_value(item)) + _mark(item, footnotes) if item else "" for item in row.items]
                body.append(_line(r"\quad ours", ours))
            if row.has_spread:
                body.append(_line(r"\quad seeds", [_number(item.spread_text) if item else "" for item in row.items]))
    notes = [f"{number}: {escape(text)}." for number, text in enumerate(footnotes, 1)]
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{escape(title)}}}",
            rf"\label{{tab:{table.name.replace('_', '-')}}}",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\begin{{tabular}}{{l{'c' * len(layout.columns)}}}",
            r"\toprule",
            *_header(layout.corner, list(layout.columns.values())),
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\medskip",
            r"\begin{minipage}{\linewidth}",
            r"\scriptsize",
            " ".join([escape(LEGEND), *notes]),
            r"\end{minipage}",
            r"\end{table}",
            "",
        ]
    )


def document(summary: str, names: Sequence[str]) -> str:
    """Returns a document of all tables, to be compiled where their folders are; it needs booktabs and geometry."""
    return "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage{booktabs}",
            r"\usepackage[margin=2cm]{geometry}",
            r"\begin{document}",
            rf"\noindent {escape(summary)}",
            *(rf"\input{{{name}/{name}}}" for name in names),
            r"\end{document}",
            "",
        ]
    )


def _header(corner: str, columns: Sequence[Sequence[str]]) -> list[str]:
    """Returns the words above the columns; what several share stands once above them, with a line below."""
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
    """Returns escaped numbers, each minus sign as one."""
    return escape(text).replace("-", "$-$") if text != NOTHING else escape(text)


def _mark(comparison: Comparison, footnotes: list[str]) -> str:
    """Returns the mark of the footnote on a number that is missed, adding it to those before; empty for any other."""
    if not (comparison.reason or comparison.evidence.progress):
        return ""
    reason = comparison.reason
    if reason and reason != NO_REASON:
        reason = f"see results/notes.md#{reason}"
    text = "; ".join(filter(None, [comparison.evidence.progress, reason]))
    if text not in footnotes:
        footnotes.append(text)
    return f"$^{{{footnotes.index(text) + 1}}}$"
