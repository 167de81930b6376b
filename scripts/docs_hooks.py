"""Hooks of `make docs`: they add the results and the reference of all config keys to the pages in docs/."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from maml.config.paths import RESULTS
from maml.config.reference import Option, reference

PAGES = ("*.md", "table*/*.md", "*_published/*.md", "figure*/*.*", "report.html")

_HOW_TO_READ = (
    "*Default* is the value that the option's file gives a key, or the constructor's default; *required* keys have "
    "none. Groups such as `inner` are chosen as `inner=NAME`, and their keys changed as `inner.KEY=VALUE`. On the "
    "command line `maml describe KEY` says the same."
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the results and the generated pages to the site."""
    for path in (path for pattern in PAGES for path in sorted(RESULTS.glob(pattern))):
        if path.name != "README.md":
            files.append(File.generated(config, str(path.relative_to(RESULTS.parent)), abs_src_path=str(path)))
    for name, content in reference_pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapts the links between docs/ and results/, because the site contains results/ in the folder of docs/."""
    if page.file.src_uri.startswith("results/"):
        return markdown.replace("../docs/", "../")
    return markdown.replace("](../results/", "](results/")


def reference_pages() -> dict[str, str]:
    """Returns a page for each config group, with all options and keys, by its path in the site."""
    pages = {}
    for group in reference():
        lines = [f"# {group.name or 'Every run'}", "", group.meaning, "", *([] if group.name else [_HOW_TO_READ, ""])]
        if group.default:
            lines += [f"Default: `{group.name}={group.default}`.", ""]
        for option in group.options:
            lines += _option(option)
        pages[f"reference/{group.name or 'root'}.md"] = "\n".join(lines)
    return pages


def _option(option: Option) -> list[str]:
    lines = [f"## {option.name}", "", _linked(option.header.replace("<", "&lt;")), "", f"`conf/{option.file}`", ""]
    if option.keys:
        lines += ["| key | type | range | default | meaning |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(f"`{k.name}`", k.type, k.range, _code(k.initial), k.meaning) for k in option.keys]
        lines += [""]
    if option.settings:
        lines += ["| sets | to | |", "| --- | --- | --- |"]
        lines += [_row(f"`{s.name}`", _code(s.value), _linked(s.comment)) for s in option.settings]
        lines += [""]
    return lines


def _linked(text: str) -> str:
    """Makes links of citations of the protocol, and code of the commands."""
    text = re.sub(r"docs/protocol\.md#([\w-]+)", r"[protocol](../protocol.md#\1)", text)
    return re.sub(r"Command: (python train\.py [^;]*)", r"Command: `\1`", text)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code(value: str) -> str:
    return "required" if value == "???" else f"`{value}`"
