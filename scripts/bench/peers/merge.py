"""Merge an adapter as PEFT's documentation does: ``python -m bench.peers.merge ADAPTER OUT``."""

from __future__ import annotations

import sys

from peft import AutoPeftModelForCausalLM


def main(adapter: str, out: str) -> None:
    """Load base and adapter, merge, save."""
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto")
    model.merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
