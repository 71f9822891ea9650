"""Checkpoints: all that a run needs to continue, written completely or not at all, found, restored and removed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from pydantic import FiniteFloat, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.amp.grad_scaler import GradScaler

from lora_cli.errors import UserError, unreadable
from lora_cli.system.disk import make_folder
from lora_cli.system.folders import atomic_folder, clear_drafts, entries, mark_for_removal
from lora_cli.system.memory import is_out_of_memory
from lora_cli.training.distributed.processes import fill_parameter, full_tensor, shape_of, sharded_like
from lora_cli.weights.files.fingerprint import file_sha256
from lora_cli.weights.files.shards import read_headers

MANIFEST = "manifest.json"
DOCUMENT = "state.json"
FILES = ("weights", "optimizer", "random")
NAMES = (DOCUMENT, *(f"{name}.safetensors" for name in FILES))
NAME = re.compile(r"step-(\d{8})")
RESUME_HINT = "; --resume continues from the newest"
NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a run has come. ``start_loss`` is the loss with the adapter of ``init_from`` before the first step,
    ``validation_loss`` that of the last evaluation, at ``evaluated_step``; ``skipped_steps`` counts all skipped steps,
    ``skipped_in_a_row`` those since the last step taken."""

    step: int = 0
    logged_step: int | None = None
    evaluated_step: int | None = None
    base_loss: FiniteFloat | None = None
    start_loss: FiniteFloat | None = None
    validation_loss: FiniteFloat | None = None
    validation_tokens: int = 0
    best_loss: FiniteFloat | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class RandomNumbers:
    """The non-tensor part of a process's random state, as Python and NumPy return it."""

    python: tuple[int, list[int], float | None]
    numpy: tuple[list[int], int, int, float]


@dataclass(frozen=True)
class Document:
    """The non-tensor part of a checkpoint: the optimizer's scalars by name, every process's random state, and the state
    of float16's gradient scaler."""

    progress: Progress
    optimizer: dict[str, int | float]
    random: list[RandomNumbers]
    scaler: dict[str, int | float] | None = None


@dataclass(frozen=True)
class State:
    """A checkpoint in memory: trained weights, optimizer tensors and every process's random-state tensors by name, and
    the non-tensor part.

    The optimizer's settings are not included: the recipe sets them, and a resumed run may not change them.
    """

    weights: Tensors
    optimizer: Tensors
    random: Tensors
    document: Document


def capture(
    progress: Progress, parameters: NamedParameters, optimizer: torch.optim.Optimizer, scaler: GradScaler | None
) -> State:
    """Return the run's complete state on all processes; each must call this, since sharded tensors are gathered."""
    moments, numbers = _split_state(optimizer.state_dict()["state"])
    random_tensors: Tensors = {}
    random_numbers = []
    for index, (tensors, numbers_there) in enumerate(gather_object([_random_state()])):
        random_tensors |= {f"{index}.{name}": tensor for name, tensor in tensors.items()}
        random_numbers.append(numbers_there)
    document = Document(progress, numbers, random_numbers, scaler.state_dict() if scaler is not None else None)
    return State({name: host_copy(tensor) for name, tensor in parameters}, moments, random_tensors, document)


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complete, contiguous copy in host memory; every process must call this to gather sharded tensors."""
    # Each is cloned: 8-bit optimizers share one table of levels, and safetensors refuses shared storage.
    return full_tensor(tensor).detach().cpu().clone().contiguous()


def write(folder: Path, state: State) -> Path:
    """Write ``folder``/step-NNNNNNNN as safetensors and JSON, complete or not at all."""
    make_folder(folder, parents=False)  # the run's folder must exist
    target = path_of(folder, state.document.progress.step)
    tensors = [tensor for name in FILES for tensor in getattr(state, name).values()]
    with atomic_folder(target, replace=True, needed=sum(tensor.nbytes for tensor in tensors)) as draft:
        for name in FILES:
            save_file(getattr(state, name), draft / f"{name}.safetensors")
        (draft / DOCUMENT).write_text(json.dumps(asdict(state.document)), encoding="utf-8")
        (draft / MANIFEST).write_text(json.dumps(_manifest(draft)), encoding="utf-8")
    return target


def read(path: Path) -> State:
    """Read a checkpoint that ``is_complete`` into host memory. Raises RunError or OSError for a read error, which may
    be temporary."""
    weights, optimizer, random_states = (_load(path / f"{name}.safetensors") for name in FILES)
    return State(weights, optimizer, random_states, _read_document(path))


def _load(file: Path) -> Tensors:
    try:
        return load_file(file)
    except (SafetensorError, OSError, RuntimeError) as error:  # torch, which maps the file, raises RuntimeError
        if is_out_of_memory(error):
            raise
        raise unreadable(file, error) from error


def _read_document(path: Path) -> Document:
    """Read state.json. Raises ValueError when it is not valid."""
    text = (path / DOCUMENT).read_text(encoding="utf-8")
    return TypeAdapter(Document).validate_json(text, strict=True)


def path_of(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first. Raises OSError when it cannot be listed."""
    return sorted(path for path in entries(folder) if NAME.fullmatch(path.name) and path.is_dir())


def checkpoint_hint(folder: Path, then: str = "") -> str:
    """Return what an error message says about the checkpoints in a folder, and ``then`` if there are any."""
    return f"the checkpoints are kept{then}" if checkpoints(folder) else "there was no checkpoint yet"


def is_complete(path: Path) -> bool:
    """Whether all files of a checkpoint match the sizes and SHA-256 in its manifest, and its step matches its name.

    A file that is not in safetensors format, such as a pickle, is never loaded. Raises OSError or RunError when an
    existing file cannot be read, which may be temporary: a checkpoint mistaken for damaged would be overwritten.
    """
    try:
        listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if listed != _manifest(path):
            return False
        read_headers([path / f"{name}.safetensors" for name in FILES])
        return _read_document(path).progress.step == step_of(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError, UserError):
        return False


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of a checkpoint's own files; those that a file manager or an editor adds are ignored."""
    files = [path / name for name in NAMES]
    return {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in files}


def rotate(folder: Path, newest: int, keep: int | None, best: int | None) -> None:
    """Keep ``best`` and the last ``keep`` checkpoints (None: all) up to step ``newest``, whose own is complete.

    Later checkpoints are removed: they were damaged and will be written again. So are drafts of interrupted writes.
    """
    steps = [step_of(path) for path in checkpoints(folder)]
    earlier = [step for step in steps if step <= newest]
    last = earlier if keep is None else earlier[-keep:]
    spared = {*last, best}
    for step in steps:
        if step not in spared:
            mark_for_removal(path_of(folder, step))
    clear_drafts(folder)


def restore(
    state: State,
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None,
    process: int,
) -> Progress:
    """Restore weights, optimizer, gradient scaler and this process's random state.

    A process beyond those of the interrupted run keeps its current random state. Raises UserError when the state
    belongs to other parameters or is not valid.
    """
    restore_weights(state, parameters)
    try:
        _restore_optimizer(state, parameters, optimizer)
        if scaler is not None and state.document.scaler:
            scaler.load_state_dict(state.document.scaler)
        if process < len(state.document.random):
            own = f"{process}."
            tensors = {name.removeprefix(own): value for name, value in state.random.items() if name.startswith(own)}
            _restore_random(state.document.random[process], tensors)
    except (ValueError, LookupError, OverflowError) as error:
        what = f"the checkpoint of step {state.document.progress.step} cannot be resumed from: {error}"
        raise UserError(what, hint="remove it to resume from the one before") from error
    return state.document.progress


def _restore_optimizer(state: State, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> None:
    by_parameter: dict[int, dict[str, Any]] = {}
    for key, value in (*state.document.optimizer.items(), *state.optimizer.items()):
        index, _, name = key.partition(".")
        parameter = parameters[int(index)][1]
        if isinstance(value, torch.Tensor) and value.shape == shape_of(parameter):
            value = sharded_like(value, parameter)
        by_parameter.setdefault(int(index), {})[name] = value
    for at, entry in by_parameter.items():
        _check_entry(*parameters[at], entry, optimizer)
    optimizer.load_state_dict({"state": by_parameter, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_entry(
    name: str, parameter: torch.nn.Parameter, entry: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> None:
    """Raises ValueError when a parameter's part of the optimizer's state is not complete or of other shapes: not all
    optimizers check this themselves, and one would write beyond a smaller tensor."""
    from lora_cli.training.optimizer import state_shapes  # imports bitsandbytes, which the launcher does without

    for key, wanted in state_shapes(optimizer, shape_of(parameter)).items():
        what = f"the optimizer's {key} of {name}"
        if key not in entry:
            raise ValueError(f"{what} is missing")
        if (found := torch.as_tensor(entry[key]).shape) != wanted:
            raise ValueError(f"{what} is of shape {[*found]}, not {[*wanted]}")


def restore_weights(state: State, parameters: NamedParameters) -> None:
    """Restore only the trained weights. Raises UserError when the state belongs to other parameters."""
    if {name for name, _ in parameters} != set(state.weights):
        hint = "another version of lora or PEFT began the run, and adapted other layers: start a new run"
        raise UserError("the checkpoint's parameters are not those that the recipe trains", hint=hint)
    with torch.no_grad():
        for name, parameter in parameters:
            if shape_of(parameter) != state.weights[name].shape:
                raise UserError(f"{name} has another shape in the checkpoint")
            fill_parameter(parameter, state.weights[name])


def _split_state(state: dict[int, dict[str, Any]]) -> tuple[Tensors, dict[str, Any]]:
    """Split the optimizer's state into named tensors and named non-tensor values."""
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for index, entry in state.items():
        flat: dict[str, Any] = {}
        for name, value in entry.items():  # bitsandbytes nests its 8-bit tensors, but loads them flat
            flat |= value if isinstance(value, dict) else {name: value}
        for name, value in flat.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = host_copy(value)
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def _random_state() -> tuple[Tensors, RandomNumbers]:
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    state: Any = np.random.get_state()  # the global state that libraries draw from
    version, internal, gauss = random.getstate()
    return tensors, RandomNumbers((version, list(internal), gauss), (state[1].tolist(), *state[2:]))


def _restore_random(numbers: RandomNumbers, tensors: Tensors) -> None:
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = numbers.python
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = numbers.numpy
    np.random.set_state(("MT19937", np.asarray(keys, np.uint32), position, has_gauss, cached))
