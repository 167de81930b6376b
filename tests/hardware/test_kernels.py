"""Kernels of our own: compiled once, cached, and left out where they cannot be compiled."""

from __future__ import annotations

import ctypes
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maml.domain.base import without_data
from maml.domain.omniglot import Omniglot
from maml.domain.sinusoid import Sinusoid
from maml.errors import Unavailable
from maml.hardware import base, kernels
from maml.hardware.base import Execution, Hardware

HAS_COMPILER = shutil.which("c++") is not None
with without_data():
    IMAGES = Omniglot(num_ways=5, num_shots=1, data_dir="", cache_dir="").workload


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; the library of this process is loaded anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.library.cache_clear()
    yield tmp_path / "maml"
    kernels.library.cache_clear()


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    yield
    kernels.use_kernels(False)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_library_is_compiled_once_and_then_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FLAGS", (["--no-such-flag"], ["-std=c++17", "-O1", "-fPIC", "-shared"]))
    assert isinstance(kernels.library(), ctypes.CDLL), "the second set of flags compiles"
    (made,) = cache.iterdir()
    changed = made.stat().st_mtime_ns
    kernels.library.cache_clear()
    assert isinstance(kernels.library(), ctypes.CDLL)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [changed]
    kernels.library.cache_clear()
    monkeypatch.setattr(kernels, "_FLAGS", (["-std=c++17", "-O0", "-fPIC", "-shared"],))
    assert kernels.library()
    assert len(list(cache.iterdir())) == 2, "another way to compile gives another library"


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_library_that_cannot_be_loaded_is_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FLAGS", (["-std=c++17", "-O0", "-fPIC", "-shared"],))
    monkeypatch.setenv("CXX", "c++ -DANY=1")
    made = cache / f"kernels-{kernels._fingerprint([shutil.which('c++') or '', '-DANY=1'])}.so"
    cache.mkdir()
    made.write_bytes(b"")
    assert kernels.library(), "a compiler with arguments"
    assert made.stat().st_size > 0
    assert list(cache.iterdir()) == [made]
    kernels.library.cache_clear()
    monkeypatch.setenv("CXX", "")
    assert kernels.library(), "empty is as good as not set"


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_kernels_refuse_tensors_of_several_types() -> None:
    with pytest.raises(TypeError, match=r"the kernel convolve needs tensors of one type, but has torch.float32 and"):
        kernels.call("convolve", [], [torch.zeros(1), torch.zeros(1, dtype=torch.float64)])


def test_without_a_compiler_there_is_a_warning_and_no_library(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert kernels.library() is None
        assert kernels.library() is None
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text
    assert not cache.exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo it is broken >&2\nexit 1\n", "it is broken"),
        ("printf 'In file:\\n\\344 fatal error: no header\\n' >&2\nexit 1\n", "fatal error: no header"),
        ("echo >&2\nexit 1\n", "returned non-zero exit status 1"),
        ('while [ "$1" != -o ]; do shift; done\necho no library > "$2"\n', "cannot compile the kernels"),
    ],
    ids=["fails", "explains in another encoding", "explains nothing", "makes no library"],
)
def test_a_compiler_that_does_not_work_is_quoted_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str, message: str
) -> None:
    compiler = cache.parent / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.WARNING):
        assert kernels.library() is None
    assert message in caplog.text
    assert list(cache.iterdir()) == []


def test_without_a_folder_for_the_cache_there_is_a_warning_and_no_library(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (cache.parent / "c++").symlink_to("/bin/true")
    monkeypatch.setenv("CXX", str(cache.parent / "c++"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "c++"))  # a file
    assert kernels.library() is None
    kernels.library.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert kernels.library() is None
    assert len(caplog.records) == 2
    assert "Could not determine home directory" in caplog.text


def test_kernels_are_for_images_on_a_cpu_with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    library = object()
    monkeypatch.setattr(base, "library", lambda: library)
    assert Hardware("cpu").choose(IMAGES, 100, {}).kernels
    assert not Hardware("cpu", kernels=False).choose(IMAGES, 100, {}).kernels
    assert not Hardware("cpu").choose(Sinusoid().workload, 100, {}).kernels
    library = None
    assert not Hardware("cpu").choose(IMAGES, 100, {}).kernels
    assert not Hardware("cpu").choose(IMAGES, 100, Execution(1, 1, False, kernels=True).as_dict()).kernels
    with pytest.raises(Unavailable, match=r"hardware\.kernels=true, but they cannot be compiled"):
        Hardware("cpu", kernels=True).choose(IMAGES, 100, {})


def test_kernels_are_for_long_runs_on_a_gpu_that_torch_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    works = True
    monkeypatch.setattr(base, "compiles_on_gpu", lambda: works)
    assert Hardware("cuda").choose(IMAGES, 60_000, {}).kernels
    assert not Hardware("cuda").choose(IMAGES, 100, {}).kernels, "compiling takes longer than it saves"
    assert not Hardware("cuda").choose(Sinusoid().workload, 60_000, {}).kernels
    works = False
    assert not Hardware("cuda").choose(IMAGES, 60_000, {}).kernels
    with pytest.raises(Unavailable, match="install a C compiler"):
        Hardware("cuda", kernels=True).choose(IMAGES, 60_000, {})


def test_a_gpu_for_which_torch_cannot_compile_has_no_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(function: object, **options: object) -> object:
        raise RuntimeError("Failed to find C compiler\nlong advice")

    monkeypatch.setattr(torch, "compile", fail)
    kernels.compiles_on_gpu.cache_clear()
    assert not kernels.compiles_on_gpu()
    assert not kernels.compiles_on_gpu()
    kernels.compiles_on_gpu.cache_clear()
    assert [record.getMessage().endswith("mathematics): Failed to find C compiler") for record in caplog.records] == [
        True
    ], "once"


def test_a_function_is_compiled_once_no_matter_what_requires_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, given = list[bool](), torch.ones(2, requires_grad=True)

    def compile_(function: Any, **options: object) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            seen.append(x.requires_grad)
            return function(x)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(kernels, "_programs", {})
    run = kernels.compiled(kernels._example)
    assert torch.equal(run(given), given + 1) and torch.equal(run(given.detach()), given + 1)
    assert seen == [False, False], "torch would compile a program for each case"


def test_every_thread_may_have_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = list[int]()
    monkeypatch.setattr(kernels, "_programs", {kernels._example: lambda x: limits.append(_limit())})
    thread = threading.Thread(target=lambda: kernels.compiled(kernels._example)(torch.ones(1)))
    thread.start()
    thread.join()
    assert limits == [kernels._NUM_PROGRAMS]


def _limit() -> int:
    return int(torch._dynamo.config.recompile_limit)


def test_a_function_that_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise error

    error: Exception = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(kernels, "_programs", {kernels._example: fail})
    run = kernels.compiled(kernels._example)
    with pytest.raises(torch.OutOfMemoryError):  # a smaller chunk is tried then
        run(torch.zeros(2))
    error = ValueError("no space left on device\nlong advice")
    for _ in range(2):
        assert run(torch.zeros(2)).tolist() == [1, 1]
    (record,) = caplog.records
    assert record.getMessage().endswith("mathematics): no space left on device")


def test_a_checkpoint_that_is_older_than_the_kernels_goes_on_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "library", object)
    older = {name: value for name, value in Execution(1, 1, False).as_dict().items() if name not in base._BEFORE}
    chosen = Hardware("cpu").choose(IMAGES, 100, older)
    assert (chosen.kernels, chosen.onednn) == (False, True)
    assert Hardware("cpu", kernels=True).choose(IMAGES, 100, older).kernels
    assert Hardware("cpu").choose(IMAGES, 100, {**older, "device": "cuda"}).kernels


def test_kernels_apply_if_the_run_says_so_and_no_program_is_traced() -> None:
    x = torch.zeros(1, 2, 3)
    assert not kernels.kernels_apply(x)
    Hardware("cpu").apply(Execution(1, None, False, kernels=True))
    assert kernels.kernels_apply(x)
    assert not kernels.kernels_apply(x.half())
    with FlopCounterMode(display=False):
        assert not kernels.kernels_apply(x)
