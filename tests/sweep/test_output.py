"""The output of a job in a file of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maml.sweep.output import OutputFile


def test_everything_that_a_job_prints_goes_to_its_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.log"
    path.write_text("from an earlier start\n")
    before = sys.stdout, sys.stderr
    output = OutputFile(path)
    print("printed")
    print("warned", file=sys.stderr)
    os.write(1, b"by a library\n")
    subprocess.run(["echo", "by a child"], check=True)
    output.close()
    print("after")
    assert (sys.stdout, sys.stderr) == before
    assert path.read_text().splitlines() == [
        "from an earlier start", "printed", "warned", "by a library", "by a child",
    ]  # fmt: skip
    assert capfd.readouterr().out == "after\n"
