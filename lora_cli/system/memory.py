"""Memory: what the device has, how out-of-memory errors are recognized, and what is kept when tensors are freed."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from lora_cli.system.control_groups import group_folders

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ALLOCATION_FAILED = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values from malloc.h
KEPT, LARGEST = 2**30, 2**25  # bytes; glibc accepts no larger LARGEST


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can still be allocated on the device; on a CPU, no more than this process is allowed.

    ``root`` is the folder that holds ``proc`` and ``sys``, where control groups report their limits.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of what torch has reserved
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    own = psutil.Process().memory_info()
    free = int(psutil.virtual_memory().available)
    limits = list(_group_limits(root))
    for limit, used in ((resource.RLIMIT_AS, own.vms), (resource.RLIMIT_DATA, getattr(own, "data", own.rss))):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY:
            limits.append((allowed, used))
    return max(0, min([free, *(allowed - used for allowed, used in limits)]))


def total_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes of memory that the device has; on a CPU, no more than the control groups allow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([int(psutil.virtual_memory().total), *(allowed for allowed, _ in _group_limits(root))])


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and usage, in bytes, of each control group of this process that has a memory limit, parents included.

    Usage excludes the inactive file cache, as in kubelet: the kernel frees this memory when needed.
    """
    for folder, version in group_folders("memory", root):
        with suppress(OSError, ValueError):  # no such folder or file, or "max"
            if version == 2:
                yield _read_limit(folder, "memory.max", "memory.current", "inactive_file")
            else:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield _read_limit(folder, *names)


def _read_limit(folder: Path, limit: str, usage: str, reclaimable: str) -> tuple[int, int]:
    allowed, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return allowed, used - int(stat.get(reclaimable, 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, for which torch has no error class of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError | OSError):
        return False
    return any(words in str(error) for words in ALLOCATION_FAILED)


def requested_bytes(error: BaseException) -> int | None:
    """The bytes that the failed allocation asked for, if the error states them."""
    found = re.search(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", str(error), re.IGNORECASE)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def describe_out_of_memory(error: BaseException) -> str:
    """A message with the bytes requested, present and free on the device. Call it before the memory is freed."""
    text, asked = str(error), requested_bytes(error)
    is_gpus = isinstance(error, torch.OutOfMemoryError) or "CUDA" in text or "CUBLAS" in text
    device = torch.device("cuda" if is_gpus and torch.cuda.is_available() else "cpu")
    wanted = "an allocation failed" if asked is None else f"{format_bytes(asked)} more were asked for"
    free, total = free_bytes(device), total_bytes(device)
    return f"out of memory: {wanted}; {device.type} has {format_bytes(total)}, of which {format_bytes(free)} were free"


def format_bytes(count: int) -> str:
    """A human-readable number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def keep_freed_memory(largest: int = LARGEST) -> None:
    """From now on, reuse the freed memory of tensors of up to ``largest`` bytes; works with glibc only.

    Memory that is returned to the system and requested again comes page by page, each cleared first. This takes a sixth
    of a merge's time, and a tenth of a float32 training step's. But where large tensors come and go among small ones
    that stay, the small ones fragment the kept memory.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, largest)
