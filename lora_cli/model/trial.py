"""What trials of a model's forward pass share: their tokens, the error of their result and the errors they raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FORWARD_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that an architecture's forward pass raises for arguments that it does not support."""


def trial_ids(model: PreTrainedModel | PeftModel, count: int) -> torch.Tensor:
    """Different token ids to try the model on: (count,) int64, on the device of its weights."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return (torch.arange(count, device=next(model.parameters()).device) * 7919 + 3) % vocabulary


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found - wanted).float().norm() / wanted.float().norm())
