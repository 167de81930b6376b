"""The pages of docs/: their commands run or at least compose, and the files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from maml.config.compose import compose
from maml.record.index import read_runs
from tests.docs.pages import PAGES, ROOT, commands, run_in_order, trainings

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("name", NAMES)
def test_page_names_only_targets_and_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    files = re.findall(r"`((?:maml|conf|results|scripts|tests|sweeps|docs)/[\w/.-]+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not ((ROOT / name).parent / link).exists()] == []


@pytest.mark.slow  # a minute; all commands compose below, and those of README.md run
def test_commands_of_running_run_in_order(clone: Path) -> None:
    runs = trainings(ROOT / "docs" / "running.md")
    assert len(runs) >= 7
    run_in_order(clone, runs)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("extending.md")])
def test_commands_of_page_compose(name: str) -> None:
    for words in commands(ROOT / name):
        overrides = [word for word in words if ("=" in word and word[0] not in "-'") or word[0] == "~"]
        if "train.py" in words or "scripts/render.py" in words:
            overrides = [word for word in overrides if not word.startswith(("sweeper=", "launcher=", "hydra."))]
            settings, _ = compose([_first(override) for override in overrides])
            assert settings.seeds >= 1


def test_runs_that_pages_name_are_committed() -> None:
    runs, _ = read_runs(ROOT / "results" / "runs")
    ids = [run.record.run_id for run in runs]
    for name in NAMES:
        for words in commands(ROOT / name):
            if words[:3] in (["python", "scripts/runs.py", "show"], ["python", "scripts/runs.py", "compare"]):
                assert [word for word in words[3:] if not any(known.startswith(word) for known in ids)] == []


def _first(override: str) -> str:
    """Returns an override with only the first of its listed values, so that it fits a single run."""
    (parsed,) = OverridesParser.create().parse_overrides([override])
    if not parsed.is_sweep_override():
        return override
    if parsed.is_choice_sweep():
        key, _, values = override.partition("=")
        return f"{key}={values.split(',')[0]}"
    return f"{override.partition('=')[0]}=0.01"  # an interval of a sweep: any value will do
