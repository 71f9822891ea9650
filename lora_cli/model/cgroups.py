"""Memory limits of this process's control groups, which containers, batch systems and systemd set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def memory_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield limit and usage, in bytes, of each control group of this process that has a memory limit, parents included.

    ``root`` is the folder that holds ``proc`` and ``sys``. Usage excludes the inactive file cache, as in kubelet: the
    kernel frees this memory when needed.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        # In a container, the mount may start at the container's own group, while the path is that on the host.
        for part in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such folder or file, or "max"
                if not controllers:
                    yield _read(mount / part, "memory.max", "memory.current", "inactive_file")
                elif "memory" in controllers.split(","):
                    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                    yield _read(mount / "memory" / part, *names)


def _read(folder: Path, limit: str, usage: str, reclaimable: str) -> tuple[int, int]:
    allowed, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return allowed, used - int(stat.get(reclaimable, 0))
