"""Memory of large tensors."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

_FAULTS = """
import resource, torch
from maml.memory import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
for _ in range(10):  # until the heap has found its shape
    torch.ones(2**24).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_reused() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 2**24 * 4 / resource.getpagesize()  # by default ten tensors' pages
