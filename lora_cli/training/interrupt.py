"""SIGINT, SIGTERM and SIGHUP ask the loop to stop after its step; a second one stops at once, unless it is SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from lora_cli.errors import Interrupted


@dataclass
class Interrupt:
    """The number of the signal that asked to stop; 0 while none has."""

    number: int = 0


@contextmanager
def catch_signals(interrupt: Interrupt) -> Iterator[None]:
    """While the block runs, record the first SIGINT, SIGTERM or SIGHUP (unless nohup ignores it) in ``interrupt``, to
    be read between steps."""

    def handle(number: int, _: FrameType | None) -> None:
        interrupt.number = number
        for kind, handler in before.items():
            # A shell that ends sends its jobs SIGHUP, and then the system sends it again.
            signal.signal(kind, signal.SIG_IGN if kind == signal.SIGHUP else handler)

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for kind in before:
        signal.signal(kind, handle)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def stopped_after(step: int, signal_number: int) -> Interrupted:
    """Return the error to raise once the step's checkpoint is written; step 0, before the first step, has none."""
    if step == 0:
        return Interrupted("stopped before the first step", signal_number, "--resume starts it again")
    hint = "to continue, run the same command with --resume and without --overwrite"
    return Interrupted(f"stopped after step {step}, checkpoint written", signal_number, hint)
