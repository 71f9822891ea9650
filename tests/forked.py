"""What processes that tests start execute. It imports none of the tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def lora(arguments: list[str], environment: Mapping[str, str], first: str, streams: Sequence[Path]) -> None:
    """Run the Python code ``first``, then the command line, with ``environment`` added and the streams in files."""
    os.environ |= environment
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from lora_cli.cli.app import main

    exec(first, {})
    code = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # without multiprocessing's own work at exit, which is not part of lora


def double(number: int) -> int:
    return 2 * number


def double_or_die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number
