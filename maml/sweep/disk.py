"""Says whether a folder is on a disk of this machine, which other machines probably do not see."""

from __future__ import annotations

from pathlib import Path

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "vfat", "ntfs3"}


def local_disk(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """Returns the type of the file system that a folder is on if its disk belongs to this machine, else None.

    A local disk can still be shared: the machine may export it to others.

    Args:
        folder: an existing folder.
        mounts: the kernel's list of file systems; where it does not exist, nothing is known.
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    found, kind = Path(), ""
    for line in lines:
        _, mounted, this_kind, *_ = line.split(" ")
        place = Path(mounted.replace("\\040", " "))
        if folder.resolve().is_relative_to(place) and len(place.parts) >= len(found.parts):  # later ones hide earlier
            found, kind = place, this_kind
    return kind if kind in _LOCAL else None
