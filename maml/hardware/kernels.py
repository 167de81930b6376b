"""Kernels of our own: compiled once for this processor or GPU, loaded from a cache, and used if a run says so."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from maml.errors import first_line
from maml.hardware.memory import is_capturing, is_out_of_memory
from maml.status import announce

_log = logging.getLogger(__name__)
_SOURCES = [Path(__file__).with_name(name) for name in ("normalization.cpp", "convolution.cpp")]
# Sets of flags, from the best to those that every compiler has. -ffast-math is not among them: a NaN stays a NaN.
_COMMON = ["-std=c++17", "-O3", "-fPIC", "-shared"]
_FAST = [*_COMMON, "-march=native", "-fno-trapping-math", "-fno-math-errno"]
_FLAGS = ([*_FAST, "-fopenmp"], _FAST, _COMMON)

_NUM_PROGRAMS = 64  # torch may compile so many programs for one function on a GPU

_enabled = False
_programs: dict[Callable[..., Any], Callable[..., Any]] = {}


def use_kernels(enabled: bool) -> None:
    """Sets whether the kernels are used; a process-wide switch."""
    global _enabled
    _enabled = enabled


def kernels_apply(x: Tensor) -> bool:
    """Returns whether a kernel is to compute on this tensor, instead of PyTorch's operations.

    It is not while torch traces a program or counts operations, because they cannot see our kernels.
    """
    is_possible = x.dtype in (torch.float32, torch.float64) and not is_in_torch_dispatch_mode()
    return _enabled and is_possible


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compiles the kernels for this processor, or loads them from the cache.

    Returns:
        The library; None if there is no compiler or it fails, which a warning says.
    """
    command = shlex.split(os.environ.get("CXX") or "c++")
    compiler = shutil.which(command[0])
    if compiler is None:
        _log.warning(
            "there is no C++ compiler (%s; the environment variable CXX names another), so images are computed without "
            "kernels (slower, same mathematics)",
            command[0],
        )
        return None
    command[0] = compiler
    try:
        path = _cache_folder() / f"kernels-{_fingerprint(command)}.so"
        if path.exists():
            with suppress(OSError):  # half written, or made on another system that shares the cache
                return ctypes.CDLL(str(path))
        announce("compiling kernels for this processor, about ten seconds, once")
        _compile(command, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home folder
        lines = (getattr(error, "stderr", None) or "").strip().splitlines() or [first_line(error)]
        _log.warning(
            "%s cannot compile the kernels, so images are computed without them (slower, same mathematics): %s",
            shlex.join(command),
            next((line for line in lines if "error" in line), lines[0]),
        )
        return None


def call(name: str, sizes: Sequence[int], values: Sequence[Tensor | float]) -> None:
    """Calls a kernel.

    Args:
        name: its name, without the type.
        sizes: the fields of its first argument, without the number of threads.
        values: its other arguments. Tensors are float32 or float64, and contiguous unless the sizes have their strides.

    Raises:
        TypeError: if tensors are of several types.
    """
    functions = library()
    assert functions is not None
    dtype = next(value.dtype for value in values if isinstance(value, Tensor))
    for value in values:
        if isinstance(value, Tensor) and value.dtype != dtype:
            raise TypeError(f"the kernel {name} needs tensors of one type, but has {dtype} and {value.dtype}")
    function = getattr(functions, f"{name}_{'float32' if dtype == torch.float32 else 'float64'}")
    fields = (*sizes, torch.get_num_threads())
    function(
        (ctypes.c_int64 * len(fields))(*fields),
        *(
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_double(value)
            for value in values
        ),
    )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of tensors, compiled by torch for a GPU as one kernel or a few. Its results have no graph.

    If it cannot be compiled, a warning says so, and from then on it runs as it is.

    Args:
        function: its arguments are tensors of any size, and strings; a number would become a variable of the program.
    """
    return functools.partial(_run_compiled, function)


def _run_compiled(function: Callable[..., Any], *values: Any) -> Any:
    # A program for each kind of windows and sizes of 1; by default, the ninth would be an error. Each thread has a
    # limit of its own, and autograd computes in other threads.
    torch._dynamo.config.recompile_limit = max(_NUM_PROGRAMS, torch._dynamo.config.recompile_limit)
    if function not in _programs:
        _programs[function] = torch.compile(function, dynamic=True, fullgraph=True)
    # There would be more programs for tensors that require a gradient.
    values = tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
    try:
        return _programs[function](*values)
    except Exception as error:  # it can fail in each of several programs
        # While a graph is captured, loading any new program fails; outside, the same one may work.
        if is_capturing() or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            raise
        _log.warning("torch cannot compile a kernel (slower, same mathematics): %s", first_line(error))
    _programs[function] = function
    return function(*values)


@functools.cache
def compiles_on_gpu() -> bool:
    """Returns whether torch's compiler works for the GPU; if not, a warning says why. It needs a C compiler."""
    announce("compiling kernels for this GPU, up to a minute, then mostly from a cache")
    try:
        torch.compile(_example, dynamic=True, fullgraph=True)(torch.ones(2, device="cuda"))
    except Exception as error:  # it can fail in each of several programs
        _log.warning(
            "torch cannot compile kernels for this GPU, so images are computed without them (slower, same "
            "mathematics): %s",
            first_line(error),
        )
        return False
    return True


def _example(x: Tensor) -> Tensor:
    return x + 1


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for flags in _FLAGS:
            whole = [*command, *flags, "-o", str(made), *map(str, _SOURCES)]
            result = subprocess.run(whole, capture_output=True, text=True, errors="replace", check=False)
            if result.returncode == 0:
                break
        result.check_returncode()
        ctypes.CDLL(str(made))  # a library that cannot be loaded is not kept
        with made.open("rb") as file:
            os.fsync(file.fileno())  # a file that a power cut has shortened would end the process
        made.replace(path)  # another process may do the same; each of them leaves a whole file


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maml"


def _fingerprint(command: list[str]) -> str:
    """Returns a hash of what decides the library; nodes of a cluster may share the cache and differ in processors."""
    processor = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    parts = [
        *(source.read_text() for source in _SOURCES),
        str(_FLAGS),
        *command,
        os.path.realpath(command[0]),
        *platform.libc_ver(),
        platform.machine(),
        processor,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
