"""A model's stored tensors: those of its folder, or these with an adapter merged in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_cli.weights.shards import TensorInfo, read_headers, read_tensor, weight_files


@dataclass(frozen=True)
class StoredModel:
    """The model to quantize: the one in ``folder``, or that model with ``adapter`` merged in.

    ``read`` returns a tensor by its stored name. ``vocab_size`` is the size of the vocabulary if the adapter sets it.
    ``untied`` says that the adapter has given the head a tensor of its own.
    """

    folder: Path
    headers: dict[str, TensorInfo]
    read: Callable[[str], torch.Tensor]
    adapter: Path | None = None
    vocab_size: int | None = None
    untied: bool = False


def stored_model(folder: Path) -> StoredModel:
    """Return the model in ``folder`` without an adapter."""
    headers = read_headers(weight_files(folder))
    return StoredModel(folder, headers, lambda name: read_tensor(headers[name]))
