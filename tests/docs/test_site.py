"""The site that `make docs` builds: complete, strict, and without a request to the network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import Browser, find_browser
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def test_site_has_every_page_and_the_results(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
    assert (site / "results" / "report.html").exists()
    assert (site / "results" / "figure2" / "figure2.png").exists()


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_open_without_network_and_fit_the_screen(width: int, site: Path, tmp_path: Path) -> None:
    program = find_browser()
    if not program:
        pytest.skip("no Chromium to look at the pages with")
    with Browser(program, tmp_path) as browser:
        for name in ("index", "python", "extending", "results"):
            browser.load(site / f"{name}.html", width, 900)
            assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.errors == []
