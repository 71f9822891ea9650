"""Progress for people on a terminal, plain lines for logs."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from lora_cli.errors import pluralize, printable, writing

Item = TypeVar("Item")
_LOG_WIDTH = 1000
"""Columns of a file or pipe, so that no table is cropped there."""


class _FaultTolerantStream:
    """A stream that goes silent when a write fails. A closed reader or a full disk must not end a run, which also keeps
    its own log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: TextIO) -> None:
    """Redirect all further writes to a stream to /dev/null, since its reader is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Display:
    """Writes to stderr, and to the run's log once there is one.

    On a terminal that can redraw a line (TERM=dumb cannot), a bar shows loss, learning rate, tokens/s, time left and
    peak memory; elsewhere each logged step is a line. ``quiet`` prints only warnings, ``silent`` nothing: only one of
    several processes prints.
    """

    def __init__(self, quiet: bool = False, silent: bool = False) -> None:
        self.quiet = quiet
        stream = cast("TextIO", _FaultTolerantStream(sys.stderr))
        terminal = sys.stderr.isatty()
        self.console = Console(
            file=stream,
            highlight=False,
            soft_wrap=not terminal,
            width=None if terminal else _LOG_WIDTH,
            # FORCE_COLOR asks for colours in a file; rich would also redraw bars in it.
            force_interactive=None if terminal else False,
            quiet=silent,
        )
        if self.console.width < 1:  # with COLUMNS=0, rich would print nothing
            self.console.width = 80
        self._log: Path | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def log_to(self, path: Path) -> None:
        """Also append every line to this file from now on."""
        self._log = path

    def note(self, text: str, warning: bool = False) -> None:
        """Print and log one line of information, or a warning, with unprintable characters escaped."""
        text = printable(text)
        if warning or not self.quiet:
            self.console.print(
                f"warning: {text}" if warning else text, style="yellow" if warning else None, markup=False
            )
        self._append(text)

    def _append(self, text: str) -> None:
        if self._log is None:
            return
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n"
        with writing(self._log, len(line.encode())), self._log.open("a", encoding="utf-8") as file:
            file.write(line)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a small table; numbers are right-aligned."""
        if self.quiet:
            return
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if isinstance(rows[0][index], int) else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
        self.console.print(table)

    @contextmanager
    def steps(self, done: int, total: int) -> Iterator[None]:
        """Show progress from step ``done`` to ``total`` while the block runs."""
        if self.quiet or not self.console.is_interactive:
            yield
            return
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._progress = progress
            self._task = progress.add_task("train", total=total, completed=done, status="")
            try:
                yield
            finally:
                self._progress = None

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """On a terminal, show that ``what`` is in progress while the block runs, which must not show a bar."""
        return nullcontext() if self.quiet or not self.console.is_interactive else self.console.status(what)

    def through(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """Yield the items, with their own bar on a terminal."""
        if self.quiet or not self.console.is_interactive:
            yield from items
        elif self._progress is None:
            yield from track(items, what, console=self.console, transient=True)
        else:
            task = self._progress.add_task(what, total=len(items), status=what)
            yield from self._progress.track(items, task_id=task)
            self._progress.remove_task(task)

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def metrics(self, line: Mapping[str, Any], seconds_left: float | None = None) -> None:
        """Show a line of metrics.jsonl: in the bar, or as a line of its own."""
        text = _describe(line)
        if line["split"] != "train" or self._progress is None:
            left = "" if seconds_left is None else f"  left {duration(seconds_left)}"
            self.note(f"step {line['step']}  {text}{left}")
        else:
            self._progress.update(self._task, status=text)
            self._append(f"step {line['step']}  {text}")


def _describe(line: Mapping[str, Any]) -> str:
    """Return a line of metrics as text."""
    if line["split"] != "train":
        return f"{line['split']} loss {line['loss']:.4f}  perplexity {line['perplexity']:.2f}"
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    return (
        f"loss {loss}  lr {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s  "
        f"peak {peak_memory() / 2**20:,.0f} MiB"
    )


def format_steps(result: Mapping[str, Any]) -> str:
    """Return the number of steps of a run and the time of those taken since it was resumed, as text."""
    steps, taken = pluralize(result["steps"], "step"), result["steps"] - result["resumed_step"]
    if not taken:
        return f"{steps}, all taken before"
    return f"{steps}{f', the last {taken:,}' if result['resumed_step'] else ''} in {result['seconds']:,.1f} s"


def format_skipped(result: Mapping[str, Any]) -> str:
    """Return the number of steps of a run that were skipped as text, empty for none."""
    if not result["skipped_steps"]:
        return ""
    return f"{pluralize(result['skipped_steps'], 'step was', 'steps were')} skipped: loss or gradient was not finite"


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def peak_memory() -> int:
    """Return this process's peak memory in bytes: allocated on the GPU if there is one, else resident on the host."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
