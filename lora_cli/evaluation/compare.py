"""Compare a base with its adapter on the same rows, with one loaded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_cli.data.batches import collate
from lora_cli.data.examples import Examples, Ints, highest_id
from lora_cli.errors import RunError
from lora_cli.evaluation.head import frozen_head
from lora_cli.evaluation.loss import Score, evaluating, evaluation_groups, mean_score, tally_loss
from lora_cli.evaluation.packing import enable_packing
from lora_cli.model.adapters import load_adapter
from lora_cli.model.base import longrope_bounds, pad_token_id
from lora_cli.model.device import dtype_name
from lora_cli.system.memory import keep_freed_memory

ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class Comparison:
    """A model's score and its base's, which is None without an adapter or when rows hold tokens that the base lacks."""

    score: Score
    base: Score | None


def compare(
    model: PreTrainedModel,
    base: Path,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    max_length: int,
    attn_implementation: str = "auto",
    watch: Callable[[Sequence[Ints], str], Iterable[Ints]] = lambda groups, _: groups,
) -> Comparison:
    """Score the examples with ``model``, loaded from ``base``, and, if given, with ``adapter`` on it.

    ``watch`` takes each score's batches and the name of what is scored, and returns an iterable of the batches.
    Raises RunError, with the path of the adapter or model, when a loss is not finite.
    """
    device = next(model.parameters()).device
    keep_freed_memory()
    config = None if adapter is None else PeftConfig.from_pretrained(str(adapter))
    # aLoRA is active after its invocation tokens, of which PEFT finds only the last in each sequence.
    is_activated = getattr(config, "alora_invocation_tokens", None) is not None
    packing = not is_activated and enable_packing(model, attn_implementation)

    def score(model: PreTrainedModel | PeftModel, what: str) -> Score:
        with evaluating(model):
            head = frozen_head(model)
        groups = evaluation_groups(examples, ROWS_AT_ONCE, max_length, packing, longrope_bounds(model.config))
        batches = ((collate(examples, rows, packing, pad_token_id(tokenizer)), 1.0) for rows in watch(groups, what))
        found = mean_score(tally_loss(model, batches, device, head))
        if not math.isfinite(found.loss):
            hint = f"the weights are damaged, or the activations overflow {dtype_name(model.dtype)}"
            raise RunError(f"the loss of {what} is {found.loss}", str(adapter or base), hint)
        return found

    if adapter is None:
        is_quantized = getattr(model.config, "quantization_config", None) is not None
        return Comparison(score(model, "the quantized model" if is_quantized else "the model"), None)
    # Score the base before PEFT gives it the adapter's biases, PiSSA's residual or new tokens, which rows may hold.
    in_vocabulary = highest_id(examples) < model.config.get_text_config().vocab_size
    alone = score(model, "the base") if in_vocabulary else None
    return Comparison(score(load_adapter(model, adapter), "the base with its adapter"), alone)
