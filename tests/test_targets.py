"""The words for target modules, such as ``all-linear``, in architectures with different layer names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_cli.errors import UserError
from lora_cli.model.adapters import adapt, trainable_parameters
from lora_cli.model.base import meta_model
from lora_cli.model.layers import adaptable_layers
from lora_cli.model.targets import Target, choose_targets
from lora_cli.recipe.schema import Adapter
from lora_cli.weights.files.check_model import stored_layers

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
SPLIT = {"minimal": {"q_proj", "v_proj"}, "standard": {"q_proj", "k_proj", "v_proj"}}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, set[str]], set[str]]] = {
    # arguments of the configuration, layers by word, and the layers that "attention" adds to "standard"
    "Llama": (SIZES, SPLIT, {"o_proj"}),
    "Phi": (SIZES, SPLIT, {"dense"}),
    "OPT": (SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}, SPLIT, {"out_proj"}),
    "Phi3": (SIZES | {"pad_token_id": 0}, {"minimal": {"qkv_proj"}, "standard": {"qkv_proj"}}, {"o_proj"}),
    "GPT2": ({"n_embd": 16, "n_head": 2, "n_layer": 2}, {"minimal": {"c_attn"}, "standard": {"c_attn"}}, {"c_proj"}),
    "GPTNeoX": (SIZES, {"minimal": {"query_key_value"}, "standard": {"query_key_value"}}, {"dense"}),
    "Falcon": (SIZES, {"minimal": {"query_key_value"}, "standard": {"query_key_value"}}, {"dense"}),
    "NemotronH": (
        SIZES
        | {"num_key_value_heads": 2, "head_dim": 8, "layers_block_type": ["attention", "mlp", "attention", "mlp"]},
        SPLIT,
        {"o_proj"},
    ),
    "Mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 2}, {"minimal": {"Wqkv"}, "standard": {"Wqkv"}}, {"out_proj"}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_words_name_the_layers_of_attention(name: str) -> None:
    arguments, wanted, outputs = ARCHITECTURES[name]
    layers = adaptable_layers(meta_model(getattr(transformers, f"{name}Config")(vocab_size=50, **arguments)))
    for word, leaves in (wanted | {"attention": wanted["standard"] | outputs}).items():
        found = [target.name for target in choose_targets(layers, word, 2)]
        assert {layer.rpartition(".")[2] for layer in found} == leaves, word
        assert len(found) == 2 * len(leaves), "in both layers, and in their attention alone"
    assert len(choose_targets(layers, "all-linear", 2)) == len(layers) > 2 * len(wanted["standard"] | outputs)


def test_names_and_ranks_choose_layers() -> None:
    layers = {name: Target(name, width, 16) for name, width in (("h.0.q_proj", 16), ("h.0.low_q_proj", 4))}

    def chosen(wanted: str | tuple[str, ...], r: int = 2) -> list[str]:
        return [target.name for target in choose_targets(layers, wanted, r)]

    assert chosen("q_proj") == chosen(("q_proj",)) == chosen(("h.0.q_proj",)) == ["h.0.q_proj"]
    assert chosen(("low_q_proj",), 4) == ["h.0.low_q_proj"]
    assert chosen("all-linear", 16) == list(layers), "of which one has too few inputs for this rank"
    for wanted, r, widest in (("low_q_proj", 5, 4), ("all-linear", 17, 16)):
        with pytest.raises(
            UserError, match=rf"adapter.r: {r} is more than the width of any layer to adapt \({widest}\)"
        ):
            chosen(wanted, r)
    assert choose_targets({}, "all-linear", 2) == []


MIXTURE = SIZES | {"moe_intermediate_size": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ALL_LINEAR: dict[str, tuple[dict[str, Any], set[str]]] = {
    # PEFT takes gate_proj, up_proj and down_proj of a dense layer or a shared expert for those of single experts.
    "DeepseekV3": (
        MIXTURE | LATENT | {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    ),
    "Qwen3Moe": (MIXTURE | {"num_experts": 4, "mlp_only_layers": [0]}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "Qwen2Moe": (
        MIXTURE | {"num_experts": 4, "shared_expert_intermediate_size": 8},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    # The indexer that chooses the tokens for sparse attention gets no gradient. DeepSeek-V4's o_a_proj multiplies parts
    # of its input separately.
    "DeepseekV32": (
        MIXTURE | LATENT | {"first_k_dense_replace": 2, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4},
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    ),
    "DeepseekV4": (
        MIXTURE
        | {"q_lora_rank": 8, "head_dim": 8, "qk_rope_head_dim": 4, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2}
        | {"n_routed_experts": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 2, "num_hidden_layers": 4}
        | {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
        {"q_a_proj", "q_b_proj", "kv_proj", "gate_proj", "o_b_proj", "up_proj", "down_proj"},
    ),
    # This router's weight is read past an adapter. PEFT would not find the shared experts' factors again.
    "LongcatFlash": (
        MIXTURE
        | LATENT
        | {"num_layers": 1, "head_dim": 8, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 8, "moe_topk": 2}
        | {"n_routed_experts": 4, "zero_expert_num": 2},
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    ),
    "Laguna": (
        MIXTURE
        | {"num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 8, "mlp_layer_types": ["sparse"] * 2},
        {"q_proj", "k_proj", "v_proj", "o_proj", "g_proj"},
    ),
    # Mamba's forward pass reads the weights of dt_proj and out_proj directly, bypassing an adapter.
    "Mamba": ({"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, {"in_proj", "x_proj"}),
    "FalconMamba": ({"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, {"in_proj", "x_proj"}),
    # BART's decoder, used alone, attends to no encoder.
    "Bart": (
        {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
    # No text goes through the vision tower, whose layers have some of these names and others (out_proj, fc1).
    "Gemma3": (
        {"text_config": SIZES | {"num_key_value_heads": 2, "vocab_size": 50}}
        | {"vision_config": SIZES | {"image_size": 28, "patch_size": 14}},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
}


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear_names_what_an_adapter_reaches(name: str) -> None:
    """Exactly the chosen layers have an adapter, and each adapter gets a gradient."""
    arguments, leaves = ALL_LINEAR[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **arguments)
    base = transformers.AutoModelForCausalLM.from_config(config)
    found = [target.name for target in choose_targets(adaptable_layers(meta_model(config)), "all-linear", 1)]
    assert {layer.rpartition(".")[2] for layer in found} == leaves
    model = adapt(base, Adapter(r=1), found, fused=False)
    ids = torch.arange(48).view(4, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    learning = {name: bool(weight.grad.any()) for name, weight in trainable_parameters(model) if "lora_B" in name}
    assert learning == {f"base_model.model.{layer}.lora_B.default.weight": True for layer in found}


@pytest.mark.parametrize("name", ["Cohere", "Bert"])
def test_a_tensor_that_is_no_layer_does_not_limit_the_rank(name: str, tmp_path: Path) -> None:
    """Command R+ has norms with a row for each head, BERT an embedding of two rows."""
    special = {"Cohere": {"use_qk_norm": True}, "Bert": {"is_decoder": True}}[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **SIZES, **special)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert stored_layers(tmp_path).keys() == adaptable_layers(meta_model(config)).keys()


def test_towers_for_images_are_not_adapted() -> None:
    config = transformers.GitConfig(vision_config=SIZES | {"image_size": 28, "patch_size": 14}, **SIZES)
    layers = adaptable_layers(meta_model(config))
    assert layers and all(name.startswith(("git.encoder.", "output")) for name in layers)
