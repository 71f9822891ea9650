"""`lora merge --verify`: a correct merge passes however little survives rounding; a wrong merge leaves no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import done, edited_weights
from made_adapters import in_dtype, make_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_cli.weights.adapter import products


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 0.02, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_right_merges_pass(
    name: str, dtype: torch.dtype, noise: float, request: Any, tmp_path: Path, lora: Any
) -> None:
    base = in_dtype(request.getfixturevalue(f"tiny_{name}"), dtype, tmp_path / "base")
    adapter = make_adapter(name, base, tmp_path / "adapter", noise=noise, use_dora=noise == 0.02)
    found = done(lora("merge", adapter, "--out", tmp_path / "out", "--json")).json["verified"]
    assert found["merged"]["relative"] <= found["rounding"] + 1e-5 + 0.05 * max(found["moved"], found["rounding"])
    if dtype == torch.bfloat16 and noise < 1e-5:  # a norm in float32, which is not rounded
        with edited_weights(base) as weights:
            norm = next(name for name in weights if name.endswith(("ln_f.weight", "model.norm.weight")))
            weights[norm] = 1.003 * weights[norm].float()
        done(lora("merge", adapter, "--out", tmp_path / "mixed"))
    if noise > 1e-5:
        assert (found["rounding"] < 1e-5) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_wrong_merges_leave_nothing(
    name: str, dtype: torch.dtype, request: Any, tmp_path: Path, lora: Any, monkeypatch: Any
) -> None:
    base = in_dtype(request.getfixturevalue(f"tiny_{name}"), dtype, tmp_path / "base")
    adapter = make_adapter(name, base, tmp_path / "adapter", noise=0.004)
    moved = done(lora("merge", adapter, "--out", tmp_path / "right", "--json")).json["verified"]["moved"]
    assert 0.01 < moved < 0.1
    right, before = products.scaling_of, sorted(tmp_path.iterdir())
    for factor in (0.0, 0.5, 1.1, 2.0):
        monkeypatch.setattr(products, "scaling_of", lambda *given, factor=factor: factor * right(*given))
        result = lora("merge", adapter, "--out", tmp_path / "wrong")
        assert result.exit_code == 4, f"times {factor}: {result.stdout}"
        assert "more than rounding to" in result.stderr and "nothing was written" in result.stderr
        assert sorted(tmp_path.iterdir()) == before


def test_the_base_is_quantized_from_what_training_saw(
    tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    """The base is stored in float32 and trained on in bfloat16: the adapter fits the 4-bit codes of rounded weights."""
    recipe = write_recipe(
        model={"name_or_path": str(tiny_llama), "dtype": "bfloat16"},
        quantization={"method": "nf4", "compute_dtype": "float32"},
        adapter={"target_modules": "all-linear"},
    )
    done(lora("train", recipe))
    rows = tmp_path / "rows.txt"
    rows.write_text("The first row of several words, which is a long one.\n")
    given = ("merge", tmp_path / "run", "--out", tmp_path / "out", "--data", rows, "--json")
    found = done(lora(*given)).json["verified"]

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=torch.bfloat16)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    ids = torch.tensor([[*tokenizer(rows.read_text().strip()).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).exp()
    assert found["apart"] == pytest.approx(float(wanted), rel=1e-5)
