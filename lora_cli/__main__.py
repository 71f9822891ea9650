"""``lora``, and ``python -m lora_cli``."""

import os
import signal
import sys


def run() -> None:
    """Entry point of the installed script."""
    _open_closed_streams()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # there is nothing to undo in imports, and nobody reads their traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lora_cli.cli import app

    signal.signal(signal.SIGINT, before)
    app.run()


def _open_closed_streams() -> None:
    """Open /dev/null for each standard stream that was closed (``2>&-``). It gets the stream's number, which the next
    file to be opened would have, and with it what libraries print."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


if __name__ == "__main__":
    run()
