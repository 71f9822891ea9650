"""The models to measure on: configurations that get random weights, so that nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Transformers configuration and the layers that get an adapter. ``nf4``: the linear layers except the head are
    stored in NF4, in bitsandbytes' format."""

    model_type: str
    config: dict[str, Any]
    targets: tuple[str, ...]
    dtype: str = "float32"
    nf4: bool = False


LLAMA_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_LINEAR = (*LLAMA_ATTENTION, "gate_proj", "up_proj", "down_proj")
GPT2_ATTENTION = ("attn.c_attn", "attn.c_proj")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

SHAPES = {
    "llama": Shape(  # 40M parameters in body and embedding, 16M in the head
        "llama",
        {
            "vocab_size": 32_000,
            "hidden_size": 512,
            "intermediate_size": 1344,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
        LLAMA_ATTENTION,
    ),
    "gpt2": Shape(
        "gpt2",
        {"vocab_size": 50_257, "n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": 1024, **NO_DROPOUT},
        GPT2_ATTENTION,
    ),
    "tiny": Shape(  # to test the bench itself
        "llama",
        {
            "vocab_size": 1000,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        },
        LLAMA_ATTENTION,
    ),
    "llama-500m": Shape(  # 518M parameters, to merge and quantize
        "llama",
        {
            "vocab_size": 32_000,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
        LLAMA_LINEAR,
        "bfloat16",
    ),
    "llama-40m": Shape(  # also with ten times as many layers: llama-40m-10x
        "llama",
        {
            "vocab_size": 8000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
        LLAMA_LINEAR,
        "bfloat16",
    ),
    "llama-8b": Shape(  # Llama 3.1 8B, with more positions to search for the longest context
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 1_048_576,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            "tie_word_embeddings": False,
        },
        LLAMA_LINEAR,
        "bfloat16",
        nf4=True,
    ),
}
TWO_LAYERS = {"num_hidden_layers": 2, "vocab_size": 8000}  # the head's share of the work is about as in llama-8b
SHAPES["llama-8b-2-layers"] = replace(SHAPES["llama-8b"], config=SHAPES["llama-8b"].config | TWO_LAYERS, nf4=False)
NF4_BLOCKS = {"hidden_size": 64, "intermediate_size": 128}  # each row is whole NF4 blocks, for bitsandbytes on a CPU
SHAPES["tiny-nf4"] = replace(SHAPES["tiny"], config=SHAPES["tiny"].config | NF4_BLOCKS, dtype="bfloat16", nf4=True)


def _deeper(shape: Shape) -> Shape:
    return replace(shape, config=shape.config | {"num_hidden_layers": 10 * shape.config["num_hidden_layers"]})


DEEPER = "-10x"
"""The suffix of names of shapes with ten times as many layers."""
SHAPES |= {name + DEEPER: _deeper(SHAPES[name]) for name in ("tiny", "llama-40m")}
