"""Status lines: on standard error, from the first process only."""

from __future__ import annotations

import pytest

from maml.status import about, announce


@pytest.mark.parametrize(("rank", "printed"), [(None, "reading\n"), ("0", "reading\n"), ("1", "")])
def test_line_is_printed_by_the_first_process_on_standard_error(
    rank: str | None, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    announce("reading")
    assert capsys.readouterr() == ("", printed)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.3, "about 10 s"), (23.0, "about 20 s"), (58.0, "about 1 minute"), (130.0, "about 2 minutes")],
)
def test_duration_is_given_roughly(seconds: float, words: str) -> None:
    assert about(seconds) == words
