"""Check that a model folder's tensors are those that its configuration implies, from headers and shapes alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import Fault, UserError, grouped_error
from lora_cli.model.files import read_config, stored_quantization
from lora_cli.model.targets import COEFFICIENTS, EMBEDDINGS, UNQUANTIZABLE_LAYERS, Target, bypasses_adapter, module_leaf
from lora_cli.weights.files.shards import DEPTHS, model_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENDS = {"model.embed_tokens.weight", "model.norm.weight"}
"""The tensors that most models store outside their layers, apart from a head that is not tied."""


def check_weights(folder: Path, bare: PreTrainedModel) -> None:
    """Raises UserError when the folder's files are damaged or a tensor's shape is not the one the configuration gives.

    Quantized weights and tensors that Transformers renames while loading are not compared. Missing tensors are reported
    by loading.
    """
    tensors = model_headers(folder)
    if stored_quantization(folder):
        return
    expected = {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()}
    faults = []
    for name, info in tensors.items():
        wanted = expected.get(name) or expected.get(f"{bare.base_model_prefix}.{name}")
        if wanted is not None and wanted != info.shape:
            what = f"tensor {name} has shape {list(info.shape)}, the configuration says {list(wanted)}"
            faults.append(Fault(what, str(info.file)))
    if faults:
        raise grouped_error(faults, "config.json and the weights are from different models")


def check_mergeable(base: Path) -> None:
    """Raises UserError when the base is stored quantized: an update cannot be added to codes."""
    stored = stored_quantization(base)
    if stored is not None:
        hint = (
            "use this adapter unmerged, or train one on the unquantized model, with quantization.method set: that one "
            "can be merged"
        )
        raise UserError(f"the base is stored quantized ({stored}), so nothing can be merged into it", str(base), hint)


def check_directly_read_weights(base: Path, training: bool) -> None:
    """Raises UserError when weights that the model reads directly, Gemma 3n only in ``training``, are stored in 4 or 8
    bits: as codes."""
    read = UNQUANTIZABLE_LAYERS.get(read_config(base).get("model_type", ""))
    if read is None or (read is COEFFICIENTS and not training):
        return
    for name, info in model_headers(base).items():
        if module_leaf(name) in read and info.dtype in ("I8", "U8"):
            what = f"the model reads {module_leaf(name)}'s weights directly, and they are stored quantized"
            raise UserError(what, str(base), "start from the unquantized model")


def stored_layers(folder: Path) -> dict[str, Target] | None:
    """Return a checkpoint's linear layers to which an adapter can be applied, by their stored names.

    None where stored names or shapes are not the model's: for quantized weights, and for experts that Transformers
    joins while loading. The two widths of a Conv1D (GPT-2) are swapped: headers do not show the kind of a layer.
    """
    config = read_config(folder)
    if stored_quantization(folder) or any("experts" in key for key in config):
        return None
    layers = {}
    for name, info in model_headers(folder).items():
        layer, _, kind = name.rpartition(".")
        # Cohere's norms are (heads, head_dim); BERT names embeddings token_type_embeddings.
        is_other = layer.rpartition(".")[2] in EMBEDDINGS or layer.endswith(("norm", "_embeddings"))
        is_linear = kind == "weight" and len(info.shape) == 2 and not is_other
        if is_linear and not bypasses_adapter(layer, config.get("model_type", "")):
            layers[layer] = Target(layer, info.shape[1], info.shape[0])
    return layers


def has_identical_layers(base: Path) -> bool:
    """Whether all of a model's layers hold the same tensors, and the only others are the embedding, the final norm and
    the head (which may be missing if it is tied)."""
    config = read_config(base)
    depth = next((config[key] for key in DEPTHS if isinstance(config.get(key), int)), 0)
    layers: dict[tuple[str, str], set[int]] = {}
    outside = set()
    for name in model_headers(base):
        found = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
        if found:
            layers.setdefault((found[1], found[3]), set()).add(int(found[2]))
        else:
            outside.add(name)
    is_tied = config.get("tie_word_embeddings") is True
    has_ends = outside == {*ENDS, "lm_head.weight"} or (is_tied and outside == ENDS)
    return has_ends and all(found == set(range(depth)) for found in layers.values())
