"""Proof of a run's result: the adapter on disk is the one in memory, complete, trained, and changes the logits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from lora_cli.errors import RunError, first_few
from lora_cli.evaluation.agreement import logits_of
from lora_cli.model.adapters import trainable_parameters
from lora_cli.training.distributed.processes import fill_parameter
from lora_cli.training.distributed.zero import ZeroOptimizer, is_partitioned
from lora_cli.weights.adapter.adapter_config import ADAPTER_WEIGHTS, layer_and_part

Tensors = Mapping[str, torch.Tensor]
RELOADED = "reloaded"
NAMED = 3
SCALES = (1, 1024)  # a few steps may change an adapter by less than 16-bit logits show
UNUSED = "remove layers that the model does not use from adapter.target_modules"
NOTHING_LEARNED = (
    "nothing was learned up to the step whose weights these are: lower training.learning_rate if later evaluations "
    "were worse, else raise it, or train for more steps"
)
KEPT = "the checkpoints are kept, no adapter was written"


def digests(weights: Tensors) -> dict[str, str]:
    """Return the SHA-256 of every trained tensor, by name: its state before training, in little memory."""
    return {name: _digest(weight) for name, weight in weights.items()}


def prove(
    folder: Path,
    where: str,
    model: PeftModel,
    weights: Tensors,
    start: Mapping[str, str],
    rows: Iterable[torch.Tensor],
) -> None:
    """Compare the adapter written to ``folder`` with the ``model`` that it was written from.

    ``weights`` are the model's complete trained tensors by parameter name; ``start`` are their digests before training;
    ``rows`` are the token ids (tokens,) int64 of training rows, of which the first that does not overflow is used. The
    model's modes, its adapters and the random states are unchanged afterwards.

    Raises RunError about ``where`` when a trained tensor is missing in the file or differs from memory, when a layer
    was not changed by training, when the adapter changes no logit, or when its logits differ once it is loaded again.
    """
    stored = load_file(folder / ADAPTER_WEIGHTS)
    faults = list(_differences(weights, stored))
    if faults:
        what = f"the adapter's file differs from what was trained: {first_few(faults, NAMED)}"
        raise RunError(what, where, f"{KEPT}: --resume writes it again")
    still, layers = _unchanged_layers(stored, {_stored_name(name): digest for name, digest in start.items()})
    if still:
        what = f"{len(still)} of {layers} adapted layers were not changed by training: {first_few(still, NAMED)}"
        raise RunError(what, where, f"{KEPT}; {UNUSED if len(still) < layers else NOTHING_LEARNED}")
    _check_logits(folder, where, model, stored, rows)


def _stored_name(parameter: str) -> str:
    """Return PEFT's name in the file for a parameter of the adapter 'default'."""
    name = parameter.replace(".default.", ".").removesuffix(".default")
    return name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _unchanged_layers(stored: Tensors, start: Mapping[str, str]) -> tuple[list[str], int]:
    """Return the layers whose update is zero or the same as before training, and the number of all layers.

    Weight decay alone changes A. If B is zero, the layer still equals the base's, unless DoRA's magnitude has changed.
    """
    layers: dict[str, list[str]] = {}
    for name in start:
        layers.setdefault(layer_and_part(name)[0], []).append(name)
    moved = {name for name, digest in start.items() if _digest(stored[name]) != digest}

    def is_new(names: list[str]) -> bool:
        magnitudes = {name for name in names if name.endswith(".lora_magnitude_vector")}
        factors = set(names) - magnitudes
        if magnitudes & moved:
            return True
        return bool(factors & moved) and all(bool(stored[name].any()) for name in factors)

    return [layer for layer, names in layers.items() if not is_new(names)], len(layers)


def missing_gradient_warning(
    trained: Sequence[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer
) -> str | None:
    """Return a warning, after the first step, about adapted layers that got no gradient while others did; else None."""
    if isinstance(optimizer, ZeroOptimizer):  # DeepSpeed fills in zeros
        return None
    # Of a layer's tensors, all get a gradient or none.
    layers = {layer_and_part(name)[0]: weight in optimizer.state for name, weight in trained}
    still = [layer for layer, is_reached in layers.items() if not is_reached]
    if not still or len(still) == len(layers):
        return None
    what = f"{len(still)} of {len(layers)} adapted layers got no gradient in the first step: {first_few(still, NAMED)}"
    return f"{what}; if no other step reaches them, the run ends without an adapter; {UNUSED}"


def _differences(weights: Tensors, stored: Tensors) -> Iterator[str]:
    for name, wanted in weights.items():
        key = _stored_name(name)
        found = stored.get(key)
        if found is None:
            yield f"{key} is missing"
        elif found.shape != wanted.shape:
            yield f"{key} has shape {list(found.shape)}, not {list(wanted.shape)}"
        elif found.dtype != wanted.dtype or _digest(found) != _digest(wanted):
            yield f"{key} has other values"


def _check_logits(folder: Path, where: str, model: PeftModel, stored: Tensors, rows: Iterable[torch.Tensor]) -> None:
    adapter = model.active_adapter
    assert isinstance(adapter, str)
    with model.disable_adapter():
        ids, base = _finite_logits(model, adapter, rows)
    finite = base.isfinite()
    for times in SCALES:
        with rescale_adapter_scale(model, times):
            trained = _logits(model, adapter, ids)
        effect = float((trained - base)[finite].norm())
        if effect > 0:
            break
    if effect == 0:
        what = f"the adapter changes no finite logit of a training row, even scaled up {times:,} times"
        raise RunError(what, where, f"{KEPT}; raise training.learning_rate, or train for more steps")
    sharded = any(isinstance(weight, DTensor) or is_partitioned(weight) for weight in model.parameters())
    again = _refilled(model, adapter, stored) if sharded else _reloaded(model, adapter, folder)
    with again as name, rescale_adapter_scale(model, times):
        error = float((_logits(model, name, ids) - trained)[finite].norm())
    if not error <= 0.01 * effect:  # also true for NaN
        what = f"reloaded from disk, the adapter's logits differ by {error:.3g} from those at the end of training"
        raise RunError(f"{what} ({effect:.3g} from the base's)", where, f"{KEPT}; please report it")


@contextmanager
def _reloaded(model: PeftModel, trained: str, folder: Path) -> Iterator[str]:
    """Load the adapter in ``folder`` beside the ``trained`` one, on the same base, and yield its name."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # PEFT fills a new adapter at random before it loads the file
        model.load_adapter(str(folder), RELOADED, torch_device=str(model.device))
    yield RELOADED  # an error ends the run
    model.set_adapter(trained)
    model.delete_adapter(RELOADED)
    model.train(training)


@contextmanager
def _refilled(model: PeftModel, trained: str, stored: Tensors) -> Iterator[str]:
    """Fill the ``trained`` adapter's sharded weights from the file: PEFT cannot load a second one beside it."""
    with torch.no_grad():
        for name, weight in trainable_parameters(model):
            fill_parameter(weight, stored[_stored_name(name)])
    yield trained


def _finite_logits(model: PeftModel, adapter: str, rows: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the ``rows`` for which some logit is finite, else the last, and its logits. Steps with rows that
    overflow may have been skipped."""
    for ids in rows:
        logits = _logits(model, adapter, ids)
        if logits.isfinite().any():
            break
    return ids, logits


def _logits(model: PeftModel, adapter: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_adapter(adapter)
    return logits_of(model, [ids])[0]


def _digest(tensor: torch.Tensor) -> str:
    numbers: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers).hexdigest()
