"""A model's stored tensors: those of its folder, or what an adapter makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_cli.weights.shards import TensorInfo, read_headers, read_tensor, weight_files


@dataclass(frozen=True)
class StoredModel:
    """The model to quantize: the one in ``folder``, or what an adapter makes of it.

    ``read`` gives a tensor by the name ``folder`` stores it under; ``words`` is the size of the vocabulary where the
    adapter has grown it, ``untied`` says that it has given the head a tensor of its own.
    """

    folder: Path
    headers: dict[str, TensorInfo]
    read: Callable[[str], torch.Tensor]
    adapter: Path | None = None
    words: int | None = None
    untied: bool = False


def stored_model(folder: Path) -> StoredModel:
    """The model in ``folder`` as it is."""
    headers = read_headers(weight_files(folder))
    return StoredModel(folder, headers, lambda name: read_tensor(headers[name], name))
