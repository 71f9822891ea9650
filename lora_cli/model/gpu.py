"""What a GPU's generation can do."""

from functools import lru_cache

import torch


@lru_cache
def is_from_ampere_on(device: torch.device) -> bool:
    """Whether this GPU is newer than a T4 or a V100, which have no FlashAttention and no units for bfloat16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
