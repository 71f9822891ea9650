"""What eval and quantize share: the rows to measure on, and a model's perplexity on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import UserError
from lora_cli.recipe.schema import Data, Quantization, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_cli.data.examples import Examples
    from lora_cli.evaluation.compare import Comparison


def data_section(data: str | None, recipe: Recipe | None) -> Data:
    """How rows are to be read: the file asked for, in the way the recipe reads its own; else the recipe's validation.

    Raises UserError when neither says what to measure on.
    """
    if data is not None:
        known = recipe.data.model_dump(exclude={"train", "validation"}) if recipe else {}
        return Data.model_validate({**known, "train": data, "validation": None})
    if recipe is None or recipe.data.validation is None:
        raise UserError("nothing to measure on", hint="give --data FILE")
    return recipe.data


def check(data: Data) -> None:
    """Raises UserError with every fault in the rows, before a model is looked at."""
    from lora_cli.training.prepare import check_data

    faults = check_data(data)
    if faults:
        raise UserError(faults)


def examples_of(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> Examples:
    """The rows to measure: of ``validation`` when the section has it (a share is split off as training did)."""
    from lora_cli.data.batches import split_validation
    from lora_cli.data.examples import cut_for_evaluation
    from lora_cli.data.sources import sources_of
    from lora_cli.data.tokenize import tokenize

    if data.validation is None or isinstance(data.validation, float):
        rows = tokenize(data, sources_of(data.train), tokenizer)
        if data.validation is not None:
            _, rows = split_validation(rows, data.validation, seed)
        return cut_for_evaluation(rows, max_length, "the rows to measure on")
    rows = tokenize(data, sources_of(data.validation), tokenizer)
    return cut_for_evaluation(rows, max_length, "the rows to measure on")


def describe(data: Data) -> str:
    """The rows to measure, in words."""
    if isinstance(data.validation, float):
        return f"{data.validation:.0%} of {data.train}"
    return str(data.train if data.validation is None else data.validation)


def measure(
    base: Path, adapter: Path | None, data: Data, recipe: Recipe | None, quantization: Quantization | None = None
) -> Comparison:
    """Perplexity of a model, or of an adapter beside its base, on the rows that ``data`` names."""
    from lora_cli.data.examples import check_ids
    from lora_cli.evaluation.compare import compare
    from lora_cli.model.base import (
        best_device,
        load_base,
        load_config,
        load_tokenizer,
        max_positions,
        resolve_dtype,
        skeleton,
    )
    from lora_cli.recipe.schema import Model
    from lora_cli.weights.check import check_weights

    config = load_config(base)
    check_weights(base, skeleton(config))
    tokenizer = load_tokenizer(adapter if adapter and (adapter / "tokenizer_config.json").is_file() else base)
    max_length = min(data.max_length, max_positions(config) or data.max_length)
    examples = examples_of(data, tokenizer, max_length, recipe.training.seed if recipe else 0)
    check_ids(examples, config.get_text_config().vocab_size, str(base))
    device = best_device()
    settings = recipe.model if recipe else Model(name_or_path=str(base))
    model = load_base(base, settings, quantization, device, resolve_dtype(settings.dtype, device))
    if adapter is None:
        return compare(model, tokenizer, examples, max_length)
    from lora_cli.model.adapters import load_adapter

    return compare(load_adapter(model, adapter), tokenizer, examples, max_length)
