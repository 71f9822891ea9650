"""A model's stored tensors, and which of them make up each of its own, by the rules of Transformers' loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lora_cli.weights.files.shards import TensorInfo, model_headers, read_tensor


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
    headers = model_headers(folder)
    return StoredModel(folder, headers, lambda name: read_tensor(headers[name]))


def model_names(bare: PreTrainedModel, headers: dict[str, TensorInfo]) -> dict[str, str] | None:
    """Return the model's name for each stored tensor that it uses, except for copies of tied tensors.

    Stored names may lack or add the base model's prefix, and the head may be renamed. None when a parameter is not
    exactly one stored tensor, when copies of tied tensors differ, or when buffers are stored, whose dtypes the model
    sets itself.
    """
    first = {id(parameter): name for name, parameter in bare.named_parameters()}
    known = {name: first[id(parameter)] for name, parameter in bare.named_parameters(remove_duplicate=False)}
    buffers = bare.state_dict().keys() - known.keys()
    prefix, renamed = f"{bare.base_model_prefix}.", _renamed_head(bare, headers)
    names: dict[str, str] = {}
    tied: dict[str, str] = {}
    for stored in headers:
        own = renamed.get(stored, stored)
        found = [name for name in (own, prefix + own, own.removeprefix(prefix)) if name in known or name in buffers]
        if found and found[0] in buffers:
            return None
        if found:
            (names if known[found[0]] == found[0] else tied)[stored] = known[found[0]]
    places = {name: stored for stored, name in names.items()}
    if set(places) != set(first.values()) or len(names) != len(places):
        return None
    repeated = all(
        torch.equal(read_tensor(headers[stored]), read_tensor(headers[places[name]])) for stored, name in tied.items()
    )
    return names if repeated else None


def _renamed_head(bare: PreTrainedModel, headers: dict[str, TensorInfo]) -> dict[str, str]:
    """Return the model's name, by stored name, for a head that Transformers renames while loading."""
    found = get_model_conversion_mapping(bare, add_legacy=False)
    renamings = [each for each in found if isinstance(each, WeightRenaming)]
    if len(renamings) < len(found):
        return {}
    head = bare.get_output_embeddings()
    own = {f"{name}.weight" for name, module in bare.named_modules() if module is head}
    renamed = {stored: rename_source_key(stored, renamings, [])[0] for stored in headers}
    return {stored: name for stored, name in renamed.items() if name != stored and name in own}


def converters_of(bare: PreTrainedModel) -> list[WeightConverter]:
    """Return the converters with which Transformers makes a model's tensors from different stored ones."""
    return [each for each in get_model_conversion_mapping(bare) if isinstance(each, WeightConverter)]


def sources_of(bare: PreTrainedModel, headers: Mapping[str, TensorInfo]) -> dict[str, dict[str, str | None]]:
    """Return the stored tensors that make up each of the model's, with the converter pattern each matches or None."""
    renamings = [each for each in get_model_conversion_mapping(bare) if isinstance(each, WeightRenaming)]
    converters, known, prefix = converters_of(bare), bare.state_dict(), bare.base_model_prefix
    sources: dict[str, dict[str, str | None]] = {}
    for stored in sorted(headers, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:  # already the model's name, which a renaming matched by mistake
            name, pattern = stored, None
        sources.setdefault(name, {})[stored] = pattern
    return sources


def unstorable(bare: PreTrainedModel, headers: Mapping[str, TensorInfo], layers: Iterable[str]) -> list[str]:
    """Return those layers whose weights Transformers converts while loading. Saving would convert their codes and their
    scales back as if they were weights, and the result could not be loaded."""
    used = {pattern for found in sources_of(bare, headers).values() for pattern in found.values()}
    back = [each.reverse_transform() for each in converters_of(bare) if used & {*each.source_patterns}]
    return [layer for layer in layers if any(each.rename_source_key(f"{layer}.weight")[1] for each in back)]
