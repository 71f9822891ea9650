"""The ``lora`` program: its commands by name, and how it reports failures."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from lora_cli import __version__
from lora_cli.cli import adapters, evaluate, explain, merge, quantize, train
from lora_cli.cli.options import Command, TrainCommand
from lora_cli.errors import (
    Interrupted,
    LoraError,
    RunError,
    SecondaryError,
    UserError,
    is_out_of_space,
    is_refused_thread,
    printable_lines,
    unwritable,
)
from lora_cli.system.cores import limit_spinning
from lora_cli.training.distributed.launch_environment import process_count, process_index

# Without this default, typer (0.29) imports pydantic to convert a --help that was not given.
_NO_HELP = {"help": False}
app = typer.Typer(
    name="lora",
    help="Fine-tune language models from YAML recipes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "default_map": _NO_HELP | {"adapters": _NO_HELP}},
)
app.command("train", cls=TrainCommand)(train.command)
app.command("eval", cls=Command)(evaluate.command)
app.command("merge", cls=Command)(merge.command)
app.command("quantize", cls=Command)(quantize.command)
app.add_typer(adapters.app, name="adapters")
app.command("explain", cls=Command)(explain.command)


_INFORMATION = {"--help", "-h", "--version"}
"""Options whose answer needs no file."""
_REFUSED_VALUE = re.compile(
    r"invalid truth value (.+)|invalid literal for int\(\) with base \d+: '(.+)'"
    r"|could not convert string to float: '(.+)'|'(.+?)' is not a valid "
    r"|Unknown level: '(.+)'|device string: (.+)|Invalid log settings: ([^,]+)"
)
"""How Python and the libraries name a text that they cannot read."""
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)
_ROOM = 12  # up to so many faults are printed with their hints on lines of their own
_MOST = 60  # more faults get a line each; a long configuration of another tool has so many keys
_SECONDS_FOR_OTHERS = 30  # during which another process of the run may report the same fault or its cause


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code. Failures are reported on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        with warnings.catch_warnings(), _unwound_by_sigterm(given), _signals_out_of_imports():
            if not debug:
                _silence_libraries()
            _prepare_environment()
            if not _INFORMATION.intersection(given):
                _check_surroundings(given)
            app(given, prog_name="lora")  # reports wrong options itself, and always raises SystemExit
    except SystemExit as ended:
        if ended.code in _STOPPED:
            _print_stderr("stopped")
        if isinstance(ended.__context__, BrokenPipeError):  # of which typer makes a 1
            return 128 + signal.SIGPIPE
        return ended.code if isinstance(ended.code, int) else 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        failure = _as_lora_error(error, given)
        if failure is None:
            what = f"{type(error).__name__}: {printable_lines(str(error))}"
            _print_stderr(f"bug in lora: {what}\n  --debug shows where; please report it")
            return 1
        _report(failure, is_train=given[:1] == ["train"])
        return failure.exit_code
    return 0


def _prepare_environment() -> None:
    """Set what libraries read from the environment when they are loaded."""
    limit_spinning()
    # Otherwise bitsandbytes imports torch's compiler, which takes 1.5 s, for functions that are not used here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ["MPLBACKEND"] = "agg"  # curves go to a file, and matplotlib cannot be imported with an unknown one
    if os.environ.get("LOGLEVEL") not in logging.getLevelNamesMapping():
        os.environ.pop("LOGLEVEL", None)  # other programs take 'debug', with which torch cannot be imported


def _check_surroundings(arguments: Sequence[str]) -> None:
    """Raises UserError when the interpreter has dropped docstrings, the working directory is gone, or its name or an
    argument is not UTF-8."""
    if sys.flags.optimize > 1:
        what = "python -OO (PYTHONOPTIMIZE=2) drops docstrings, without which transformers loads no model"
        raise UserError(what, hint="use -O or nothing")
    try:
        folder = str(Path.cwd())
    except FileNotFoundError as error:
        raise UserError("the working directory no longer exists", hint="change to one that does (cd)") from error
    for name in (*arguments, folder):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            what = "not UTF-8, in which safetensors and tokenizers need the names of files"
            code = sys.getfilesystemencoding()
            hint = "rename the file or folder" if code == "utf-8" else f"set PYTHONUTF8=1: Python reads names as {code}"
            raise UserError(what, name, hint) from error


def _as_lora_error(error: Exception, given: Sequence[str]) -> LoraError | None:
    """Return the error to report for ``error``, or None when ``error`` is a bug in lora."""
    if isinstance(error, LoraError):
        return error
    if isinstance(error, OSError):
        return _refused_by_the_system(error)
    if is_refused_thread(error):
        hint = "raise the limit on processes (ulimit -u, or a container's) or on memory; complete files are intact"
        return RunError("the system refused another thread", hint=hint)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("lora_cli"):
        hint = "install what lora requires into this environment ('pip check' lists it)"
        return RunError(f"a library could not be imported: {error}", hint=hint)
    if isinstance(error, RuntimeError | MemoryError) and (failure := _out_of_memory_error(error, given)):
        return failure
    return _refused_variable(error)


def _refused_variable(error: Exception) -> UserError | None:
    """Return the error to report when a library does not accept the value of an environment variable, else None."""
    found = _REFUSED_VALUE.search(str(error))
    value = next(filter(None, found.groups()), "").strip().lower() if found else ""
    names = [name for name, given in os.environ.items() if value and given.strip().lower() == value]
    if not names:
        return None
    where = f"{' or '.join(f'{name}={os.environ[name]}' for name in names)} (environment)"
    return UserError(f"a library does not accept it: {error}", where, "unset it, or give it a valid value")


def _refused_by_the_system(error: OSError) -> LoraError:
    what = f"the system refused: {error.strerror or error}"
    where = None if error.filename is None else str(error.filename)
    if "temporary directory" in what:
        return RunError(what, hint="set TMPDIR to a folder with free space that can be written; libraries need one")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(what, where, "choose another name")
    if where is not None and is_out_of_space(error):
        return unwritable(Path(where), error)
    return RunError(what, where, "files that were complete are intact")


@contextmanager
def _unwound_by_sigterm(given: Sequence[str]) -> Iterator[None]:
    """Let SIGTERM end a command as SIGINT does, so that partial files are removed. Training has its own handler; until
    it is set, SIGTERM ends the process by default, unless this is a container's process 1, for which Linux ignores it.
    """
    ends_by_default = given[:1] == ["train"] and os.getpid() != 1
    if ends_by_default or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # partial files are being removed
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _signals_out_of_imports() -> Iterator[None]:
    """Let a signal also end a command during an import. pybind11, which matplotlib uses, turns the exception that the
    signal raised into an ImportError; raise SystemExit instead."""
    try:
        yield
    except ImportError as error:
        if isinstance(error.__cause__, SystemExit):
            raise error.__cause__ from None
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from error
        raise


def _out_of_memory_error(error: RuntimeError | MemoryError, given: Sequence[str]) -> RunError | None:
    """Return the error to report when memory ran out, else None. Training reports its own, with its checkpoints."""
    what = "out of memory"
    if "torch" in sys.modules:
        from lora_cli.system.memory import describe_out_of_memory, is_out_of_memory

        if not is_out_of_memory(error):
            return None
        what = describe_out_of_memory(error)
    elif not isinstance(error, MemoryError):
        return None
    smaller = "shorter rows, a smaller model (lora quantize makes one), " if "eval" in given[:1] else ""
    return RunError(what, hint=f"files that were complete are intact; what helps: {smaller}more free memory")


def _silence_libraries() -> None:
    """Hide the libraries' warnings and logs, which are meant for developers. With --debug they are shown."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "peft", "accelerate", "torch", "huggingface_hub", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _report(error: LoraError, is_train: bool) -> None:
    is_other = is_train and process_index() > 0  # other commands run one process whatever the environment says
    if is_other and isinstance(error, Interrupted):
        return  # process 0 reports it
    if isinstance(error, SecondaryError) or (is_other and not isinstance(error, RunError)):
        # Another process reports the cause or the same fault, and the launcher ends all processes once one has ended.
        time.sleep(_SECONDS_FOR_OTHERS)
    is_long = len(error.faults) > _ROOM
    shown = error.faults[:_MOST]
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"  # typer heeds neither
    heading = "error: " if plain else typer.style("error: ", fg="red", bold=True)
    for fault, following in zip_longest(shown, shown[1:]):
        follows = following is not None and following.hint == fault.hint
        once = replace(fault, hint=None) if follows and not is_long else fault
        text = "; ".join(line.strip() for line in str(once).splitlines()) if is_long else str(once)
        _print_stderr(f"{heading}{text}")
    if (more := len(error.faults) - _MOST) > 0:
        _print_stderr(f"... and {more:,} more")


def _print_stderr(text: str) -> None:
    """Print on stderr, or nothing if that fails: the exit code reports the failure in any case."""
    with suppress(OSError):
        typer.echo(text, err=True)


def run() -> None:
    """Run the command line and end the process with its exit code."""
    gc.set_threshold(100_000)  # libraries create a million lasting objects; scanning them delays the start
    code = main()
    if process_count() > 1:
        _exit_without_shutdown(code)
    sys.exit(code)


def _exit_without_shutdown(code: int) -> NoReturn:
    """End one of several processes without shutting down the interpreter. All its files are closed by now.

    During a shutdown, a thread of the process group that requests the GIL would abort the process. The launcher would
    then stop the other processes, one of which may still be writing.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
