"""What a run will need, from shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def activation_bytes(config: PreTrainedConfig, tokens: int, supervised: int, element_size: int) -> int:
    """Bytes that the backward pass of one micro-batch keeps, roughly.

    A layer keeps about 12 vectors of the hidden width and 4 of the MLP's width a token (Korthikanti et al. 2022,
    arXiv:2205.05198, section 4.1, without the attention matrices that fused attention never stores); the head keeps its
    logits, and float32 copies of them for the loss, at ``supervised`` positions.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden)
    layers = int(text.num_hidden_layers)
    body = tokens * layers * (12 * hidden + 4 * inner) * element_size
    head = supervised * int(text.vocab_size) * (element_size + 8)
    return body + head


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
