"""What a launcher (torchrun, Accelerate) tells this process about the run's processes, before they connect."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

from lora_cli.errors import Fault, UserError, pluralize

_COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_NEEDED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch's launchers set, without which a process does not find the others."""
_MPI_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where Accelerate would otherwise look for the number of processes."""
_WHOLE = re.compile(r"-?[0-9]+")
_REMEDY = "unset it to run one process; --num-processes, accelerate launch and torchrun set all that several need"
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl(2): the signal that a process gets when its parent dies."""


def end_with_launcher() -> None:
    """Ask Linux to kill this process when its launcher dies, however it dies.

    Otherwise processes that wait for each other would never end. Killing is safe: checkpoints are complete at any time.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def process_index() -> int:
    """Return this process's rank in the run. Rank 0 prints and writes the files."""
    return _number("RANK", 0) if process_count() > 1 else 0


def process_count() -> int:
    """How many processes the run has, on all machines."""
    return _number("WORLD_SIZE", 1)


def local_process_count() -> int:
    """How many of the run's processes are on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1) if process_count() > 1 else 1


def is_first_here() -> bool:
    """Whether this is the first of the run's processes on this machine."""
    return _number("LOCAL_RANK", 0) <= 0


def check_launch_environment() -> None:
    """Raises UserError when the environment describes this process as one of several that could not connect: it is left
    over in a shell or a container, or set by a launcher that is not one of torch's."""
    given = {name: os.environ[name] for name in (*_COUNTS, *_MPI_COUNTS) if name in os.environ}
    if wrong := [name for name, value in given.items() if not _WHOLE.fullmatch(value)]:
        raise UserError([Fault("expected a whole number", _shown(name), _REMEDY) for name in wrong])
    if process_count() == 1 and (mpi := [name for name in _MPI_COUNTS if _number(name, 1) > 1]):
        raise UserError("MPI has started several processes, which lora cannot connect", _shown(mpi[0]), _REMEDY)
    if process_count() == 1 and _number("LOCAL_RANK", -1) < 0:
        return
    if missing := [name for name in _NEEDED if not os.environ.get(name)]:
        what = f"the environment describes one of several processes, but does not set {', '.join(missing)}"
        raise UserError(what, _shown("WORLD_SIZE" if process_count() > 1 else "LOCAL_RANK"), _REMEDY)
    if not 0 <= _number("RANK", 0) < process_count():
        raise UserError(f"not a rank of {pluralize(process_count(), 'process', 'processes')}", _shown("RANK"), _REMEDY)


def check_gpus(count: int) -> None:
    """Raises UserError when the processes on this machine would have to share its ``count`` GPUs, if it has any: NCCL
    connects no two processes on one."""
    processes = local_process_count()
    if 0 < count < processes:
        what = f"{processes} processes on this machine, which has {pluralize(count, 'GPU')} for them"
        hint = "start one per GPU; CUDA_VISIBLE_DEVICES names the GPUs to use, and if it is empty, the CPU trains"
        raise UserError(what, hint=hint)


def _shown(name: str) -> str:
    return f"{name}={os.environ[name]} (environment)"


def _number(name: str, default: int) -> int:
    """Return a variable's whole number, or ``default`` when it is unset or no such number."""
    value = os.environ.get(name, "")
    return int(value) if _WHOLE.fullmatch(value) else default
