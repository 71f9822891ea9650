"""``lora``, and ``python -m lora_cli``."""

import signal


def run() -> None:
    """Entry point of the installed script."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # there is nothing to undo in imports, and nobody reads their traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lora_cli.cli import app

    signal.signal(signal.SIGINT, before)
    app.run()


if __name__ == "__main__":
    run()
