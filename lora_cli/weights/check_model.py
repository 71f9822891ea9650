"""Are a model folder's tensors those that its configuration speaks of? Answered from headers and shapes alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import Fault, UserError, alike
from lora_cli.model.files import read_config, stored_quantization
from lora_cli.model.targets import Target, is_read_past
from lora_cli.weights.shards import DEPTHS, read_headers, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = ("wte", "wpe", "embed_tokens", "embed_positions", "embed_in", "word_embeddings", "lm_head", "embed_out")
ENDS = {"model.embed_tokens.weight", "model.norm.weight"}
"""What most models store beside their layers, and a head where it is not tied."""


def owner(tensor: str) -> str:
    """The last part of the name of the module that has the tensor of this name; empty when the name tells of none."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


def check_weights(folder: Path, bare: PreTrainedModel) -> None:
    """Raises UserError when the folder's files are damaged, or tensors are not of the shape the configuration says.

    Names that Transformers converts while loading are not judged here; loading reports what is missing.
    """
    tensors = read_headers(weight_files(folder))
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
        raise alike(faults, "config.json and the weights are from different models")


def check_mergeable(base: Path) -> None:
    """Raises UserError when the base is stored quantized: a sum with its codes is no weight."""
    stored = stored_quantization(base)
    if stored is not None:
        hint = (
            "use this adapter unmerged, or train one on the unquantized model, with quantization.method set: that one "
            "can be merged"
        )
        raise UserError(f"the base is stored quantized ({stored}), so nothing can be merged into it", str(base), hint)


def stored_layers(folder: Path) -> dict[str, Target] | None:
    """The linear layers that a checkpoint's tensors speak of and an adapter can reach, by the names they are stored
    under.

    None where the tensors' names or shapes are not the model's: quantized weights, and experts that Transformers joins
    while loading. Which of its two widths is which is not known of a layer of GPT-2's kind.
    """
    config = read_config(folder)
    if stored_quantization(folder) or any("experts" in key for key in config):
        return None
    layers = {}
    for name, info in read_headers(weight_files(folder)).items():
        layer, _, kind = name.rpartition(".")
        is_other = layer.rpartition(".")[2] in EMBEDDINGS or layer.endswith("norm")  # Cohere's are (heads, width)
        is_linear = kind == "weight" and len(info.shape) == 2 and not is_other
        if is_linear and not is_read_past(layer, config.get("model_type", "")):
            layers[layer] = Target(layer, info.shape[1], info.shape[0])
    return layers


def is_uniform(base: Path) -> bool:
    """Whether each of a model's layers has every tensor that another has, and what most models store beside them is
    all there is."""
    config = read_config(base)
    depth = next((config[key] for key in DEPTHS if isinstance(config.get(key), int)), 0)
    layers: dict[tuple[str, str], set[int]] = {}
    outside = set()
    for name in read_headers(weight_files(base)):
        found = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
        if found:
            layers.setdefault((found[1], found[3]), set()).add(int(found[2]))
        else:
            outside.add(name)
    is_tied = config.get("tie_word_embeddings") is True
    has_ends = outside == {*ENDS, "lm_head.weight"} or (is_tied and outside == ENDS)
    return has_ends and all(found == set(range(depth)) for found in layers.values())
