"""Words for target modules, by the names that architectures give their layers."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from lora_cli.model.base import skeleton
from lora_cli.model.layers import linear_layers
from lora_cli.model.targets import choose_targets

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
SPLIT = {"minimal": {"q_proj", "v_proj"}, "standard": {"q_proj", "k_proj", "v_proj"}}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, set[str]], set[str]]] = {
    # arguments of the configuration, layers by word, what "attention" adds to those of "standard"
    "Llama": (SIZES, SPLIT, {"o_proj"}),
    "Phi": (SIZES, SPLIT, {"dense"}),
    "OPT": (SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}, SPLIT, {"out_proj"}),
    "Phi3": (SIZES | {"pad_token_id": 0}, {"minimal": {"qkv_proj"}, "standard": {"qkv_proj"}}, {"o_proj"}),
    "GPT2": ({"n_embd": 16, "n_head": 2, "n_layer": 2}, {"minimal": {"c_attn"}, "standard": {"c_attn"}}, {"c_proj"}),
    "GPTNeoX": (SIZES, {"minimal": {"query_key_value"}, "standard": {"query_key_value"}}, {"dense"}),
    "Falcon": (SIZES, {"minimal": {"query_key_value"}, "standard": {"query_key_value"}}, {"dense"}),
    "Mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 2}, {"minimal": {"Wqkv"}, "standard": {"Wqkv"}}, {"out_proj"}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_words_name_the_layers_of_attention(name: str) -> None:
    arguments, wanted, outputs = ARCHITECTURES[name]
    layers = linear_layers(skeleton(getattr(transformers, f"{name}Config")(vocab_size=50, **arguments)))
    for word, leaves in (wanted | {"attention": wanted["standard"] | outputs}).items():
        found = [target.name for target in choose_targets(layers, word, 2)]
        assert {layer.rpartition(".")[2] for layer in found} == leaves, word
        assert len(found) == 2 * len(leaves), "in both layers, and in their attention alone"
    assert len(choose_targets(layers, "all-linear", 2)) == len(layers) > 2 * len(wanted["standard"] | outputs)
