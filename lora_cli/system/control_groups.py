"""The control groups of this process, in which Linux limits memory and CPU time of containers, jobs and services."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def group_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each control group that may limit this process's ``controller`` (memory, cpu), parents
    included, and whether it is of version 1 or 2.

    ``root`` is the folder that holds ``proc`` and ``sys``. Not all of the folders exist.
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
            if not controllers:
                yield mount / part, 2
            elif controller in controllers.split(","):
                yield mount / controller / part, 1
