"""Tables in Markdown."""

from __future__ import annotations

from maml.paper.markdown import markdown_table


def test_table_has_a_line_under_its_header() -> None:
    assert markdown_table(["", "ours"], [["K=1", "98.7"]]) == ["|  | ours |", "| --- | --- |", "| K=1 | 98.7 |"]
