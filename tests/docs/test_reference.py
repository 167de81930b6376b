"""The reference of the config that `make docs` generates: every option, every key."""

from __future__ import annotations

import importlib.util
from dataclasses import fields

from maml.config.schema import Settings
from tests.docs.pages import ROOT

SPEC = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
assert SPEC and SPEC.loader
docs_hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs_hooks)


def test_every_option_of_every_group_has_a_section() -> None:
    pages = docs_hooks.reference_pages()
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert f"\n## {path.stem}\n" in pages[f"reference/{path.parent.name}.md"]


def test_every_key_of_the_root_has_a_row() -> None:
    page = docs_hooks.reference_pages()["reference/root.md"]
    assert [field.name for field in fields(Settings) if f"\n| `{field.name}` |" not in page] == []


def test_every_row_has_as_many_cells_as_its_head() -> None:
    for page in docs_hooks.reference_pages().values():
        columns = 0
        for line in page.splitlines():
            count = line.replace("\\|", "").count("|")
            columns = count if columns == 0 else columns
            assert not count or count == columns, line
            columns = count


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in docs_hooks.reference_pages() if name not in navigation] == []
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f" {path.name}" not in navigation] == []
