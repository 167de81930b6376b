"""Lists and reads the files of image sets (zips, folders and pickles), and reports damaged ones clearly."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from maml.errors import MamlError

# The classes and functions in the pickle of a numpy array or number, in every protocol.
_ARRAYS = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}


def list_files(source: Path, advice: str) -> Iterator[tuple[str, int]]:
    """Yields path and size in bytes of every file in a zip or a folder. Paths start with the folder's own name.

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
            yield member.filename, member.file_size
    else:
        for folder, _, files in os.walk(source):
            prefix = Path(folder).relative_to(source.parent).as_posix()
            for file in files:
                yield f"{prefix}/{file}", os.stat(os.path.join(folder, file)).st_size


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


def first_ten(faults: Sequence[str]) -> str:
    """Joins what is wrong to one line, of which a user wants to see the start."""
    more = f", and {len(faults) - 10} more" if len(faults) > 10 else ""
    return f"{', '.join(faults[:10])}{more}"
