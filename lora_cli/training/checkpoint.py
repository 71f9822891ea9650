"""All that a run needs to go on from a step: written whole or not at all, the newest found, the oldest removed."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
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

from lora_cli.disk import make_folder
from lora_cli.errors import UserError, unreadable
from lora_cli.model.memory import is_out_of_memory
from lora_cli.training.processes import fill, laid_out_as, shape_of, whole
from lora_cli.weights.folders import clear_drafts, entries, set_aside, whole_folder
from lora_cli.weights.shards import read_headers

MANIFEST = "manifest.json"
DOCUMENT = "state.json"
FILES = ("weights", "optimizer", "random")
NAMES = (DOCUMENT, *(f"{name}.safetensors" for name in FILES))
NAME = re.compile(r"step-(\d{8})")
GO_ON = "; --resume continues from the newest"
NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a run has come: its step, the last that was logged, the last evaluation's, what the base, that one and
    the best evaluation scored, evaluations since, and steps that were left out, in all and since the last one taken."""

    step: int = 0
    logged_step: int | None = None
    evaluated_step: int | None = None
    base_loss: FiniteFloat | None = None
    validation_loss: FiniteFloat | None = None
    validation_tokens: int = 0
    best_loss: FiniteFloat | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class RandomNumbers:
    """What of a process's random state is no tensor, as Python and numpy give it."""

    python: tuple[int, list[int], float | None]
    numpy: tuple[list[int], int, int, float]


@dataclass(frozen=True)
class Document:
    """All of a checkpoint that is no tensor: the optimizer's numbers by name, every process's random state, and what
    float16's gradient scaler has come to."""

    progress: Progress
    optimizer: dict[str, int | float]
    random: list[RandomNumbers]
    scaler: dict[str, int | float] | None = None


@dataclass(frozen=True)
class State:
    """A checkpoint in memory: trained weights, the optimizer's tensors and every process's random tensors by name, and
    all that is no tensor.

    The optimizer's settings are not in it: they are the recipe's, and a resumed run may not change these.
    """

    weights: Tensors
    optimizer: Tensors
    random: Tensors
    document: Document


def capture(
    progress: Progress, parameters: NamedParameters, optimizer: torch.optim.Optimizer, scaler: GradScaler | None
) -> State:
    """The run's state, whole on every process; each must call this, since sharded tensors are gathered."""
    moments, numbers = _split_state(optimizer.state_dict()["state"])
    random_tensors: Tensors = {}
    random_numbers = []
    for index, (tensors, numbers_there) in enumerate(gather_object([_random_state()])):
        random_tensors |= {f"{index}.{name}": tensor for name, tensor in tensors.items()}
        random_numbers.append(numbers_there)
    document = Document(progress, numbers, random_numbers, scaler.state_dict() if scaler is not None else None)
    return State({name: host_copy(tensor) for name, tensor in parameters}, moments, random_tensors, document)


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in host memory, whole; every process must call this, since sharded tensors are gathered."""
    # A copy each: 8-bit optimizers share one table of levels, and safetensors refuses shared storage.
    return whole(tensor).detach().cpu().clone().contiguous()


def write(folder: Path, state: State) -> Path:
    """Write ``folder``/step-NNNNNNNN as safetensors and JSON, whole or not at all."""
    make_folder(folder, parents=False)  # the run's own has to be there
    target = path_of(folder, state.document.progress.step)
    tensors = [tensor for name in FILES for tensor in getattr(state, name).values()]
    with whole_folder(target, replace=True, needed=sum(tensor.nbytes for tensor in tensors)) as draft:
        for name in FILES:
            save_file(getattr(state, name), draft / f"{name}.safetensors")
        (draft / DOCUMENT).write_text(json.dumps(asdict(state.document)), encoding="utf-8")
        (draft / MANIFEST).write_text(json.dumps(_manifest(draft)), encoding="utf-8")
    return target


def read(path: Path) -> State:
    """A checkpoint that ``is_whole``, in host memory. Raises RunError or OSError when it cannot be read, which may
    pass."""
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
    """Raises ValueError for what is none of a checkpoint."""
    text = (path / DOCUMENT).read_text(encoding="utf-8")
    return TypeAdapter(Document).validate_json(text, strict=True)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint is of, from its name."""
    return int(path.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. Raises OSError when it cannot be listed."""
    return sorted(path for path in entries(folder) if NAME.fullmatch(path.name) and path.is_dir())


def kept(folder: Path, then: str = "") -> str:
    """What to say of the checkpoints in a folder when a run fails, and ``then`` when there are some."""
    return f"the checkpoints are kept{then}" if checkpoints(folder) else "there was no checkpoint yet"


def is_whole(path: Path) -> bool:
    """Whether every file of a checkpoint has the size and the SHA-256 that its manifest says, and is what it is named.

    Whatever is no safetensors file, such as a pickle, is not opened any further. Raises OSError or RunError when a file
    that is there cannot be read, which may pass: a checkpoint taken for damaged would be written over.
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
    """Size and SHA-256 of a checkpoint's files; what a file manager or an editor leaves beside them is none of it."""
    contents = ((name, (path / name).read_bytes()) for name in NAMES)
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents}


def rotate(folder: Path, newest: int, keep: int | None, best: int | None) -> None:
    """Once the checkpoint of step ``newest`` is whole: keep it, those before it up to ``keep`` in all, and ``best``.

    What is beyond it was damaged and is being written again; what an interrupted write has left behind goes as well.
    """
    steps = [step_of(path) for path in checkpoints(folder)]
    earlier = [step for step in steps if step <= newest]
    spared = {*earlier[-keep if keep else 0 :], best}
    for step in steps:
        if step not in spared:
            set_aside(path_of(folder, step))
    clear_drafts(folder)


def restore(
    state: State,
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None,
    process: int,
) -> Progress:
    """Put weights, optimizer, gradient scaler and this process's random state back as they were.

    A process beyond those of the interrupted run keeps the random state it has. Raises UserError when the state is of
    other parameters, or no state that a run can have come to.
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
            value = laid_out_as(value, parameter)
        by_parameter.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": by_parameter, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_weights(state: State, parameters: NamedParameters) -> None:
    """Put the trained weights alone back. Raises UserError when the state is of other parameters."""
    if {name for name, _ in parameters} != set(state.weights):
        hint = "another version of lora or PEFT began the run, and adapted other layers: start a new run"
        raise UserError("the checkpoint's parameters are not those that the recipe trains", hint=hint)
    with torch.no_grad():
        for name, parameter in parameters:
            if shape_of(parameter) != state.weights[name].shape:
                raise UserError(f"{name} has another shape in the checkpoint")
            fill(parameter, state.weights[name])


def _split_state(state: dict[int, dict[str, Any]]) -> tuple[Tensors, dict[str, Any]]:
    """The optimizer's state as named tensors, and what is no tensor."""
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for index, entry in state.items():
        flat: dict[str, Any] = {}
        for name, value in entry.items():  # bitsandbytes nests its 8-bit tensors, and takes them flat
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
