"""Every citation of docs/protocol.md leads to a heading that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from maml.config.paths import RESULTS
from maml.paper.departures import load_departures

ROOT = Path(__file__).parents[2]
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
HEADINGS = re.findall(r"^#+ (.+)$", PROTOCOL, flags=re.MULTILINE)

CITATION = re.compile(r"docs/protocol\.md(#[\w-]+)?")
# Citations by number, which a reader cannot follow: "protocol 6.8", "protocol, row 12", "fact 2", "(row 31)".
BARE_NUMBER = re.compile(
    r"protocol,? (?:sections?|rows?|facts?)\b|protocol,? \d|\bfacts? \d|\(row \d", flags=re.IGNORECASE
)


def slug(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def written_texts() -> dict[Path, str]:
    """Returns the text of all files written by people: code, configs and pages, but no run records or build outputs."""
    folders = [path for name in ("maml", "conf", "scripts", "tests", "docs") for path in (ROOT / name).rglob("*")]
    paths = [ROOT / "Makefile", *ROOT.glob("*.*"), *(ROOT / "results").glob("*"), *folders]
    kinds = (".py", ".yaml", ".yml", ".md", ".html", ".toml")
    return {
        path: path.read_text()
        for path in sorted(paths)
        if path.is_file() and (path.suffix in kinds or path.name == "Makefile") and path != Path(__file__)
    }


def test_headings_give_the_same_anchor_everywhere() -> None:
    # GitHub and the generated site make different anchors for punctuation and for headings that occur twice.
    assert [heading for heading in HEADINGS if not re.fullmatch(r"[A-Za-z0-9]+([ -][A-Za-z0-9]+)*", heading)] == []
    assert len({slug(heading) for heading in HEADINGS}) == len(HEADINGS)


def test_citations_lead_to_a_heading() -> None:
    anchors = {slug(heading) for heading in HEADINGS}
    citations = [(path, match[1]) for path, text in written_texts().items() for match in CITATION.finditer(text)]
    assert len({path for path, _ in citations}) > 30
    assert [(str(path), anchor) for path, anchor in citations if anchor and anchor[1:] not in anchors] == []


def test_code_and_configs_cite_a_section_and_not_the_whole_page() -> None:
    folders = [ROOT / name for name in ("maml", "conf", "scripts")]
    for path, text in written_texts().items():
        if any(folder in path.parents for folder in folders):
            assert all(match[1] for match in CITATION.finditer(text)), path


def test_no_citation_is_a_bare_number() -> None:
    old = [(str(path), match[0]) for path, text in written_texts().items() for match in BARE_NUMBER.finditer(text)]
    assert old == []


@pytest.mark.parametrize(
    "text", ["protocol 6.8", "Protocol, row 12", "protocol, fact 1", "protocol sections 2", "fact 8"]
)
def test_bare_numbers_are_recognised(text: str) -> None:
    assert BARE_NUMBER.search(text)


def test_links_within_the_page_lead_to_a_heading() -> None:
    links = re.findall(r"\]\(#([\w-]+)\)", PROTOCOL)
    assert links
    assert set(links) <= {slug(heading) for heading in HEADINGS}


def test_departures_are_numbered_and_open_with_those_of_the_results() -> None:
    table = PROTOCOL.partition("\n## Departures\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] != "| -"]
    rows = [row for row in rows if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(len(row) == 5 and all(row) for row in rows)
    topics = [entry["topic"] for entry in load_departures(RESULTS)]
    assert [row[1] for row in rows[: len(topics)]] == topics
    assert f"Rows 1 to {len(topics)} are those of `results/departures.yaml`" in PROTOCOL


def test_experiments_that_are_named_exist() -> None:
    names = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    families = ("sinusoid", "omniglot", "mini_imagenet", "cifar_fs", "point_navigation", "cheetah", "ant")
    for pattern in re.findall(r"`([\w*]+)`", PROTOCOL):
        if pattern.startswith(families) and pattern not in ("omniglot", "sinusoid"):
            assert any(Path(name).match(pattern) for name in names), pattern
