"""What ``lora merge`` has written, beside base and adapters apart: the same logits on a few real rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import CheckError, UserError
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.weights.provenance import AdapterOrigin

if TYPE_CHECKING:
    import torch

    from lora_cli.evaluation.agreement import Agreement

ROWS = 4
TOKENS = 64
SAMPLE = (
    "The river had risen in the night, and by morning the lower road could not be seen at all.",
    "A patient who takes this medicine should tell the doctor about any other medicine before the first dose.",
    "To get the total, multiply the price of one ticket by the number of people and add the fee.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
"""What a model is tried on that comes without rows of its own."""
TOLERANCE = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05}
"""Of the logits' relative difference: what weights rounded to these types may bring."""


@dataclass(frozen=True)
class Verified:
    """``apart`` is the perplexity with the adapters apart, as training saw the base; ``candidates`` are the bases that
    they could be merged into, each beside that."""

    rows: int
    tokens: int
    of: str
    apart: float
    merged: Agreement
    candidates: dict[str, Agreement]


def fits(base: Path) -> bool:
    """Whether the base can be loaded in float32 beside what else there is."""
    from lora_cli.model.base import best_device
    from lora_cli.model.memory import free_bytes
    from lora_cli.weights.shards import read_headers, weight_files

    numbers = sum(math.prod(info.shape) for info in read_headers(weight_files(base)).values())
    return numbers * 4 * 1.25 < free_bytes(best_device())


def verify(origins: Sequence[AdapterOrigin], out: Path, into: str | None, dtype: str, data: str | None) -> Verified:
    """Run the merged model in ``out`` and what it was made of. Raises CheckError when they differ by more than
    rounding.

    The rows are the first of ``data``, or of those the adapter was trained with, or a few sentences.
    """
    from lora_cli.evaluation.agreement import agreement, logits_of, perplexity

    rows, of = _rows(origins[0], data)
    recipe = origins[0].recipe
    quantization = recipe.quantization if recipe else None

    seen = logits_of(_apart(origins, quantization), rows)
    merged = logits_of(_load(out, None), rows)
    candidates = {}
    if quantization is not None:
        for name, expanded in (("expanded", quantization), ("original", None)):
            candidates[name] = logits_of(_apart(origins, None, expanded), rows)
    if into == "quantized":
        candidates["quantized"] = merged
    own = seen if into == "quantized" or not candidates else candidates[into or "expanded"]
    difference = agreement(own, merged, rows)
    against = {name: agreement(seen, logits, rows) for name, logits in candidates.items()}
    tokens = sum(len(row) for row in rows)
    result = Verified(len(rows), tokens, of, perplexity(seen, rows), difference, against)
    if into != "quantized" and not difference.relative <= TOLERANCE[dtype]:  # whose rounding is what is to be seen
        what = f"the merged model's logits are {difference.relative:.2%} from those of base and adapter"
        raise CheckError(f"{what}, which rounding to {dtype} does not explain", str(out), "do not use it")
    return result


def text(found: Verified) -> Iterator[str]:
    """What a person is told."""
    merged = found.merged
    yield (
        f"checked on {found.rows} rows ({found.tokens} tokens) of {found.of}: logits differ by at most "
        f"{merged.largest:.2g} ({merged.relative:.2g} of all they are), perplexity {found.apart:.3f} apart, "
        f"{merged.perplexity:.3f} merged"
    )
    if found.candidates:
        yield f"{'merged into':14}{'perplexity':>12}{'KL to training':>18}"
        for name, candidate in found.candidates.items():
            yield f"{name:14}{candidate.perplexity:>12.3f}{candidate.kl:>18.2g}"


def _rows(origin: AdapterOrigin, data: str | None) -> tuple[list[torch.Tensor], str]:
    """Token ids of a few rows, and where they are from."""
    import torch

    from lora_cli.cli import measure
    from lora_cli.data.sources import sources_of, whole_rows
    from lora_cli.data.tokenize import tokenize_rows
    from lora_cli.model.base import load_tokenizer

    folder = origin.folder if (origin.folder / "tokenizer_config.json").is_file() else origin.base
    tokenizer = load_tokenizer(folder)
    section = origin.recipe.data if data is None and origin.recipe else None
    if data is not None:
        section = measure.data_section(data, origin.recipe)
    ids, of = [tokenizer(sentence).input_ids for sentence in SAMPLE], "plain text"
    if section is not None:
        sources = sources_of(section.train if isinstance(section.validation, float | None) else section.validation)
        try:
            examples = tokenize_rows(section, islice(whole_rows(sources), ROWS), tokenizer).examples
            ids, of = [examples.row(row)[0] for row in range(len(examples))], measure.describe(section)
        except UserError:  # the training's data need not be where its adapter is
            if data is not None:
                raise
    return [torch.as_tensor(row[:TOKENS], dtype=torch.long) for row in ids if len(row) > 1], of


def _load(folder: Path, quantization: Quantization | None) -> Any:
    import gc

    import torch

    from lora_cli.model.base import best_device, load_base

    gc.collect()  # the model before this one
    return load_base(folder, Model(name_or_path=str(folder)), quantization, best_device(), torch.float32)


def _apart(
    origins: Sequence[AdapterOrigin], quantization: Quantization | None, expanded: Quantization | None = None
) -> Any:
    """The base, quantized or what its quantized weights stand for, with the adapters on it."""
    import torch

    from lora_cli.model.adapters import load_adapters
    from lora_cli.weights.quantize import expand_quantized
    from lora_cli.weights.shards import read_headers, stored_dtype, weight_files

    base = _load(origins[0].base, quantization)
    if expanded is not None:
        told = origins[0].dtype
        seen = getattr(torch, told) if told else stored_dtype(read_headers(weight_files(origins[0].base)))
        expand_quantized(base, expanded, seen)
    return load_adapters(base, [origin.folder for origin in origins])
