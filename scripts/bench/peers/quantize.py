"""Store a model in NF4 with Transformers: ``python -m bench.peers.quantize MODEL OUT``."""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM

from bench.models import NF4


def main(model: str, out: str) -> None:
    """Quantize while loading, save."""
    AutoModelForCausalLM.from_pretrained(model, dtype="auto", quantization_config=NF4).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
