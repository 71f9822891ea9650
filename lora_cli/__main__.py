"""``python -m lora_cli`` is ``lora``."""

from lora_cli.cli.app import run

if __name__ == "__main__":
    run()
