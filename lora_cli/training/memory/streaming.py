"""Stream the frozen base's layers: each has its weights only while it runs, loaded from disk or else host memory.

A module's weights are loaded before its forward pass and released after it. The backward pass uses the weights that
gradient checkpointing loads again and frees layer by layer; without checkpointing, autograd would hold them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Module, ModuleList, Parameter
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli.errors import UserError
from lora_cli.model.files import has_unsupported_quantization
from lora_cli.model.layers import checkpointed_layers
from lora_cli.model.linear4bit import dequantize_in_forward
from lora_cli.recipe.schema import Recipe
from lora_cli.system.memory import format_bytes, free_bytes
from lora_cli.training.memory.estimate import estimate
from lora_cli.training.prepare import Prepared
from lora_cli.training.run.same_run import with_resolved_batch
from lora_cli.weights.files.shards import TensorInfo, mapped, model_headers, weight_files

Sources = dict[Parameter, Callable[[], Parameter]]
"""For each streamed weight, how to load it onto the device."""
Files = Mapping[Path, BinaryIO]
"""The open files of the base, by path."""
Place = tuple[Module, str, Parameter]
"""A module, and the name under which it holds a streamed weight."""
UNSUPPORTED_TYPES = ("gemma3n", "gemma3n_text")
"""Model types whose layers call methods of inner modules, for which no hook runs."""
COMPARED = 1024
"""Number of a weight's elements, evenly spaced, that are compared with the file's."""


def needs_streaming(job: Prepared, processes: int, sharded: bool, device: torch.device) -> tuple[bool, str]:
    """Return whether to stream the base, and why. For auto: if its weights would take over 4/5 of the free memory.

    Raises UserError when streaming is asked for and not possible.
    """
    recipe = job.recipe
    wanted = recipe.training.stream_base
    if wanted is False or (wanted == "auto" and sharded):
        return False, ""
    why_not = why_not_streamable(job, recipe, processes)
    if wanted is True:
        if why_not:
            raise UserError(f"training.stream_base: {why_not}", str(job.base), "leave it at auto, or set it to false")
        return True, ""
    needed, free = estimate(job, with_resolved_batch(recipe)).weights, free_bytes(device)
    if needed <= 0.8 * free:
        return False, ""
    need = f"the base needs about {format_bytes(needed)}, and {device.type} has {format_bytes(free)} free"
    if why_not:
        return False, f"{need}; {why_not}"
    return True, need


def why_not_streamable(job: Prepared, recipe: Recipe, processes: int) -> str:
    """Return why this recipe's base cannot be streamed (``training.stream_base``); empty when it can."""
    if processes > 1 or recipe.training.fsdp or recipe.training.deepspeed is not None:
        return "it needs a single process; training.fsdp shards the base over several"
    in_8_bits = recipe.quantization is not None and recipe.quantization.method == "int8"
    if in_8_bits or has_unsupported_quantization(job.base):
        return "of quantized bases, only those in bitsandbytes' 4 bits can be streamed"
    if recipe.adapter.use_dora:
        return "adapter.use_dora reads every weight's norm"
    if recipe.training.gradient_checkpointing is False:
        return "it needs gradient_checkpointing, which is false"
    if job.config.model_type in UNSUPPORTED_TYPES:
        return f"the layers of {job.config.model_type} cannot be streamed"
    if not checkpointed_layers(job.bare):
        return f"{job.config.model_type} has no layers that can be checkpointed"
    return ""


def detach_weights(base: PreTrainedModel, folder: Path, device: torch.device, dtype: torch.dtype) -> Sources:
    """Free the weights of the base's layers and move the rest to ``device`` as ``dtype``. Returns the sources of the
    freed weights.

    ``base`` is in host memory, in the dtype that ``folder`` stores. A weight that Transformers changed while loading is
    streamed from host memory; such a weight in 4 bits stays on the device.
    """
    headers = model_headers(folder)
    files = {file: file.open("rb") for file in weight_files(folder)}  # kept open, as other files may take their names
    sources: Sources = {}
    for outer, layer in checkpointed_layers(base).items():
        dequantize_in_forward(layer)
        for inner, weight in layer.named_parameters():
            if weight in sources or "." not in inner:  # the layer's own hooks do not run when it is recomputed
                continue
            found = _stored(f"{outer}.{inner}", weight, headers, base.base_model_prefix)
            if getattr(weight, "quant_state", None) is None:
                sources[weight] = (
                    _from_disk(found[0], files, device, dtype) if found else _from_host(weight.data, device, dtype)
                )
                weight.data = _placeholder(weight, device, dtype)
            elif found:
                sources[weight] = _codes_from_disk(found[1], headers, files, device)
                cast("Any", weight).quant_state = None
                weight.data = _placeholder(weight, device, weight.dtype)
    _move_others(base, sources, headers, device, dtype)
    base.config.dtype = dtype
    return sources


def _move_others(
    base: PreTrainedModel, sources: Sources, headers: dict[str, TensorInfo], device: torch.device, dtype: torch.dtype
) -> None:
    """Move the weights that are not streamed, and the buffers, to ``device``; weights not in 4 bits as ``dtype``."""
    for name, weight in base.named_parameters():
        if weight in sources:
            continue
        state = getattr(weight, "quant_state", None)
        if state is None:  # from the file, since all of ``base`` was loaded in one dtype
            found = _stored(name, weight, headers, base.base_model_prefix)
            weight.data = (mapped(found[0]) if found else weight.data).to(device, dtype)
        else:
            weight.data = weight.data.to(device)
            state.to(device)
    for buffer in base.buffers():
        buffer.data = buffer.data.to(device)


def add_streaming_hooks(model: Module, sources: Sources) -> list[RemovableHandle]:
    """Load each module's weights before its forward pass and release them after it, until the hooks are removed."""
    return [hook for module, weights in _holders(model, sources) for hook in _hook(module, weights, sources)]


def _holders(module: Module, sources: Sources) -> Iterator[tuple[Module, list[Place]]]:
    """Yield the modules that compute with streamed weights: their own and those of their child layers, which some
    modules read directly, as Mamba and Qwen3-Next do with their convolution's."""
    # Hooks of a list never run, and those of a checkpointed layer do not run when it is recomputed.
    is_hooked = not isinstance(module, GradientCheckpointingLayer | ModuleList)
    parts = [child for child in module.children() if _is_layer(module) or (is_hooked and _is_layer(child))]
    places = [
        (owner, name, weight)
        for owner in (module, *(each for part in parts for each in part.modules()))
        for name, weight in owner.named_parameters(recurse=False)
        if weight in sources
    ]
    if places:
        yield module, places
    for child in module.children():
        if child not in parts:
            yield from _holders(child, sources)


def _is_layer(module: Module) -> bool:
    """Whether the module has no children, except an adapter's."""
    return isinstance(module, BaseTunerLayer) or not any(module.children())


def _hook(module: Module, places: list[Place], sources: Sources) -> tuple[RemovableHandle, RemovableHandle]:
    def bring(*_: Any) -> None:
        for owner, name, weight in places:  # a new parameter each time: autograd keeps the former one
            setattr(owner, name, sources[weight]())

    def take(*_: Any) -> None:
        for owner, name, weight in places:
            setattr(owner, name, weight)

    # always_call, since recomputation ends with an exception as soon as it has what it needs.
    return module.register_forward_pre_hook(bring), module.register_forward_hook(take, always_call=True)


def _stored(name: str, weight: Parameter, headers: dict[str, TensorInfo], prefix: str) -> tuple[TensorInfo, str] | None:
    """Return the stored tensor equal to the weight, and its name; None if Transformers changed it while loading."""
    for stored in (name, name.removeprefix(f"{prefix}.")):
        info = headers.get(stored)
        if info is not None and info.shape == tuple(weight.shape):
            tensor, held = mapped(info).view(-1), weight.data.view(-1)
            some = slice(None, None, len(held) // COMPARED | 1)  # an odd step reaches all columns
            return (info, stored) if torch.equal(tensor[some].to(held.dtype), held[some]) else None
    return None


def _from_disk(info: TensorInfo, files: Files, device: torch.device, dtype: torch.dtype) -> Callable[[], Parameter]:
    return lambda: Parameter(mapped(info, files[info.file]).to(device, dtype), requires_grad=False)


def _codes_from_disk(
    name: str, headers: dict[str, TensorInfo], files: Files, device: torch.device
) -> Callable[[], Parameter]:
    from bitsandbytes.nn import Params4bit

    infos = {each: info for each, info in headers.items() if each == name or each.startswith(f"{name}.")}

    def read() -> Parameter:
        stats = {each: mapped(info, files[info.file]) for each, info in infos.items()}
        return cast("Parameter", Params4bit.from_prequantized(stats.pop(name), stats, device=device))

    return read


def _from_host(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Callable[[], Parameter]:
    kept = tensor.to(dtype)
    kept = kept.pin_memory() if device.type == "cuda" else kept
    return lambda: Parameter(kept.to(device, non_blocking=True), requires_grad=False)


def _placeholder(weight: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a placeholder with one element's memory: NaN, so that its use is noticed; codes are 0, without scales."""
    nothing = float("nan") if dtype.is_floating_point else 0
    return torch.full((), nothing, device=device, dtype=dtype).expand(weight.shape)
