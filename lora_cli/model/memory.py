"""What a run will need, from shapes alone; what the device has; and how it says that there is no more."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from lora_cli.model.cgroups import memory_limits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ALLOCATION_FAILED = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of malloc.h
KEPT, LARGEST = 2**30, 2**25  # bytes; glibc takes no larger LARGEST

LOGITS_AT_ONCE = 5 * 2**24
"""Bytes that logits take where they are computed in blocks, sums with them: some tens of megabytes, whatever the
vocabulary."""


def activation_bytes(
    config: PreTrainedConfig,
    tokens: int,
    positions: int,
    element_size: int,
    checkpointing: bool = False,
    whole_logits: bool = False,
    kept: float | None = None,
) -> int:
    """Bytes that one micro-batch takes beside weights and adapter, at the height of its backward pass.

    What is kept of a token in all layers is ``kept`` bytes, where that is known. Else it is counted as in Korthikanti
    et al. 2022 (arXiv:2205.05198, section 4.1), without the attention matrices that fused attention never stores: of a
    frozen layer the norms' inputs, queries, keys, values, the attention's result and adapters' inputs are kept, about
    7 vectors of the hidden width a token, and 3 of the MLP's. With ``checkpointing`` a layer's input is, and one layer
    at a time the rest. The gradients of one layer come on top, about 2 and 3 such
    vectors at a time. Of the head its input's gradient is kept at ``positions``, or ``whole_logits`` and float32
    copies of them for the loss.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    inner = int(max(inner) if isinstance(inner, list | tuple) else inner)  # Gemma 3n's layers have each their own
    layers = int(text.num_hidden_layers)
    if kept is None:
        kept = layers * (7 * hidden + 3 * inner) * element_size
    if checkpointing:
        kept = layers * hidden * element_size + kept / layers
    body = int(tokens * (kept + (2 * hidden + 3 * inner) * element_size))
    head = positions * hidden * element_size + LOGITS_AT_ONCE
    if whole_logits:
        head = positions * int(text.vocab_size) * (element_size + 8)
    return body + head


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that can still be had on the device; of a processor's, no more than this process is allowed.

    ``root`` is the folder that holds ``proc`` and ``sys``, where control groups tell their limits.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of what torch holds
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    own = psutil.Process().memory_info()
    free = int(psutil.virtual_memory().available)
    limits = list(memory_limits(root))
    for limit, used in ((resource.RLIMIT_AS, own.vms), (resource.RLIMIT_DATA, getattr(own, "data", own.rss))):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY:
            limits.append((allowed, used))
    return max(0, min([free, *(allowed - used for allowed, used in limits)]))


def total_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that the device has; of a processor's, no more than the control groups allow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([int(psutil.virtual_memory().total), *(allowed for allowed, _ in memory_limits(root))])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the processor, where torch has no error class of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError | OSError):
        return False
    return any(words in str(error) for words in ALLOCATION_FAILED)


def asked_bytes(error: BaseException) -> int | None:
    """How much the allocation that failed was for, when the error tells."""
    found = re.search(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", str(error), re.IGNORECASE)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def describe_lack(error: BaseException) -> str:
    """What was asked for, what its device has, and what is free there; said best while what filled it still does."""
    told, asked = str(error), asked_bytes(error)
    is_gpus = isinstance(error, torch.OutOfMemoryError) or "CUDA" in told or "CUBLAS" in told
    device = torch.device("cuda" if is_gpus and torch.cuda.is_available() else "cpu")
    wanted = "an allocation failed" if asked is None else f"{size(asked)} more were asked for"
    free, total = free_bytes(device), total_bytes(device)
    return f"out of memory: {wanted}; {device.type} has {size(total)}, of which {size(free)} were free"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def keep_freed_memory(largest: int = LARGEST) -> None:
    """Let the memory of a tensor of up to ``largest`` bytes serve the next one, from now on; only glibc can.

    Given back to the system and asked for again it would come page by page, each cleared first: a sixth of the time
    that a merge takes, a tenth of a training step's in float32. But where large tensors come and go among small ones
    that stay, these cut up what is kept.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, largest)
