"""All that a run needs to go on from a step: written whole or not at all, the newest found, the oldest removed."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lora_cli.errors import UserError
from lora_cli.weights.shards import whole_folder

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8})")
NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class Progress:
    """How far a run has come: its step, what the base, the last and the best evaluation scored, evaluations since."""

    step: int = 0
    base_loss: float | None = None
    validation_loss: float | None = None
    validation_tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


def save(folder: Path, progress: Progress, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> Path:
    """Write ``folder``/step-NNNNNNNN: trained weights, optimizer state and random states, as safetensors and JSON."""
    target = folder / f"step-{progress.step:08d}"
    state = optimizer.state_dict()
    moments, numbers = _split_state(state["state"])
    tensors, random_numbers = _random_state()
    with whole_folder(target, replace=True) as draft:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in parameters}, draft / "adapter.safetensors"
        )
        save_file(moments, draft / "optimizer.safetensors")
        save_file(tensors, draft / "random.safetensors")
        document = {
            "progress": asdict(progress),
            "optimizer": {"numbers": numbers, "param_groups": state["param_groups"]},
            "random": random_numbers,
        }
        (draft / "state.json").write_text(json.dumps(document), encoding="utf-8")
        (draft / MANIFEST).write_text(json.dumps(_manifest(draft)), encoding="utf-8")
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def is_whole(path: Path) -> bool:
    """Whether every file of a checkpoint has the size and the SHA-256 that its manifest says."""
    try:
        listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(listed == _manifest(path))


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in path.iterdir() if file.name != MANIFEST)
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }


def rotate(folder: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what an interrupted write has left behind."""
    for path in checkpoints(folder)[: -keep if keep else 0]:
        shutil.rmtree(path)
    for draft in folder.glob(".step-*"):
        shutil.rmtree(draft)


def restore(path: Path, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights, optimizer and random states back as they were. Raises UserError when the checkpoint does not fit."""
    weights = load_file(path / "adapter.safetensors")
    names = {name for name, _ in parameters}
    if names != set(weights):
        raise UserError("the checkpoint holds other parameters than the recipe trains", str(path))
    with torch.no_grad():
        for name, parameter in parameters:
            if parameter.shape != weights[name].shape:
                raise UserError(f"{name} has another shape in the checkpoint", str(path))
            parameter.copy_(weights[name])
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    for key, number in document["optimizer"]["numbers"].items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = number
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": document["optimizer"]["param_groups"]})
    _restore_random(document["random"], load_file(path / "random.safetensors"))
    return Progress(**document["progress"])


def _split_state(state: dict[int, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state as named tensors, and what is no tensor."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entry in state.items():
        flat: dict[str, Any] = {}
        for name, value in entry.items():  # bitsandbytes nests its 8-bit tensors, and takes them flat
            flat |= value if isinstance(value, dict) else {name: value}
        for name, value in flat.items():
            if isinstance(value, torch.Tensor):
                # A copy each: 8-bit optimizers share one table of levels, and safetensors refuses shared storage.
                tensors[f"{index}.{name}"] = value.detach().cpu().clone().contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def _random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    state: Any = np.random.get_state()  # the global state that libraries draw from
    numbers = {"python": random.getstate(), "numpy": [state[1].tolist(), *state[2:]]}
    return tensors, numbers


def _restore_random(numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state(("MT19937", np.asarray(keys, np.uint32), position, has_gauss, cached))
