"""`lora quantize` of runs and adapters, and with ``--skip``: the same files as from merging first, or Transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import done, edit_json
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_streaming import mixtral, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, BloomConfig, BloomForCausalLM
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from lora_cli.model.base import load_base
from lora_cli.model.linear4bit import takes_wrong_scales
from lora_cli.recipe.schema import Model, Quantization

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def make_adapter(base: Path, out: Path, kind: str = "lora", **config: Any) -> Path:
    """An adapter made by PEFT alone, with an update that is not zero."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4} | config
    adapted = get_peft_model(model, LoHaConfig(**settings) if kind == "loha" else LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "magnitude" not in name:
                weight.add_(0.1 * torch.randn(weight.shape))
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    return out


def merged_then_quantized(lora: Any, target: Path, folder: Path, *flags: str) -> Path:
    done(lora("merge", target, "--out", folder / "merged", "--no-verify"))
    done(lora("quantize", folder / "merged", "--out", folder / "two-steps", *flags))
    return folder / "two-steps"


def same_files(found: Path, wanted: Path) -> None:
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in wanted.iterdir())
    for path in wanted.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_not_quantized_is_stored_as_transformers_loads_it(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    edit_json(base / "config.json", dtype="bfloat16")  # the file's tensors are float32
    done(lora("quantize", base, "--out", tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(base).state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.norm.weight", "lm_head.weight"):
        assert stored[name].dtype == torch.bfloat16 and torch.equal(stored[name], loaded[name])


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("base_name", ["gpt2", "llama"])
def test_an_adapter_is_merged_in_the_same_pass(
    base_name: str, method: str, request: Any, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = request.getfixturevalue(f"tiny_{base_name}")
    use_dora = base_name == "llama"
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=use_dora, use_rslora=True, fan_in_fan_out=not use_dora)
    wanted = merged_then_quantized(lora, adapter, tmp_path, "--method", method)

    def no_merge(*_: Any) -> None:
        raise AssertionError("a merged model was written")

    monkeypatch.setattr("lora_cli.weights.quantize.merge", no_merge)
    report = done(lora("quantize", adapter, "--out", tmp_path / "out", "--method", method, "--json")).json
    same_files(tmp_path / "out", wanted)
    assert (report["adapter"], report["base"]) == (str(adapter), str(base))
    alone = done(lora("quantize", base, "--out", tmp_path / "plain", "--method", method, "--json")).json
    assert report["layers"].keys() == alone["layers"].keys() and report["layers"] != alone["layers"]


def test_an_adapter_is_told_with_its_base_and_nothing_is_written_into_it(
    tiny_gpt2: Path, tmp_path: Path, lora: Any
) -> None:
    adapter = make_adapter(tiny_gpt2, tmp_path / "adapter", fan_in_fan_out=True)
    files = sorted(adapter.iterdir())
    for out in (adapter / "small", tiny_gpt2 / "small"):
        refused = lora("quantize", adapter, "--out", out)
        assert refused.exit_code == 2 and f"is inside {out.parent}, from which it is made" in refused.stderr
    assert sorted(adapter.iterdir()) == files
    text = done(lora("quantize", adapter, "--out", tmp_path / "out")).stdout.splitlines()
    assert text[0] == f"merged {adapter} into {tiny_gpt2}" and text[1].startswith(f"{tmp_path / 'out'}: ")


@pytest.mark.parametrize("trained_on", [None, {"method": "nf4", "compute_dtype": "float32"}])
def test_a_runs_adapter_is_merged_as_lora_merge_does_and_quantized(
    trained_on: dict[str, str] | None, train: Any, qa_file: Path, tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    """An adapter trained on a quantized base is merged into the dequantized base, as by ``lora merge``."""
    changes = {"model.name_or_path": tiny_llama, "adapter.target_modules": "all-linear"}
    run = train(changes | ({"quantization": trained_on} if trained_on else {}))
    wanted = merged_then_quantized(lora, run.folder, tmp_path)
    told = ["--data", qa_file, "--max-shard-size", "20KB", "--json"]
    report = done(lora("quantize", run.folder, "--out", tmp_path / "out", *told)).json
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found, expected = tensors_of(tmp_path / "out"), tensors_of(wanted)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for key, target in (("before", run.folder), ("after", tmp_path / "out")):
        alone = done(lora("eval", target, "--data", qa_file, "--json")).json
        assert report[key]["tokens"] == alone["tokens"]
        assert report[key]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_is_measured_as_eval_does(
    dtype: str, train: Any, qa_file: Path, tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    """Both use the dtype that the adapter was trained in, whichever dtype this machine would choose."""
    run, merged = train({"model.name_or_path": tiny_llama, "model.dtype": dtype}), tmp_path / "merged"
    done(lora("merge", run.folder, "--out", merged, "--no-verify"))
    report = done(lora("quantize", merged, "--out", tmp_path / "out", "--data", qa_file, "--json")).json
    for key, folder in (("before", merged), ("after", tmp_path / "out")):
        alone = done(lora("eval", folder, "--data", qa_file, "--json")).json
        assert report[key] == {name: alone[name] for name in ("loss", "perplexity", "tokens")}


def test_a_grown_vocabulary(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """The tokens that an adapter adds bring their embedding rows, config.json's ``vocab_size`` and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tiny_llama))
    wanted = merged_then_quantized(lora, tmp_path / "adapter", tmp_path)
    done(lora("quantize", tmp_path / "adapter", "--out", tmp_path / "out"))
    same_files(tmp_path / "out", wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(tokenizer)


@pytest.mark.parametrize("case", ["another kind", "experts"])
def test_what_needs_a_model_in_memory(case: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    base, kind = (mixtral(tiny_llama, tmp_path / "base"), "lora") if case == "experts" else (tiny_llama, "loha")
    adapter = make_adapter(base, tmp_path / "adapter", kind, target_modules=["q_proj", "v_proj"])
    wanted = merged_then_quantized(lora, adapter, tmp_path)
    (tmp_path / "made").mkdir()
    done(lora("quantize", adapter, "--out", tmp_path / "made" / "out"))
    same_files(tmp_path / "made" / "out", wanted)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("skip", "names"),
    [
        (["--skip", "o_proj, down_proj"], ["o_proj", "down_proj"]),
        (["--skip", "o_proj", "--skip", r"model\.layers\.1"], ["o_proj", r"model\.layers\.1"]),
    ],
)
@pytest.mark.parametrize("settings", [NF4, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_skipped_modules_stay_as_they_are(
    settings: dict[str, Any], skip: list[str], names: list[str], tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    method = "nf4" if "load_in_4bit" in settings else "int8"
    report = done(lora("quantize", tiny_llama, "--out", tmp_path / "out", "--method", method, *skip, "--json")).json
    compute = {"bnb_4bit_compute_dtype": torch.bfloat16} if method == "nf4" else {}
    config = BitsAndBytesConfig(**settings, **compute, llm_int8_skip_modules=sorted([*names, "lm_head"]))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    model.save_pretrained(tmp_path / "plain")
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in found)
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("out", "plain")]
    assert configs[0] == configs[1]
    assert (
        "model.layers.0.self_attn.q_proj" in report["layers"]
        and "model.layers.0.self_attn.o_proj" not in report["layers"]
    )
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("base_name", "skip", "told"),
    [("joined", [], "could not be loaded again"), ("tiny_llama", ["--skip", "q_prj"], "did you mean 'q_proj'?")],
)
def test_what_cannot_be_quantized_is_told_before_a_model_is_merged(
    base_name: str,
    skip: list[str],
    told: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    lora: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = request.getfixturevalue(base_name)
    adapter = make_adapter(base, tmp_path / "adapter", "loha", target_modules=["q_proj"])
    monkeypatch.setattr("lora_cli.weights.quantize.merge", None)
    result = lora("quantize", adapter, "--out", tmp_path / "out", *skip)
    assert result.exit_code == 2 and told in result.stderr and not (tmp_path / "out").exists()


def test_a_tied_head_stays_when_others_are_skipped(tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    done(lora("quantize", tiny_gpt2, "--out", tmp_path / "out", "--skip", "c_fc"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert model.lm_head.weight.is_floating_point()


@pytest.mark.parametrize(
    ("skip", "told"),
    [
        ("q_proj,", "a name is empty"),
        ("(", "neither a name nor a regular expression"),
        ("lm_head", "no layer that would be quantized"),
        ("model", "no layer is left"),
    ],
)
def test_what_cannot_be_skipped(skip: str, told: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    result = lora("quantize", tiny_llama, "--out", tmp_path / "out", "--skip", skip)
    assert result.exit_code == 2
    assert told in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("has_units", "dtype", "expected"),
    [
        (True, torch.float32, torch.bfloat16),
        (False, torch.float32, torch.float32),
        (False, torch.float16, torch.float16),
    ],
)
def test_a_base_to_be_sharded_over_gpus_computes_as_they_can(
    has_units: bool, dtype: torch.dtype, expected: torch.dtype, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded into host memory. The compute dtype is the GPUs', even if the CPU has no 16-bit units."""
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_units or including_emulation)
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr("lora_cli.model.base.best_device", lambda: torch.device("cuda"))
    quantization, device = Quantization(method="nf4"), torch.device("cpu")
    base = load_base(tiny_llama, Model(name_or_path=str(tiny_llama)), quantization, device, dtype, sharded=True)
    assert {layer.compute_dtype for layer in base.modules() if isinstance(layer, Linear4bit)} == {expected}
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not takes_wrong_scales(), reason="bitsandbytes expands rightly on this processor")
def test_norms_of_a_base_to_be_sharded_over_gpus_are_taken_in_host_memory(
    tokenizer: Any, write_recipe: Any, lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes dequantizes rows of 96 values correctly on a GPU, but these norms are taken on the CPU."""
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=96, n_layer=1, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    monkeypatch.setattr("lora_cli.model.device.best_device", lambda: torch.device("cuda"))
    changes = {"model": {"name_or_path": tmp_path / "bloom", "dtype": "float32"}, "quantization": {"method": "nf4"}}
    result = lora("train", write_recipe(changes | {"adapter.use_dora": True, "training.fsdp": True}))
    assert result.exit_code == 2
    assert "dequantizes 4-bit weights wrongly on this CPU" in result.stderr


def test_a_base_stored_in_4_bits_is_sharded_from_host_memory(
    tiny_llama: Path, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a device map, Transformers loads the complete base onto each GPU, here replaced by the meta device."""
    done(lora("quantize", tiny_llama, "--out", tmp_path / "nf4"))
    monkeypatch.setattr(Bnb4BitHfQuantizer, "update_device_map", lambda _, told: told or {"": "meta"})
    model, device = Model(name_or_path=str(tmp_path / "nf4")), torch.device("cpu")
    base = load_base(tmp_path / "nf4", model, None, device, torch.float32, sharded=True)
    stored = load_file(tmp_path / "nf4" / "model.safetensors")
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.float32, "of which torch makes shards"
        assert torch.equal(layer.weight.data.view(-1).view(torch.uint8), stored[f"{name}.weight"].view(-1))
