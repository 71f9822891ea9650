"""Run several processes on this machine through Accelerate's launcher, with one exit code."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress

import psutil
from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from lora_cli.errors import RunError
from lora_cli.system.cores import usable_cores
from lora_cli.training.run.checkpoint import RESUME_HINT, checkpoint_hint
from lora_cli.training.run.run_folder import RunFolder

SECONDS_TO_STOP = 120
"""How long processes may take to finish a step and write its checkpoint once a signal asks them to stop."""


def launch(arguments: Sequence[str], processes: int, folder: RunFolder) -> int:
    """Run ``lora`` with ``arguments`` in several processes on this machine; return the first failing one's exit code.

    The processes report their own errors. Raises RunError about the run's ``folder`` when one was killed.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup, which the launcher would undo
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    threads = os.environ.get("OMP_NUM_THREADS", max(1, usable_cores() // processes))
    options = [
        "--num_machines=1",
        "--main_process_port=0",
        f"--num_processes={processes}",
        f"--num_cpu_threads_per_process={threads}",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ]
    # The failing process reports its error itself.
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # for torch's loggers that have a level of their own
    for name in ("torch.distributed.elastic", "accelerate"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as logs:  # otherwise the launcher creates one and leaves it
            # launch_command would take other settings from the user's Accelerate configuration file.
            command = [*options, f"--log_dir={logs}", "--module", "lora_cli", *arguments]
            multi_gpu_launcher(launch_command_parser().parse_args(command))
    except ChildFailedError as failed:
        process, first = failed.get_first_failure()
        if first.exitcode < 0:
            what = f"process {process} was killed (signal {-first.exitcode})"
            raise RunError(what, str(folder.root), checkpoint_hint(folder.checkpoints, RESUME_HINT)) from failed
        return int(first.exitcode)
    except Exception as error:
        stopped = _signal_behind(error)
        if stopped is None:
            raise
        return 128 + stopped
    finally:
        for child in psutil.Process().children(recursive=True):  # after a second signal, the launcher does not end them
            with suppress(psutil.NoSuchProcess):  # it has ended since
                child.kill()
    return 0


def _signal_behind(error: BaseException | None) -> int | None:
    """Return the signal that stopped the launcher, or None. While torch's launcher handles a signal's exception, it may
    raise another one, such as an UnboundLocalError in its own timing."""
    while error is not None:
        if isinstance(error, SignalException):
            return int(error.sigval)
        error = error.__context__
    return None
