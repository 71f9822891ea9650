"""What ``lora merge`` has written, beside base and adapters apart: the same logits on a few real rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import CheckError, UserError, counted
from lora_cli.recipe.schema import Model, Quantization

if TYPE_CHECKING:
    import torch

    from lora_cli.evaluation.agreement import Agreement
    from lora_cli.weights.provenance import AdapterOrigin
    from lora_cli.weights.shards import TensorInfo

ROWS = 4
TOKENS = 64
SENTENCES = (
    "The river had risen in the night, and by morning the lower road could not be seen at all.",
    "A patient who takes this medicine should tell the doctor about any other medicine before the first dose.",
    "To get the total, multiply the price of one ticket by the number of people and add the fee.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
"""What a model is tried on that comes without rows of its own."""
NOISE = 1e-5
"""Of the logits' relative difference: what float32 brings, added up in another order."""
SHARE = 0.05
"""Of what the adapter changes in the logits, or of what rounding does, where that is more: a tie may go either way."""


@dataclass(frozen=True)
class Verified:
    """``apart`` is the perplexity with the adapters apart, as training saw the base; ``candidates`` are the bases that
    they could be merged into, each beside that.

    ``moved`` is the relative difference of the logits that the adapters make, ``rounding`` the one that rounding the
    sums to the type they are stored in makes; None where these are quantized again."""

    rows: int
    tokens: int
    of: str
    apart: float
    merged: Agreement
    candidates: dict[str, Agreement]
    moved: float | None
    rounding: float | None


@dataclass(frozen=True)
class Sample:
    """Token ids of a few rows, and where they are from."""

    ids: Sequence[torch.Tensor]
    of: str


@dataclass(frozen=True)
class Expected:
    """The logits of a base with adapters apart, of the base alone, of the two summed by PEFT in float32, and of these
    sums rounded to the types that they are stored in."""

    unmerged: list[torch.Tensor]
    base: list[torch.Tensor]
    summed: list[torch.Tensor]
    rounded: list[torch.Tensor]


def fits(base: Path) -> bool:
    """Whether the base can be loaded in float32 beside what else there is."""
    from lora_cli.model.base import best_device
    from lora_cli.model.memory import free_bytes
    from lora_cli.weights.shards import read_headers, weight_files

    numbers = sum(math.prod(info.shape) for info in read_headers(weight_files(base)).values())
    return numbers * 4 * 1.25 < free_bytes(best_device())


def verify(origins: Sequence[AdapterOrigin], draft: Path, out: Path, into: str | None, sample: Sample) -> Verified:
    """Run the merged model in ``draft``, which is to stand at ``out``, and what it was made of. Raises CheckError when
    they differ by more than rounding."""
    from lora_cli.evaluation.agreement import agreement, logits_of, perplexity
    from lora_cli.weights.shards import read_headers, weight_files

    recipe = origins[0].recipe
    quantization = recipe.quantization if recipe else None
    stored = read_headers(weight_files(draft))
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
    """By how much the adapters move the logits, and rounding, relatively. Raises CheckError when the merged model's
    differ by more than rounding from those of base and adapters apart."""
    from lora_cli.evaluation.agreement import agreement
    from lora_cli.weights.shards import stored_dtype

    def differ(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
        return agreement(wanted, found, sample.ids).relative

    moved, rounding = differ(expected.unmerged, expected.base), differ(expected.unmerged, expected.rounded)
    allowed = NOISE + SHARE * max(moved, rounding)
    if differ(expected.unmerged, expected.summed) <= allowed and differ(expected.rounded, merged) <= allowed:
        return moved, rounding
    dtype = str(stored_dtype(stored)).removeprefix("torch.")
    raise CheckError(
        f"the merged model's logits differ by {differ(expected.unmerged, merged):.2%} from those of base and adapter, "
        f"more than rounding to {dtype} explains ({rounding:.2%}; the adapter changes them by {moved:.2%})",
        str(out),
        "nothing was written; --no-verify would write the model, but do not use it",
    )


def text(found: Verified) -> Iterator[str]:
    """What a person is told."""
    merged = found.merged
    yield (
        f"checked on {counted(found.rows, 'row')} ({found.tokens} tokens) of {found.of}: logits differ by at most "
        f"{merged.largest:.2g} (relative difference {merged.relative:.2g}), perplexity {found.apart:.3f} unmerged, "
        f"{merged.perplexity:.3f} merged"
    )
    if found.moved is not None:
        yield f"the adapter changes the logits by {found.moved:.2g} (relative), rounding by {found.rounding:.2g}"
    if found.candidates:
        yield f"{'merged into':14}{'perplexity':>12}{'KL to training':>18}"
        for name, candidate in found.candidates.items():
            yield f"{name:14}{candidate.perplexity:>12.3f}{candidate.kl:>18.2g}"


def sample_for(origin: AdapterOrigin, data: str | None) -> Sample:
    """The first rows of ``data``, or of those the adapter was trained with, or a few sentences. Raises UserError for
    what is wrong with ``data``."""
    import torch

    from lora_cli.cli import measure
    from lora_cli.data.sources import whole_rows
    from lora_cli.data.tokenize import tokenize_rows
    from lora_cli.model.base import load_tokenizer
    from lora_cli.model.files import tokenizer_folder

    tokenizer = load_tokenizer(tokenizer_folder(origin.base, origin.folder))
    section = origin.recipe.data if data is None and origin.recipe else None
    if data is not None:
        section = measure.data_section(data, origin.recipe)
    ids, of = [tokenizer(sentence).input_ids for sentence in SENTENCES], "plain text"
    if section is not None:
        try:
            rows = islice(whole_rows(measure.sources(section)), ROWS)
            examples = tokenize_rows(section, rows, tokenizer).examples
            if examples.lengths.max() < 2:
                raise UserError("no token to predict in the first rows", measure.describe(section), "give others")
            ids, of = [examples.row(row)[0] for row in range(len(examples))], measure.describe(section)
        except UserError:  # the training's data need not be where its adapter is
            if data is not None:
                raise
    return Sample([torch.as_tensor(row[:TOKENS], dtype=torch.long) for row in ids if len(row) > 1], of)


def _load(folder: Path, quantization: Quantization | None, quantized_from: torch.dtype | None = None) -> Any:
    """The model with all that is not quantized in float32."""
    import gc

    import torch

    from lora_cli.model.base import best_device, load_base

    gc.collect()  # the model before this one
    dtype = quantized_from or torch.float32
    model = load_base(folder, Model(name_or_path=str(folder)), quantization, best_device(), dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def _adapted(base: Any, origins: Sequence[AdapterOrigin]) -> Any:
    from lora_cli.model.adapters import load_adapters

    return load_adapters(base, [origin.folder for origin in origins])


def _base(origins: Sequence[AdapterOrigin], quantization: Quantization | None, expanded: Quantization | None) -> Any:
    """The base, quantized, or what its weights quantized so stand for, or as it is."""
    from lora_cli.weights.merge import seen_dtype
    from lora_cli.weights.quantized_layers import expand_quantized
    from lora_cli.weights.shards import read_headers, weight_files

    seen = seen_dtype(origins[0], read_headers(weight_files(origins[0].base)))
    base = _load(origins[0].base, quantization, seen if quantization else None)
    if expanded is not None:
        expand_quantized(base, expanded, seen)
    return base


def _expected(
    origins: Sequence[AdapterOrigin], expanded: Quantization | None, stored: Mapping[str, TensorInfo], sample: Sample
) -> Expected:
    """What a merge into this base has to say; ``stored`` are the tensors that the two were merged into."""
    from lora_cli.evaluation.agreement import logits_of
    from lora_cli.model.adapters import resize_words

    alone = _base(origins, None, expanded)
    resize_words(alone, origins[0].folder)  # for logits of one size
    base = logits_of(alone, sample.ids)  # before PEFT puts an adapter's biases or PiSSA's remainder into it
    model = _adapted(alone, origins)
    unmerged = logits_of(model, sample.ids)
    _untie(model)
    merged = model.merge_and_unload()
    summed = logits_of(merged, sample.ids)
    _round(merged, stored)
    return Expected(unmerged, base, summed, logits_of(merged, sample.ids))


def _untie(model: Any) -> None:
    """Give the head weights of its own where the adapter adds to it or to the embedding: PEFT would add to both."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        embedding, head = (getattr(end, "base_layer", end) for end in ends)
        if head.weight is embedding.weight:
            head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)


def _round(model: Any, stored: Mapping[str, TensorInfo]) -> None:
    """Round a model's parameters in float32, in place, to the types they are ``stored`` in."""
    from lora_cli.weights.shards import stored_dtype
    from lora_cli.weights.updates import stored_name

    most = stored_dtype(stored)
    for name, parameter in model.named_parameters():
        found = stored_name(name, stored)
        dtype = stored[found].torch_dtype if found else most  # None: experts, which loading joins
        parameter.data = parameter.data.to(dtype).float()
