"""What a fork does that ``fork_lora`` starts; it imports nothing of the tests'."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def lora(arguments: list[str], environment: Mapping[str, str], first: str, streams: Sequence[Path]) -> None:
    """The command line, its streams in files, in an environment with more and after the Python of ``first``."""
    os.environ |= environment
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from lora_cli.cli.app import main

    exec(first, {})
    code = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # what multiprocessing does at an end is not lora's
