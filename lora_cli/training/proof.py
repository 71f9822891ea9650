"""Proof that a run did what it says: the adapter on disk is the one in memory, whole, moved, and seen in the logits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from lora_cli.errors import RunError
from lora_cli.evaluation.loss import evaluating
from lora_cli.model.adapters import trainable_parameters
from lora_cli.training.processes import fill
from lora_cli.training.zero import ZeroOptimizer, is_partitioned
from lora_cli.weights.adapter_config import ADAPTER_WEIGHTS, PEFT_PREFIX

if TYPE_CHECKING:
    from peft import PeftModel

Tensors = Mapping[str, torch.Tensor]
RELOADED = "reloaded"
NAMED_AT_MOST = 3
MAGNIFIED = (1, 1024)  # a few steps may move an adapter by less than 16-bit logits show
UNUSED = "remove layers that the model does not use from adapter.target_modules"
KEPT = "the checkpoints are kept, no adapter was written"


def digests(weights: Tensors) -> dict[str, str]:
    """SHA-256 of every trained tensor, by name: how training found them, in little memory."""
    return {name: _digest(weight) for name, weight in weights.items()}


def prove(
    folder: Path, where: str, model: PeftModel, weights: Tensors, start: Mapping[str, str], ids: torch.Tensor
) -> None:
    """Hold the adapter written to ``folder`` against the ``model`` it was written from.

    ``weights`` are the model's trained tensors, whole, by parameter name; ``start`` is what ``digests`` gave of them
    before training; ``ids`` (tokens,) int64 is a row of the training data. Leaves the model's modes, its adapters and
    the random states as they were.

    Raises RunError about ``where`` when a trained tensor is missing in the file or differs from memory, when a layer's
    update is nothing, or when the adapter, loaded again, does not change the logits as the one in memory does.
    """
    stored = load_file(folder / ADAPTER_WEIGHTS)
    faults = list(_differences(weights, stored))
    if faults:
        what = f"the adapter's file differs from what was trained: {_some(faults)}"
        raise RunError(what, where, f"{KEPT}: --resume writes it again")
    still, layers = unmoved(stored, {stored_name(name): digest for name, digest in start.items()})
    if still:
        names = _some([layer.removeprefix(PEFT_PREFIX) for layer in still])
        what = f"{len(still)} of {layers} adapted layers were not changed by training: {names}"
        early = (
            "nothing was learned up to the step whose weights these are: lower training.learning_rate if later "
            "evaluations were worse, else raise it, or train for more steps"
        )
        hint = f"{KEPT}; {UNUSED if len(still) < layers else early}"
        raise RunError(what, where, hint)
    _check_logits(folder, where, model, stored, ids)


def stored_name(parameter: str) -> str:
    """PEFT's name in the file for a parameter of the adapter 'default'."""
    name = parameter.replace(".default.", ".").removesuffix(".default")
    return name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def unmoved(stored: Tensors, start: Mapping[str, str]) -> tuple[list[str], int]:
    """The layers whose update is nothing or what training began with, and how many layers there are.

    Weight decay alone moves A: with B at zero the layer is the base's all the same, unless DoRA's magnitude moved.
    """
    layers: dict[str, list[str]] = {}
    for name in start:
        layers.setdefault(name.partition(".lora_")[0], []).append(name)
    moved = {name for name, digest in start.items() if _digest(stored[name]) != digest}

    def is_new(names: list[str]) -> bool:
        product = [name for name in names if not name.endswith(".lora_magnitude_vector")]
        return not moved.isdisjoint(set(names) - set(product)) or (
            not moved.isdisjoint(product) and all(bool(stored[name].any()) for name in product)
        )

    return [layer for layer, names in layers.items() if not is_new(names)], len(layers)


def unreached(trained: Sequence[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer) -> str | None:
    """What to say, after the first step, of adapted layers to which no gradient came while one came to others."""
    if isinstance(optimizer, ZeroOptimizer):  # DeepSpeed fills in zeros
        return None
    layers: dict[str, bool] = {}
    for name, weight in trained:
        layer = name.removeprefix(PEFT_PREFIX).partition(".lora_")[0]
        layers[layer] = layers.get(layer, False) or weight in optimizer.state
    still = [layer for layer, is_reached in layers.items() if not is_reached]
    if not still or len(still) == len(layers):
        return None
    what = f"{len(still)} of {len(layers)} adapted layers got no gradient in the first step: {_some(still)}"
    return f"{what}; if no other step reaches them, the run ends without an adapter; {UNUSED}"


def _differences(weights: Tensors, stored: Tensors) -> Iterator[str]:
    for name, wanted in weights.items():
        key = stored_name(name)
        found = stored.get(key)
        if found is None:
            yield f"{key} is missing"
        elif found.shape != wanted.shape:
            yield f"{key} has shape {list(found.shape)}, not {list(wanted.shape)}"
        elif found.dtype != wanted.dtype or _digest(found) != _digest(wanted):
            yield f"{key} has other numbers"


def _check_logits(folder: Path, where: str, model: PeftModel, stored: Tensors, ids: torch.Tensor) -> None:
    adapter = model.active_adapter
    assert isinstance(adapter, str)
    for times in MAGNIFIED:
        with rescale_adapter_scale(model, times):
            trained = _logits(model, adapter, ids)
        with model.disable_adapter():
            base = _logits(model, adapter, ids)
        effect = float((trained - base).norm())
        if effect > 0:
            break
    if effect == 0:
        what = f"the adapter changes no logit of a training row, even scaled up {times:,} times"
        raise RunError(what, where, f"{KEPT}; raise training.learning_rate, or train for more steps")
    sharded = any(isinstance(weight, DTensor) or is_partitioned(weight) for weight in model.parameters())
    again = _refilled(model, adapter, stored) if sharded else _reloaded(model, adapter, folder)
    with again as name, rescale_adapter_scale(model, times):
        error = float((_logits(model, name, ids) - trained).norm())
    if not error <= 0.01 * effect:  # also when one is no number
        what = f"reloaded from disk, the adapter's logits differ by {error:.3g} from those at the end of training"
        raise RunError(f"{what} ({effect:.3g} from the base's)", where, f"{KEPT}; please report it")


@contextmanager
def _reloaded(model: PeftModel, trained: str, folder: Path) -> Iterator[str]:
    """The adapter in ``folder`` beside the ``trained`` one, on the same base: its name."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # a new adapter is filled at random before the file's tensors come
            model.load_adapter(str(folder), RELOADED, torch_device=str(model.device))
        yield RELOADED
    finally:
        model.set_adapter(trained)
        if RELOADED in model.peft_config:
            model.delete_adapter(RELOADED)
        model.train(training)


@contextmanager
def _refilled(model: PeftModel, trained: str, stored: Tensors) -> Iterator[str]:
    """The ``trained`` adapter, whose sharded weights are taken from the file: PEFT loads no second one beside it."""
    with torch.no_grad():
        for name, weight in trainable_parameters(model):
            fill(weight, stored[stored_name(name)])
    yield trained


def _logits(model: PeftModel, adapter: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_adapter(adapter)
    with evaluating(model):
        logits: torch.Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits
    return logits.float()


def _digest(tensor: torch.Tensor) -> str:
    numbers: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers).hexdigest()


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - NAMED_AT_MOST} more" if len(items) > NAMED_AT_MOST else ""
    return ", ".join(items[:NAMED_AT_MOST]) + more
