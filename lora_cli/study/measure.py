"""What eval, quantize and merge share: the rows to measure on, and a model's perplexity on them.

What imports torch is imported in functions: faults in the rows are reported before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.data.faults import data_faults
from lora_cli.data.sources import part_of, sources_of
from lora_cli.errors import UserError, pluralize
from lora_cli.model.files import tokenizer_folder
from lora_cli.recipe.schema import Data, Model, Recipe, Source
from lora_cli.weights.files.check_model import check_directly_read_weights, check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_cli.data.examples import Examples, Ints
    from lora_cli.display import Display
    from lora_cli.evaluation.compare import Comparison


def data_section(data: str | None, recipe: Recipe | None) -> Data:
    """Return the data section to measure on: ``data``, read with the recipe's settings, else the recipe's own section.

    Raises UserError when ``data`` is empty, or is None and no recipe names validation rows.
    """
    if data == "":
        raise UserError("--data: the name is empty", hint="give a file, a folder, a glob or a hub id")
    if data is not None:
        known = recipe.data.model_dump() if recipe else {}
        return Data.model_validate({**known, "train": data, "validation": None})
    if recipe is None or recipe.data.validation is None:
        raise UserError("no rows to measure on", hint="give --data FILE")
    return recipe.data


def check_rows(data: Data) -> None:
    """Raises UserError with every fault in the rows to measure on. Other training rows may be missing here."""
    faults = data_faults(data.model_copy(update={"train": sources(data), "validation": None}), set())
    if faults:
        raise UserError(faults)


@dataclass(frozen=True)
class Rows:
    """Tokenized rows that fit a model, and what scoring them needs."""

    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    max_length: int


def rows_for(base: Path, adapter: Path | None, data: Data, recipe: Recipe | None) -> Rows:
    """Return the rows to measure on, tokenized, and check the model as far as is possible without loading its weights.
    They are those of ``data.validation`` if there is one, else of ``data.train``. A share is split off as in training.

    Raises UserError for every fault found that would make the measurement fail.
    """
    from lora_cli.data.batches import split_validation
    from lora_cli.data.examples import check_ids, cut_for_evaluation
    from lora_cli.data.tokenize import tokenize
    from lora_cli.model.adapters import resize_embeddings
    from lora_cli.model.base import check_causal, load_config, load_tokenizer, max_positions, meta_model

    config = load_config(base)
    check_causal(config)
    check_directly_read_weights(base, training=False)
    bare = meta_model(config)
    check_weights(base, bare)
    if adapter is not None:
        resize_embeddings(bare, adapter)
    tokenizer = load_tokenizer(tokenizer_folder(base, adapter))
    max_length = min(data.max_length, max_positions(config) or data.max_length)
    found = tokenize(data, sources(data), tokenizer)
    if isinstance(data.validation, float):
        _, found = split_validation(found, data.validation, recipe.training.seed if recipe else 0)
    examples = cut_for_evaluation(found, max_length, "the rows to measure on")
    check_ids(examples, bare.config.get_text_config().vocab_size, str(base))
    return Rows(tokenizer, examples, max_length)


def sources(data: Data) -> tuple[Source, ...]:
    """Return the sources of the rows to measure on: of ``validation`` if it names separate rows, else of ``train``."""
    return sources_of(data.own_validation or data.train)


def changed_rows_warning(rows: Rows, record: dict[str, Any]) -> str | None:
    """Return a warning if ``rows`` are not the validation rows that the adapter's record names, else None."""
    recorded = (record.get("data") or {}).get("validation") or {}
    if recorded.get("fingerprint") in (None, rows.examples.fingerprint):
        return None
    return (
        f"these are not the {recorded['rows']:,} validation rows of the training run: data or tokenizer have changed "
        "since, so do not compare these scores with the run's"
    )


def describe(data: Data) -> str:
    """Describe the rows to measure on, for the user."""
    share = f"{100 * data.validation:g}% of " if isinstance(data.validation, float) else ""
    parts = ((each.path, part_of(each)) for each in sources(data))
    return share + ", ".join(path if part == "train" else f"{path}[{part}]" for path, part in parts)


def measure(base: Path, adapter: Path | None, rows: Rows, recipe: Recipe | None, display: Display) -> Comparison:
    """Measure the perplexity of a model, or of an adapter and its base, on ``rows``. ``display`` shows the progress.

    An adapter is measured on the base it was trained on, quantized as its recipe says. Raises RunError when a loss is
    not finite.
    """
    from lora_cli.evaluation.compare import compare
    from lora_cli.model.base import load_base
    from lora_cli.model.device import best_device, resolve_dtype

    quantization = recipe.quantization if recipe and adapter else None
    device = best_device()
    settings = recipe.model if recipe else Model(name_or_path=str(base))
    model = load_base(base, settings, quantization, device, resolve_dtype(settings.dtype, device))

    def watch(groups: Sequence[Ints], what: str) -> Iterator[Ints]:
        display.note(f"measuring {what} on {pluralize(len(rows.examples), 'row')}")
        return display.through(groups, "measuring")

    attention = settings.attn_implementation
    return compare(model, base, adapter, rows.tokenizer, rows.examples, rows.max_length, attention, watch)
