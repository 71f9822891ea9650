"""Adapters of experts' parameters (PEFT's target_parameters), merged tensor by tensor for any layout in the base."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import done, edit_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

R, ALPHA = 2, 6.0
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
SIZES = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    # Stored in the model's own layout, (experts, in, out); PEFT takes Llama 4's for (experts, out, in):
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, head_dim=4, num_key_value_heads=2),
    "llama4": Llama4TextConfig(
        **SIZES, num_local_experts=3, num_experts_per_tok=1, head_dim=4, num_key_value_heads=2, intermediate_size_mlp=12
    ),
    # (experts, out, in):
    "granite": GraniteMoeConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, num_key_value_heads=2),
    # Experts stored one by one, gate and up apart, under other names; numbers above 9 do not sort as text:
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, num_key_value_heads=2),
    "qwen3": Qwen3MoeConfig(
        **SIZES, num_experts=12, num_experts_per_tok=2, head_dim=4, num_key_value_heads=2, moe_intermediate_size=8
    ),
    # In some layers only:
    "deepseek": DeepseekV3Config(**SIZES, num_experts_per_tok=2, num_key_value_heads=4, **LATENT, **ROUTED),
}
TURNED = {"gpt_oss"}
PLAIN = {"mixtral": "q_proj", "deepseek": "o_proj"}
"""The linear layer that is adapted besides the experts, if not q_proj."""


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a merge loads the complete model."""

    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded to merge")

    monkeypatch.setattr("lora_cli.weights.merge_in_memory.merge_in_memory", load)


def make_base(kind: str, tiny_llama: Path, folder: Path) -> Path:
    """Save a randomly initialized model with experts, and tiny_llama's tokenizer."""
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 1, **changes: Any) -> Path:
    """Save an adapter made by PEFT alone, with random values in every trained tensor."""
    wanted = LoraConfig(task_type="CAUSAL_LM", **{"r": R, "lora_alpha": ALPHA, **changes})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), wanted)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=draw))
    adapted.save_pretrained(str(folder))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's weights."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def delta(adapter: Path, stem: str, shape: torch.Size, scaling: float, turned: bool) -> torch.Tensor:
    """The stacked updates s B_e A_e of all experts. A_e is a block of A's rows, B_e every ``count``-th column of B."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{stem}.lora_{part}.weight"].double() for part in "AB")
    count = shape[0]
    rank = len(a) // count
    each = [scaling * b[:, e::count] @ a[e * rank : (e + 1) * rank] for e in range(count)]
    return torch.stack([update.T if turned else update for update in each])


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")  # PEFT only looks at modules
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_expert_gets_its_own(kind: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    base = make_base(kind, tiny_llama, tmp_path / "base")
    adapter = make_adapter(
        base,
        tmp_path / "adapter",
        target_modules=[PLAIN.get(kind, "q_proj")],
        target_parameters=[GATE_UP, DOWN],
        alpha_pattern={DOWN: 10.0},
    )
    report = done(lora("merge", adapter, "--out", tmp_path / "merged", "--json")).json
    assert not report["in_memory"] and report["verified"]
    found, wanted = stored(tmp_path / "merged"), stored(base)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in wanted.items()}
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "merged")
    )
    of_experts = [name for name in before if name.endswith((GATE_UP, DOWN))]
    assert report["modules"] == len(of_experts) + CONFIGS[kind].num_hidden_layers
    for name in of_experts:
        # PEFT wraps the module once for each parameter: the first of them is the innermost.
        module = name.rpartition(".")[0]
        stem, alpha = (f"{module}.base_layer", ALPHA) if name.endswith(GATE_UP) else (module, 10.0)
        update = delta(adapter, stem, before[name].shape, alpha / R, kind in TURNED)
        assert torch.allclose(after[name].double(), before[name].double() + update, rtol=0, atol=1e-6), name
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5)


def test_a_router_beside_its_experts(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """The router is a two-dimensional parameter, stored under another name than the model's."""
    base = make_base("mixtral", tiny_llama, tmp_path / "base")
    targets = {"target_modules": [], "target_parameters": ["mlp.gate.weight", DOWN], "use_rslora": True}
    adapter = make_adapter(base, tmp_path / "adapter", **targets)
    report = done(lora("merge", adapter, "--out", tmp_path / "merged", "--json")).json
    before, after = stored(base), stored(tmp_path / "merged")
    own = load_file(adapter / "adapter_model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        a, b = (own[f"base_model.model.model.layers.{layer}.mlp.gate.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(after[name], before[name] + ALPHA / math.sqrt(R) * b @ a, atol=1e-6)
    assert report["modules"] == 4
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"gate", "w2"}


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3"])
def test_several_add_up_and_quantize(kind: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    base = make_base(kind, tiny_llama, tmp_path / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": [GATE_UP]}
    first, second = (make_adapter(base, tmp_path / f"{seed}", seed, **targets) for seed in (1, 2))
    done(lora("merge", first, second, "--out", tmp_path / "both", "--no-verify"))
    before, after = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (base, tmp_path / "both"))
    for name in before:
        if name.endswith(GATE_UP):
            stem = name.rpartition(".")[0]
            updates = [delta(each, stem, before[name].shape, ALPHA / R, kind in TURNED) for each in (first, second)]
            assert torch.allclose(after[name].double(), before[name].double() + sum(updates), rtol=0, atol=1e-6)

    done(lora("merge", first, "--out", tmp_path / "one", "--no-verify"))
    done(lora("quantize", tmp_path / "one", "--out", tmp_path / "after"))
    done(lora("quantize", first, "--out", tmp_path / "in_one_pass"))
    found, wanted = stored(tmp_path / "in_one_pass"), stored(tmp_path / "after")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def damaged(adapter: Path, change: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "experts.lora_B" in name)
    match change:
        case "missing":
            tensors.pop(name)
            tensors.pop(name.replace("lora_B", "lora_A"))
        case "half":
            tensors.pop(name)
        case "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        case "more":
            edit_json(adapter / "adapter_config.json", target_parameters=[DOWN])
    save_file(tensors, file, {"format": "pt"})


def test_several_of_other_parameters_add_up_unverified(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """PEFT cannot run such adapters together, so their sum cannot be verified."""
    base = make_base("granite", tiny_llama, tmp_path / "base")
    one = make_adapter(base, tmp_path / "one", target_modules=[], target_parameters=[DOWN])
    other = make_adapter(base, tmp_path / "other", target_modules=[], target_parameters=[GATE_UP])
    refused = lora("merge", one, other, "--out", tmp_path / "merged")
    assert refused.exit_code == 2 and "--no-verify merges them" in refused.stderr, refused.stderr
    assert not (tmp_path / "merged").exists()
    done(lora("merge", one, other, "--out", tmp_path / "merged", "--no-verify"))
    before, after = stored(base), stored(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for adapter in (one, other):
        done(lora("merge", adapter, "--out", tmp_path / "alone" / adapter.name))
        alone = stored(tmp_path / "alone" / adapter.name)
        mine = {name for name in before if not torch.equal(before[name], alone[name])}
        assert mine and all(torch.equal(alone[name], after[name]) for name in mine)
        changed -= mine
    assert not changed


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("missing", "model.layers.0.mlp.experts.lora_A.weight is missing"),
        ("half", "model.layers.0.mlp.experts.lora_B"),
        ("shape", "[15, 24]"),
        ("more", "experts.base_layer.lora_A"),
    ],
)
def test_what_does_not_fit_is_refused(change: str, told: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    base = make_base("qwen3", tiny_llama, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN])
    damaged(adapter, change)
    result = lora("merge", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 2, result.stderr
    assert told in result.stderr and not (tmp_path / "merged").exists()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_factors_of_single_experts_are_told(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """PEFT wrote such factors for Transformers 4. It still reads them, and saves them in today's layout."""
    base = make_base("mixtral", tiny_llama, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "w1", "w2", "w3"])
    sizes, tensors = CONFIGS["mixtral"], load_file(adapter / "adapter_model.safetensors")
    for layer in range(sizes.num_hidden_layers):
        for expert in range(sizes.num_local_experts):
            for name in ("w1", "w2", "w3"):
                wide, narrow = sizes.hidden_size, sizes.intermediate_size
                into, out = (narrow, wide) if name == "w2" else (wide, narrow)
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = (
                    torch.ones(R, into),
                    torch.ones(out, R),
                )
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    result = lora("merge", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 2 and "has factors for each expert" in result.stderr, result.stderr

    anew = tmp_path / "anew"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).save_pretrained(str(anew))
    assert done(lora("merge", anew, "--out", tmp_path / "merged", "--json")).json["verified"]
