"""A model stored in NF4 by Transformers: ``python -m bench.peers.quantize MODEL OUT``."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main(model: str, out: str) -> None:
    """Quantize while loading, save."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_pretrained(model, dtype="auto", quantization_config=config).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
