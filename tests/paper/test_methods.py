"""The page of methods on the same tasks."""

from __future__ import annotations

from pathlib import Path

from maml.paper.methods import methods_markdown
from maml.record.comparison import groups_on_the_same_tasks
from maml.record.index import Source, find_runs
from tests.paper.fake_runs import make_run


def test_page_has_a_table_for_each_bank(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, mean=0.75, source=Source("sinusoid_pretrain", "mse", 5))
    page = methods_markdown(groups_on_the_same_tasks(find_runs(tmp_path)[0]))
    assert page.count("## Sinusoid, K=") == 3
    assert "## Sinusoid, K=5, 600 tasks (smaller is better)" in page
    assert page.index("| sinusoid_10shot (") < page.index("| sinusoid_pretrain (")
    assert "| +0.25 | +0.25 to +0.25 |" in page


def test_page_without_runs_has_no_table() -> None:
    assert "## " not in methods_markdown([])
