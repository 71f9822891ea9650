"""Check that a model written by ``lora merge`` has the same logits as base and unmerged adapters on a few rows."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from lora_cli.data.sources import valid_rows
from lora_cli.data.tokenize import tokenize_rows
from lora_cli.errors import CheckError, UserError, pluralize
from lora_cli.evaluation.agreement import Agreement, agreement, logits_of, perplexity
from lora_cli.model.adapters import load_adapters, resize_embeddings
from lora_cli.model.base import load_base, load_tokenizer
from lora_cli.model.device import best_device, dtype_name
from lora_cli.model.files import tokenizer_folder
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.study import measure
from lora_cli.weights.adapter.origin import AdapterOrigin
from lora_cli.weights.files.shards import TensorInfo, model_headers, stored_dtype, stored_name
from lora_cli.weights.merge import training_dtype
from lora_cli.weights.quantized_layers import dequantize_quantized

ROWS = 4
TOKENS = 64
SENTENCES = (
    "The river had risen in the night, and by morning the lower road could not be seen at all.",
    "A patient who takes this medicine should tell the doctor about any other medicine before the first dose.",
    "To get the total, multiply the price of one ticket by the number of people and add the fee.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
"""The rows to verify on when the adapter's own data is not available."""
NOISE = 1e-5
"""The relative difference of the logits allowed for a different order of summation in float32."""
SHARE = 0.05
"""Also allowed: this share of the relative change that the adapter or rounding makes to the logits, whichever is
larger. A tie may be rounded either way."""


@dataclass(frozen=True)
class Verified:
    """``apart`` is the perplexity with unmerged adapters on the base as training saw it. ``candidates`` has, for each
    base that the adapters could be merged into, the agreement with that model.

    ``moved`` is the relative change that the adapters make to the logits, ``rounding`` the one that rounding the merged
    weights to their stored dtypes makes. Both are None when the merged weights are quantized again."""

    rows: int
    tokens: int
    of: str
    apart: float
    merged: Agreement
    candidates: dict[str, Agreement]
    moved: float | None
    rounding: float | None

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report for the user."""
        merged = self.merged
        yield (
            f"checked on {pluralize(self.rows, 'row')} ({self.tokens} tokens) of {self.of}: logits differ by at most "
            f"{merged.largest:.2g} (relative difference {merged.relative:.2g}), perplexity {self.apart:.3f} unmerged, "
            f"{merged.perplexity:.3f} merged"
        )
        if self.moved is not None:
            yield f"the adapter changes the logits by {self.moved:.2g} (relative), rounding by {self.rounding:.2g}"
        if self.candidates:
            yield f"{'merged into':14}{'perplexity':>12}{'KL to training':>18}"
            for name, candidate in self.candidates.items():
                yield f"{name:14}{candidate.perplexity:>12.3f}{candidate.kl:>18.2g}"


@dataclass(frozen=True)
class Sample:
    """Token ids of a few rows, and a description of their source."""

    ids: Sequence[torch.Tensor]
    of: str


@dataclass(frozen=True)
class Expected:
    """The logits of the base with unmerged adapters, of the base alone, of PEFT's merge of the two in float32, and of
    that merge rounded to the stored dtypes."""

    unmerged: list[torch.Tensor]
    base: list[torch.Tensor]
    summed: list[torch.Tensor]
    rounded: list[torch.Tensor]


def verify(origins: Sequence[AdapterOrigin], draft: Path, out: Path, into: str | None, sample: Sample) -> Verified:
    """Compare the merged model in ``draft``, to be moved to ``out``, with its base and unmerged adapters. Raises
    CheckError when the logits differ by more than rounding explains."""
    quantization = origins[0].quantization
    stored = model_headers(draft)
    merged = logits_of(_load(draft, None), sample.ids)
    candidates, expected = {}, None
    if quantization is None:
        expected = _expected(origins, None, stored, sample)
        in_training = unmerged = expected.unmerged
    else:
        in_training = unmerged = logits_of(_adapted(_base(origins, quantization, None), origins), sample.ids)
        for name, expanded in (("expanded", quantization), ("original", None)):
            if name == (into or "expanded"):
                expected = _expected(origins, expanded, stored, sample)
                candidates[name] = unmerged = expected.unmerged
            else:
                candidates[name] = logits_of(_adapted(_base(origins, None, expanded), origins), sample.ids)
    if into == "quantized":
        candidates["quantized"] = merged
    moved, rounding = (None, None) if expected is None else _check_explained(merged, expected, sample, stored, out)
    return Verified(
        rows=len(sample.ids),
        tokens=sum(len(row) for row in sample.ids),
        of=sample.of,
        apart=perplexity(in_training, sample.ids),
        merged=agreement(unmerged, merged, sample.ids),
        candidates={name: agreement(in_training, logits, sample.ids) for name, logits in candidates.items()},
        moved=moved,
        rounding=rounding,
    )


def _check_explained(
    merged: list[torch.Tensor], expected: Expected, sample: Sample, stored: Mapping[str, TensorInfo], out: Path
) -> tuple[float, float]:
    """Return the relative changes that adapters and rounding make to the logits. Raises CheckError when the merged
    model's logits differ from those of base and unmerged adapters by more than rounding explains."""

    def differ(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
        return agreement(wanted, found, sample.ids).relative

    moved, rounding = differ(expected.unmerged, expected.base), differ(expected.unmerged, expected.rounded)
    allowed = NOISE + SHARE * max(moved, rounding)
    if differ(expected.unmerged, expected.summed) <= allowed and differ(expected.rounded, merged) <= allowed:
        return moved, rounding
    dtype = dtype_name(stored_dtype(stored))
    raise CheckError(
        f"the merged model's logits differ by {differ(expected.unmerged, merged):.2%} from those of base and adapter, "
        f"more than rounding to {dtype} explains ({rounding:.2%}; the adapter changes them by {moved:.2%})",
        str(out),
        "nothing was written; --no-verify would write the model, but do not use it",
    )


def sample_for(origin: AdapterOrigin, data: str | None) -> Sample:
    """Return the first rows of ``data``, else of the recipe's validation or training rows, else a few sentences.
    Raises UserError when ``data`` is given but cannot be used."""
    tokenizer = load_tokenizer(tokenizer_folder(origin.base, origin.folder))
    section = origin.recipe.data if data is None and origin.recipe else None
    if data is not None:
        section = measure.data_section(data, origin.recipe)
    ids, of = [tokenizer(sentence).input_ids for sentence in SENTENCES], "plain text"
    if section is not None:
        try:
            rows = islice(valid_rows(measure.sources(section)), ROWS)
            examples = tokenize_rows(section, rows, tokenizer).examples
            if examples.lengths.max() < 2:
                raise UserError("no token to predict in the first rows", measure.describe(section), "give others")
            ids, of = [examples.row(row)[0] for row in range(len(examples))], measure.describe(section)
        except UserError:  # the recipe's data need not be available here
            if data is not None:
                raise
    return Sample([torch.as_tensor(row[:TOKENS], dtype=torch.long) for row in ids if len(row) > 1], of)


def _load(folder: Path, quantization: Quantization | None, quantized_from: torch.dtype | None = None) -> Any:
    """Load the model with unquantized parameters in float32. Weights are quantized from dtype ``quantized_from``."""
    gc.collect()  # free the model loaded before this one
    dtype = quantized_from or torch.float32
    model = load_base(folder, Model(name_or_path=str(folder)), quantization, best_device(), dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def _adapted(base: Any, origins: Sequence[AdapterOrigin]) -> Any:
    return load_adapters(base, [origin.folder for origin in origins])


def _base(origins: Sequence[AdapterOrigin], quantization: Quantization | None, expanded: Quantization | None) -> Any:
    """Load the base: quantized, or quantized as ``expanded`` and dequantized again, or unquantized."""
    seen = training_dtype(origins[0])
    base = _load(origins[0].base, quantization, seen if quantization else None)
    if expanded is not None:
        dequantize_quantized(base, expanded, seen)
    return base


def _expected(
    origins: Sequence[AdapterOrigin], expanded: Quantization | None, stored: Mapping[str, TensorInfo], sample: Sample
) -> Expected:
    """Compute the logits that a merge into this base must reproduce. ``stored`` are the merged model's tensors."""
    alone = _base(origins, None, expanded)
    resize_embeddings(alone, origins[0].folder)  # so that all logits have the same size
    base = logits_of(alone, sample.ids)  # before PEFT writes an adapter's biases or PiSSA's residual into the base
    model = _adapted(alone, origins)
    unmerged = logits_of(model, sample.ids)
    _untie(model)
    merged = model.merge_and_unload()
    summed = logits_of(merged, sample.ids)
    _round(merged, stored)
    return Expected(unmerged, base, summed, logits_of(merged, sample.ids))


def _untie(model: Any) -> None:
    """Give a tied head its own weights if an adapter is on it or on the embedding: PEFT's merge would change both."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        embedding, head = (getattr(end, "base_layer", end) for end in ends)
        if head.weight is embedding.weight:
            head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)


def _round(model: Any, stored: Mapping[str, TensorInfo]) -> None:
    """Round a model's parameters, kept in float32, in place to their ``stored`` dtypes."""
    most = stored_dtype(stored)
    for name, parameter in model.named_parameters():
        found = stored_name(name, stored)
        dtype = stored[found].torch_dtype if found else most  # None: experts, joined by Transformers
        parameter.data = parameter.data.to(dtype).float()
