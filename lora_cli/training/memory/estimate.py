"""Estimate a run's memory from the shapes of its base and its rows; nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lora_cli.data.examples import Ints
from lora_cli.model.device import best_device, resolve_dtype
from lora_cli.model.files import stored_quantization
from lora_cli.model.layers import checkpointed_layers, linear_layers
from lora_cli.recipe.schema import Recipe
from lora_cli.training.prepare import Prepared
from lora_cli.weights.files.shards import model_headers

LOGITS_BLOCK_BYTES = 5 * 2**24
"""Bytes for logits that are computed in blocks, and for their sums: some tens of megabytes for any vocabulary."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes: frozen base, trained weights with gradients and optimizer state, one batch's activations."""

    weights: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations


def estimate(job: Prepared, recipe: Recipe) -> MemoryEstimate:
    """Estimate the memory for a run of ``recipe`` from shapes alone; ``job`` has those of the base and the rows."""
    bare, dtype = job.bare, resolve_dtype(recipe.model.dtype, best_device())
    bits = _bits(job.base, bare, recipe, dtype)
    linear = {bare.get_submodule(name).weight for name in linear_layers(bare)}

    def size(parameters: Iterable[torch.nn.Parameter]) -> float:
        return sum(each.numel() * (bits if each in linear else 8 * dtype.itemsize) for each in parameters) / 8

    parameters = set(bare.parameters())
    weights = size(parameters)
    if recipe.training.stream_base is True:  # one layer is in memory at a time
        layers = [set(layer.parameters()) for layer in checkpointed_layers(bare).values()]
        weights = size(parameters.difference(*layers)) + max(map(size, layers))
    trained = sum(recipe.adapter.r * (target.in_features + target.out_features) for target in job.targets)
    state = 2 if recipe.training.optim.endswith("8bit") else 8
    examples, training = job.train.examples, recipe.training
    limit, packing = min(job.max_length, recipe.data.max_length), recipe.data.packing
    batch = largest_batch(examples.lengths, examples.supervised_per_row, training.batch_size, limit, packing)
    checkpointing = training.gradient_checkpointing is True
    activations = activation_bytes(job.config, *batch, dtype.itemsize, checkpointing)
    return MemoryEstimate(int(weights), trained * (8 + state), activations)


def _bits(folder: Path, bare: PreTrainedModel, recipe: Recipe, dtype: torch.dtype) -> float:
    """Return the bits per parameter of a base's linear layers, 4-bit scales included; ``dtype``'s if not quantized.

    A 4-bit block of 64 has a scale of 32 bits, or about 8 if double-quantized (QLoRA, arXiv:2305.14314, section 3).
    """
    if recipe.quantization is not None:
        in_4_bits = 4.127 if recipe.quantization.double_quant else 4.5
        return 8 if recipe.quantization.method == "int8" else in_4_bits
    if not stored_quantization(folder):
        return 8 * dtype.itemsize
    layers, prefix = linear_layers(bare), f"{bare.base_model_prefix}."
    names = layers.keys() | {name.removeprefix(prefix) for name in layers}
    stored = sum(info.bytes for name, info in model_headers(folder).items() if _is_within(name, names))
    return 8 * stored / sum(each.in_features * each.out_features for each in layers.values())


def _is_within(tensor: str, layers: set[str]) -> bool:
    """Whether a stored tensor belongs to one of the layers: weight.absmax, a part of a 4-bit weight, does too."""
    parts = tensor.split(".")
    return any(".".join(parts[:count]) in layers for count in range(1, len(parts)))


def activation_bytes(
    config: PreTrainedConfig,
    tokens: int,
    positions: int,
    element_size: int,
    checkpointing: bool = False,
    whole_logits: bool = False,
    kept: float | None = None,
) -> int:
    """Bytes that one micro-batch needs besides weights and adapter, at the peak of its backward pass.

    All layers together keep ``kept`` bytes per token. If None, this is estimated as in Korthikanti et al. 2022
    (arXiv:2205.05198, section 4.1), without the attention matrices, which fused attention never stores. A frozen layer
    keeps the norms' inputs, queries, keys, values, the attention's result and the adapters' inputs: per token, about 7
    vectors of the hidden width and 3 of the MLP's. With ``checkpointing``, each layer keeps its input, and one layer at
    a time the rest. The gradients of one layer add about 2 and 3 such vectors. The head keeps its input's gradient at
    ``positions`` or, with ``whole_logits``, the logits there and float32 copies of them for the loss.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    inner = int(max(inner) if isinstance(inner, list | tuple) else inner)  # each of Gemma 3n's layers has its own
    layers = int(text.num_hidden_layers)
    if kept is None:
        kept = layers * (7 * hidden + 3 * inner) * element_size
    if checkpointing:
        kept = layers * hidden * element_size + kept / layers
    body = int(tokens * (kept + (2 * hidden + 3 * inner) * element_size))
    head = positions * hidden * element_size + LOGITS_BLOCK_BYTES
    if whole_logits:
        head = positions * int(text.vocab_size) * (element_size + 8)
    return body + head


def largest_batch(lengths: Ints, supervised: Ints, batch_size: int, max_length: int, packing: bool) -> tuple[int, int]:
    """Return the most tokens, padding included, and the most positions with logits that a micro-batch can have.

    ``lengths`` and ``supervised`` (rows,) count each row's tokens. In a padded batch, every row has logits at each
    position that is supervised in any row.
    """
    lengths = np.minimum(lengths, max_length)
    supervised = np.minimum(supervised, lengths)
    if packing:
        tokens = min(batch_size * max_length, int(lengths.sum()))
        return tokens, min(tokens, int(supervised.sum()))
    rows, longest = min(batch_size, len(lengths)), int(lengths.max())
    columns = min(longest, int(np.sort(supervised)[-rows:].sum()))
    return rows * longest, rows * columns
