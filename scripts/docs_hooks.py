"""What `make docs` adds to the pages in docs/: results, and the reference of every config key."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGES = ("*.md", "table*/*.md", "*_published/*.md", "figure*/*.png", "figure*/*.pdf", "report.html")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the results and the generated pages to the site."""
    for path in (path for pattern in PAGES for path in sorted(RESULTS.glob(pattern))):
        if path.name != "README.md":
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapts links between docs/ and results/: in the site the latter lies in the former."""
    if page.file.src_uri.startswith("results/"):
        return markdown.replace("../docs/", "../")
    return markdown.replace("](../results/", "](results/")
