"""Lists and reads the files of image sets (zips, folders and pickles), and reports damaged ones clearly."""

import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

from maml.errors import MamlError

NEEDS_TORCHVISION = (
    "Downloading needs torchvision, which cannot be imported; install the one that belongs to your torch, from where "
    "torch comes"
)

# The classes and functions in the pickle of a numpy array or number, in every protocol.
_ARRAYS = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}


class File(NamedTuple):
    """What is known of a file without reading it.

    Attributes:
        size: its size in bytes.
        path: its place on disk; empty for a file in a zip.
        stamp: the times of its last change in nanoseconds, and its inode; empty for a file in a zip. While size and
            stamp stay, the content stays.
        checksum: the CRC-32 of its content, which a zip lists; None for a file in a folder.
    """

    size: int
    path: str = ""
    stamp: tuple[int, ...] = ()
    checksum: int | None = None


def list_files(source: Path, advice: str) -> Iterator[tuple[str, File]]:
    """Yields the path of every file in a zip or a folder, and what is known of it. Nothing is read.

    Paths start with the folder's own name.

    Args:
        source: a ``.zip`` or a folder.
        advice: what to do if the zip is damaged.

    Raises:
        MamlError: if the zip is damaged.
    """
    if source.suffix == ".zip":
        try:
            with ZipFile(source) as archive:
                members = archive.infolist()
        except (BadZipFile, OSError) as error:
            raise MamlError(f"{source} cannot be read as a zip ({error}); {advice}") from error
        for member in members:
            yield member.filename, File(member.file_size, checksum=member.CRC)
    else:
        for folder, _, files in os.walk(source):
            prefix = Path(folder).relative_to(source.parent).as_posix()
            for file in files:
                yield f"{prefix}/{file}", file_on_disk(os.path.join(folder, file))


def file_on_disk(path: str | Path) -> File:
    """Returns what is known of a file that is not in a zip."""
    status = os.stat(path)
    # The time of change too: unpacking or copying can set the time of modification back.
    return File(status.st_size, str(path), (status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


def checksum(file: File) -> int:
    """Returns the CRC-32 of a file's content, and reads the file only if nothing else knows it.

    Raises:
        MamlError: if the file cannot be read.
    """
    if file.checksum is not None:
        return file.checksum
    value = 0
    try:
        with open(file.path, "rb") as content:
            while block := content.read(1 << 20):
                value = zlib.crc32(block, value)
    except OSError as error:
        raise MamlError(f"{file.path} cannot be read ({error.strerror}); mend it, or move it away") from error
    return value


@contextmanager
def reader(source: Path) -> Iterator[Callable[[str], bytes]]:
    """Opens a zip, or the parent of a listed folder; yields a function that reads a path of `list_files`."""
    if source.suffix == ".zip":
        with ZipFile(source) as archive:
            yield archive.read
    else:
        yield lambda name: (source / name).read_bytes()


def unpickle(path: Path, keys: Sequence[str], advice: str) -> list[Any]:
    """Reads values of a dictionary of arrays, lists, text and numbers, pickled by Python 2 or 3. No code is run.

    Args:
        path: path of the pickle.
        keys: keys of the values to return, in this order.
        advice: what to do if the file is not such a pickle.

    Raises:
        MamlError: if the file is missing, is no such pickle, or lacks a key.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        content = {os.fsdecode(key): value for key, value in content.items()}
    except Exception as error:  # a broken pickle may raise any error
        cause = f"{type(error).__name__}: {error}"
        raise MamlError(f"{path} cannot be read as a pickled dictionary of arrays ({cause}); {advice}") from error
    if missing := [key for key in keys if key not in content]:
        raise MamlError(f"{path} has no {' and no '.join(missing)}, but {', '.join(content) or 'nothing'}; {advice}")
    return [content[key] for key in keys]


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # its name before numpy 2
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which arrays do not need and could do harm")
        return super().find_class(module, name)
