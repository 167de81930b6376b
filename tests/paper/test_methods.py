"""The page of methods on the same tasks."""

from __future__ import annotations

import re
from pathlib import Path

from maml.paper.methods import methods_markdown, methods_section
from maml.record.comparison import groups_on_the_same_tasks
from maml.record.contents import Source
from maml.record.index import find_runs
from tests.paper.fake_runs import make_run


def test_page_has_a_table_for_each_bank(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, mean=0.75, source=Source("sinusoid_pretrain", "mse", 5))
    page = methods_markdown(groups_on_the_same_tasks(find_runs(tmp_path)[0]))
    assert page.count("## Sinusoid, K=") == 3
    assert re.search(r"## Sinusoid, K=5, 600 tasks of bank \w+ \(smaller is better\)", page)
    assert page.index("| sinusoid_10shot (") < page.index("| sinusoid_pretrain (")
    assert "| +0.25 | +0.25 to +0.25 |" in page


def test_section_of_the_report_has_the_same_tables(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, mean=0.75, source=Source("sinusoid_pretrain", "mse", 5))
    shown = "".join(methods_section(groups_on_the_same_tasks(find_runs(tmp_path)[0])))
    assert shown.count('<table class="methods">') == shown.count("<table") == 3
    assert shown.index("sinusoid_10shot (") < shown.index("sinusoid_pretrain (")
    assert "<td>+0.25</td><td>+0.25 to +0.25</td>" in shown


def test_page_without_runs_has_no_table() -> None:
    assert "## " not in methods_markdown([])
