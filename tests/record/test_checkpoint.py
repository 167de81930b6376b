"""Checkpoint files: saved content is read back, damage is noticed, and a failed write loses nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maml.errors import MamlError
from maml.record import checkpoint


def content(iteration: int = 3) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {
        "weight": torch.arange(12.0).reshape(3, 4) + iteration,
        "step": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0),
        "column": torch.arange(6.0).reshape(2, 3).t(),
    }
    return {"iteration": iteration, "training": {"inner.adapt": ["*"], "seed": None}, "state": {"theta": tensors}}


def assert_equal(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    assert {name: value for name, value in loaded.items() if name not in ("format", "state")} == {
        name: value for name, value in saved.items() if name != "state"
    }
    mine, theirs = loaded["state"]["theta"], saved["state"]["theta"]
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype
        assert torch.equal(mine[name], value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def test_saved_content_comes_back(path: Path) -> None:
    checkpoint.save(path, content())
    assert_equal(checkpoint.load(path), content())


def test_saving_keeps_the_one_before_and_nothing_else(path: Path) -> None:
    for iteration in (1, 2, 3):
        checkpoint.save(path, content(iteration))
    assert {file.name for file in path.parent.iterdir()} == {"checkpoint.pt", "checkpoint.previous.pt"}
    assert checkpoint.load(path)["iteration"] == 3
    assert checkpoint.load(checkpoint.previous_path(path))["iteration"] == 2


def test_save_that_was_killed_between_its_renames_is_the_newest(path: Path) -> None:
    for iteration in (1, 2):
        checkpoint.save(path, content(iteration))
    path.rename(path.with_name("checkpoint.new.pt"))
    newest = checkpoint.newest(path)
    assert newest and checkpoint.load(newest)["iteration"] == 2
    checkpoint.previous_path(path).rename(path)  # killed before the first one
    newest = checkpoint.newest(path)
    assert newest and checkpoint.load(newest)["iteration"] == 2


def test_newest_is_found_at_every_point_of_saving(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is killed after each of its system calls in turn."""

    class Killed(BaseException):
        pass

    def save(iteration: int, last_call: int) -> bool:
        calls = 0

        def counted(call: Any) -> Any:
            def replacement(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > last_call:
                    raise Killed
                return call(*args, **kwargs)

            return replacement

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                checkpoint.save(path, content(iteration))
            except Killed:
                return False
        return True

    assert checkpoint.newest(path) is None
    iteration = 1
    for last_call in (0, 1, 2, 3, 4):
        finished = save(iteration, last_call)
        newest = checkpoint.newest(path)
        if newest is None:
            assert last_call < 2, "nothing was complete yet"
            continue
        found = checkpoint.load(newest)
        assert found["iteration"] in (iteration - 1, iteration)
        assert_equal(found, content(found["iteration"]))
        assert found["iteration"] == iteration or not finished
        iteration = found["iteration"] + 1
    assert finished


def test_every_flipped_bit_is_noticed_or_harmless(path: Path) -> None:
    checkpoint.save(path, content())
    good = path.read_bytes()
    draw = random.Random(0)
    noticed = 0
    for _ in range(400):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            loaded = checkpoint.load(path)
        except MamlError:
            noticed += 1
        else:
            assert_equal(loaded, content())  # the changed byte was padding
    assert noticed > 100


def test_flipped_bit_in_a_tensor_is_noticed_where_torch_does_not(path: Path) -> None:
    checkpoint.save(path, content())
    weight = content()["state"]["theta"]["weight"]
    bad = bytearray(path.read_bytes())
    bad[bad.index(weight.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(bad)
    assert not torch.equal(torch.load(path, weights_only=True)["state"]["theta"]["weight"], weight)
    with pytest.raises(MamlError, match=r"damaged or not a checkpoint \(the checksum of .* is wrong\)"):
        checkpoint.load(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused_and_the_one_before_named(path: Path, share: float) -> None:
    checkpoint.save(path, content(1))
    checkpoint.save(path, content(2))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(MamlError) as caught:
        checkpoint.load(path)
    assert f"{path} is damaged or not a checkpoint" in str(caught.value)
    assert f"the previous one is {checkpoint.previous_path(path)}: rename it to checkpoint.pt" in str(caught.value)


def test_damaged_previous_file_is_not_advised(path: Path) -> None:
    for iteration in (1, 2):
        checkpoint.save(path, content(iteration))
    for each in (path, checkpoint.previous_path(path)):
        each.write_bytes(each.read_bytes()[:1000])
    with pytest.raises(MamlError, match=r"so is the previous one, .*checkpoint\.previous\.pt: restore one of them"):
        checkpoint.load(path)


@pytest.mark.parametrize("text", [b"", b"<html>404</html>", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_other_files_are_refused(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    with pytest.raises(MamlError, match="damaged or not a checkpoint"):
        checkpoint.load(path)


def test_folder_in_place_of_a_checkpoint_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(MamlError, match="damaged or not a checkpoint"):
        checkpoint.load(path)


def test_missing_file_is_named(path: Path) -> None:
    with pytest.raises(MamlError, match="there is no checkpoint at"):
        checkpoint.load(path)


@pytest.mark.parametrize("foreign", [[1, 2], {"theta": torch.zeros(2)}, {"format": "maml checkpoint 0"}])
def test_torch_file_of_another_program_is_refused(path: Path, foreign: Any) -> None:
    torch.save(foreign, path)
    with pytest.raises(MamlError, match="is not a checkpoint of this project"):
        checkpoint.load(path)


def test_file_that_would_run_code_is_not_run(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(path.with_name("made")),)

    torch.save({"format": "maml checkpoint 1", "state": Evil()}, path)
    with pytest.raises(MamlError, match="damaged or not a checkpoint"):
        checkpoint.load(path)
    assert not path.with_name("made").exists()


@pytest.mark.parametrize("size", [1, 300_000])  # torch hides the cause if it has written a part
def test_full_disk_while_saving_leaves_both_checkpoints(size: int, path: Path) -> None:
    checkpoint.save(path, content(1))
    checkpoint.save(path, content(2))
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    path.with_name(f".checkpoint.new.pt.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(MamlError, match=r"could not be written \(No space left on device\).* Free some disk space"):
        checkpoint.save(path, content(3) | {"more": torch.ones(size)})
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    checkpoint.save(path, content(3))
    assert checkpoint.load(path)["iteration"] == 3


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(MamlError, match="could not be written"):
        checkpoint.save(tmp_path / "nowhere" / "checkpoint.pt", content())


@pytest.mark.parametrize("older", [True, False])
def test_save_that_was_killed_after_its_first_rename_is_completed(path: Path, older: bool) -> None:
    checkpoint.save(path, content(1))
    checkpoint.save(path, content(2))
    path.rename(path.with_name("checkpoint.new.pt"))
    if older:
        checkpoint.previous_path(path).rename(path)
    checkpoint.complete_save(path)
    assert checkpoint.load(path)["iteration"] == 2
    assert checkpoint.load(checkpoint.previous_path(path))["iteration"] == 1
    assert len(list(path.parent.iterdir())) == 2


def test_group_of_an_older_checkpoint_has_its_name_of_today(tmp_path: Path) -> None:
    state = {"theta": {"a": torch.ones(2)}, "carried": {"mean": torch.zeros(2)}}
    checkpoint.save(tmp_path / "checkpoint.pt", {"state": state})
    assert list(checkpoint.load(tmp_path / "checkpoint.pt")["state"]) == ["theta", "buffers"]
