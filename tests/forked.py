"""What the processes that ``fork_lora`` forks execute. It imports none of the tests."""

from __future__ import annotations

import os
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
