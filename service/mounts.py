"""What a folder is mounted from, as Linux tells it (proc(5), /proc/PID/mounts)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "fuse.sshfs",
        "glusterfs",
        "fuse.glusterfs",
        "ceph",
        "lustre",
    }
)


@dataclass(frozen=True)
class Mount:
    """The type of a file system and the options that it is mounted with; empty where nothing is told."""

    kind: str = ""
    options: frozenset[str] = frozenset()


def mount_of(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> Mount:
    """What the file system is mounted as that a folder, which is resolved, lies on."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Mount()
    found, longest = Mount(), -1
    for line in lines:
        _, point, kind, options, *_ = line.split(" ")
        mount = Path(point.replace("\\040", " "))
        if (mount == folder or mount in folder.parents) and len(mount.parts) >= longest:
            found, longest = Mount(kind, frozenset(options.split(","))), len(mount.parts)
    return found
