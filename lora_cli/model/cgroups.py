"""What control groups allow this process: containers, batch systems and systemd limit memory by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def memory_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group with a memory limit that this process is in, groups above included.

    ``root`` is the folder that holds ``proc`` and ``sys``. What is cached of files and was not read lately does not
    count as used: it makes room by itself, as kubelet counts, too.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        # Inside a container the mount may begin at its own group, whose path is then told from outside.
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
