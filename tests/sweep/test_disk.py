"""Whether a folder is on a disk that only this machine has."""

from __future__ import annotations

from pathlib import Path

from maml.sweep.disk import local_disk


def test_innermost_mount_decides(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\n"
        f"server:/export {tmp_path}/shared\\040disk nfs4 rw 0 0\n"
        f"tmpfs {tmp_path}/shared\\040disk/scratch tmpfs rw 0 0\n"
    )
    assert local_disk(tmp_path, mounts) == "ext4"
    assert local_disk(tmp_path / "shared disk" / "runs", mounts) is None
    assert local_disk(tmp_path / "shared disk" / "scratch", mounts) == "tmpfs"


def test_nothing_is_said_where_the_kernel_has_no_list(tmp_path: Path) -> None:
    assert local_disk(tmp_path, tmp_path / "missing") is None
