"""Whether a model computes packed rows as it computes each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lora_cli.evaluation.loss import evaluating, packed_row_arguments
from lora_cli.model.fast_paths.attention import ROWS, ROWS_ALONE
from lora_cli.model.layers import has_experts, is_8_bit
from lora_cli.model.trial import FORWARD_ERRORS, relative_error, trial_ids
from lora_cli.system.memory import is_out_of_memory


def enable_packing(model: PreTrainedModel | PeftModel, attn_implementation: str) -> bool:
    """Prepare the model for packed rows, if possible with attention by rows, and return whether it computes them
    exactly. Attention by rows takes no masks from then on.

    Of two packed rows, the second must give the same logits behind any other row, and both the logits that they give
    alone. Models with a state, a convolution over time or other kinds of positions fail and are left as they were. So
    is GPT-Neo: its masks have the model's maximum length, which packed rows may exceed.
    """
    if model.config.model_type == "gpt_neo":
        return False
    given = model.config._attn_implementation
    ids = trial_ids(model, 19)
    first, second, other = ids[:7], ids[7:12], ids[12:]  # the other is as long as the first
    # The row behind cannot change a row's logits, but gives the products the shape of two packed rows: for another
    # shape, a GPU may choose a kernel that rounds differently.
    pairs = (first, second), (second, first)
    alone = torch.cat([_logits(model, pair, packed=False)[: len(pair[0])] for pair in pairs])
    takes_rows = attn_implementation == "auto" and model._supports_flash_attn  # through FlashAttention's arguments
    for implementation in (ROWS, given) if takes_rows else (given,):
        model.set_attn_implementation(implementation)
        if _keeps_rows_apart(model, first, second, other, alone):
            if implementation == ROWS:
                model.set_attn_implementation(ROWS_ALONE)
            return True
    return False


def _keeps_rows_apart(
    model: PreTrainedModel | PeftModel,
    first: torch.Tensor,
    second: torch.Tensor,
    other: torch.Tensor,
    alone: torch.Tensor,
) -> bool:
    """Whether ``second``, packed, has the same logits behind ``first`` and behind ``other``, which are of one length,
    and both rows have those that they have ``alone``."""
    try:
        packed, behind = (_logits(model, (row, second), packed=True) for row in (first, other))
    except FORWARD_ERRORS as error:  # no position ids, or something that attention by rows does not support
        if is_out_of_memory(error):
            raise
        return False
    exact, rounding = (1e-6, 1e-3) if model.dtype == torch.float32 else (0.02, 0.05)
    if not has_experts(model):  # experts' products have other shapes behind another row
        exact = 0.0
    apart = relative_error(behind[len(first) :], packed[len(first) :])
    return apart <= exact and relative_error(packed, alone) < rounding


def _logits(model: PreTrainedModel | PeftModel, rows: Sequence[torch.Tensor], packed: bool) -> torch.Tensor:
    """The logits (tokens, vocabulary) of the rows end to end: ``packed``, or as if they were one row."""
    boundaries: dict[str, Any] = {}
    if packed:
        device, lengths = rows[0].device, [len(row) for row in rows]
        places = torch.cat([torch.arange(length, device=device) for length in lengths])
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        boundaries = packed_row_arguments(places[None], starts, max(lengths))
    with evaluating(model), _dequantized_8_bit_layers(model):
        logits: torch.Tensor = model(input_ids=torch.cat(list(rows))[None], use_cache=False, **boundaries).logits[0]
    return logits


def _dequantized_8_bit_layers(model: torch.nn.Module) -> ExitStack:
    """A context in which 8-bit layers multiply by their dequantized weights. LLM.int8() (arXiv:2208.07339) itself mixes
    the rows of any batch, packed or padded: a feature with an outlier in one row is computed in 16 bits for all."""
    hooks = ExitStack()
    for layer in filter(is_8_bit, model.modules()):
        hooks.enter_context(layer.register_forward_hook(_product_of_8_bits))
    return hooks


def _product_of_8_bits(layer: Any, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
    return linear(inputs[0], weight.to(inputs[0].dtype), layer.bias)
