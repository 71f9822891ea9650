"""`lora quantize` writes, tensor by tensor, what Transformers writes from a complete model in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from conftest import done, edit_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lora_cli.cli.options import bytes_of
from lora_cli.recipe.schema import Quantization
from lora_cli.weights.codes import encode, nearest_levels

SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
CASES = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", True)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder. Asserts that its index names exactly these, and that no hidden file is left."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    found: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = load_file(file)
        if index.is_file():
            places = json.loads(index.read_text())["weight_map"]
            assert {name for name, place in places.items() if place == file.name} == tensors.keys()
        found |= tensors
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return found


def same_as_transformers(base: Path, out: Path, method: str, double_quant: bool, plain: Path) -> None:
    """Assert that ``out`` equals what from_pretrained and save_pretrained make of ``base``, written to ``plain``."""
    settings: dict[str, Any] = dict(SETTINGS[method])
    if method != "int8":
        settings |= {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_compute_dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(plain)
    found, wanted = tensors_of(out), tensors_of(plain)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert json.loads((out / "config.json").read_text()) == json.loads((plain / "config.json").read_text())


@pytest.mark.parametrize(("method", "double_quant"), CASES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_several_shards_in_and_out(
    name: str, method: str, double_quant: bool, request: Any, tmp_path: Path, lora: Any, no_model: None
) -> None:
    """GPT-2 has Conv1D layers, biases and a tied head, Llama none of these. Both are stored in bfloat16 shards here."""
    base = tmp_path / "base"
    tiny = request.getfixturevalue(f"tiny_{name}")
    shutil.copytree(tiny, base, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="30KB")
    flags = ["--method", method]
    if method != "int8":
        flags.append("--double-quant" if double_quant else "--no-double-quant")
    done(lora("quantize", base, "--out", tmp_path / "out", *flags, "--max-shard-size", "20KB"))
    assert len(list(base.glob("*.safetensors"))) > 2 and len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    for file in (tmp_path / "out").glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert 0 < sum(sizes) <= 20_000 or len(sizes) == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    total = sum(tensor.nbytes for shard in stored for tensor in shard.values())
    assert index["metadata"]["total_size"] == total
    same_as_transformers(base, tmp_path / "out", method, double_quant, tmp_path / "plain")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_names_without_the_bodys(tiny_gpt2: Path, tmp_path: Path, lora: Any, no_model: None) -> None:
    """Published GPT-2 checkpoints name transformer.h.0 h.0, and hold masks that the model no longer has."""
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tiny_gpt2).items()}
    save_file(weights | {"h.0.attn.masked_bias": torch.tensor(-1e4)}, base / "model.safetensors", {"format": "pt"})
    done(lora("quantize", base, "--out", tmp_path / "out"))
    same_as_transformers(base, tmp_path / "out", "nf4", True, tmp_path / "plain")


def test_a_name_with_the_bodys_that_the_model_has_without(
    tiny_llama: Path, tmp_path: Path, lora: Any, no_model: None
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = tensors_of(tiny_llama)
    weights["model.lm_head.weight"] = weights.pop("lm_head.weight")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    done(lora("quantize", base, "--out", tmp_path / "out"))
    same_as_transformers(base, tmp_path / "out", "nf4", True, tmp_path / "plain")


def with_head(base: Path, tiny_gpt2: Path, factor: float) -> Path:
    """A copy of GPT-2, whose head is tied, that also stores a head: the embedding times ``factor``."""
    shutil.copytree(tiny_gpt2, base)
    weights = tensors_of(tiny_gpt2)
    weights["lm_head.weight"] = factor * weights["transformer.wte.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base


def test_a_tied_head_that_is_stored_as_well(tiny_gpt2: Path, tmp_path: Path, lora: Any, no_model: None) -> None:
    base = with_head(tmp_path / "base", tiny_gpt2, 1.0)
    assert "in memory" not in done(lora("quantize", base, "--out", tmp_path / "out")).stderr
    same_as_transformers(base, tmp_path / "out", "nf4", True, tmp_path / "plain")


def test_a_tied_head_that_is_stored_as_another(tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    """Transformers takes such a head for an untied one."""
    base = with_head(tmp_path / "base", tiny_gpt2, 0.5)
    assert "whole model in memory" in done(lora("quantize", base, "--out", tmp_path / "out")).stderr
    assert not done(lora("quantize", base, "--out", tmp_path / "quiet", "--quiet")).stderr
    same_as_transformers(base, tmp_path / "out", "nf4", True, tmp_path / "plain")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_head_that_is_stored_by_another_name(
    tiny_llama: Path, method: str, tmp_path: Path, lora: Any, no_model: None
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=400, **sizes)).save_pretrained(base)
    assert "embed_out.weight" in tensors_of(base)
    assert "in memory" not in done(lora("quantize", base, "--out", tmp_path / "out", "--method", method)).stderr
    same_as_transformers(base, tmp_path / "out", method, True, tmp_path / "plain")


@pytest.mark.parametrize("told", ["bfloat16", "float16", None])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_type_is_the_one_that_transformers_loads(
    stored: torch.dtype, told: str | None, tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    """The dtype is config.json's, whatever the weights are stored in; without one there, it is the first tensor's."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = tensors_of(base)
    kept = torch.float32 if told is None else stored
    weights = {name: each.to(kept if each.dim() == 1 else stored) for name, each in weights.items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    edit_json(base / "config.json", dtype=told)
    done(lora("quantize", base, "--out", tmp_path / "out"))
    same_as_transformers(base, tmp_path / "out", "nf4", True, tmp_path / "plain")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_no_numbers_in_what_is_not_quantized(name: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = tensors_of(base)
    for value, dtype, told in ((float("nan"), "float32", "as float32"), (1e5, "float16", "as float16")):
        weights[name].view(-1)[3] = value
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        edit_json(base / "config.json", dtype=dtype)
        result = lora("quantize", base, "--out", tmp_path / "out")
        assert result.exit_code == 2 and f"tensor {name} holds NaN or infinity ({told})" in result.stderr
        assert not (tmp_path / "out").exists()


def mixtral(like: Path, folder: Path) -> Path:
    """A model whose experts Transformers joins while loading, with the tokenizer of the model in ``like``."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(vocab_size=400, **sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_experts_that_transformers_joins(tiny_llama: Path, method: str, tmp_path: Path, lora: Any) -> None:
    """The model's expert tensors are not the stored ones, and are not quantized. The attention is."""
    base = mixtral(tiny_llama, tmp_path / "base")
    result = done(lora("quantize", base, "--out", tmp_path / "out", "--method", method, "--json"))
    assert "whole model in memory" in result.stderr
    report = result.json
    assert report["in_experts"] == 2 * 3 * 32 * 32, "two experts of three matrices"
    told = done(lora("quantize", base, "--out", tmp_path / "again", "--method", method)).stdout
    assert "not quantized: 6,144 expert weights" in told
    assert len(report["layers"]) == 4
    same_as_transformers(base, tmp_path / "out", method, True, tmp_path / "plain")

    weights = tensors_of(base)
    name = next(name for name in weights if name.endswith("experts.1.w2.weight"))
    weights[name][3, 3] = float("inf")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    result = lora("quantize", base, "--out", tmp_path / "none", "--method", method)
    assert result.exit_code == 2 and f"tensor {name} holds NaN or infinity" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("method", "double_quant"), CASES)
@pytest.mark.parametrize("shape", [(1100, 1001), (1049, 1001), (2048, 1024), (3, 5)])
def test_pieces_make_the_whole(method: str, double_quant: bool, shape: tuple[int, int]) -> None:
    """A tensor encoded in pieces, the last block or byte incomplete, equals the result of one call of bitsandbytes."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    found = encode(weight, Quantization(method=method, double_quant=double_quant))
    if method == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        wanted = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        expanded = functional.int8_vectorwise_dequant(codes, scales)
    else:
        codes, state = functional.quantize_4bit(weight, compress_statistics=double_quant, quant_type=method)
        wanted = {"weight": codes} | {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        expanded = functional.dequantize_4bit(codes, state)
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found.tensors[name].shape == tensor.shape and torch.equal(found.tensors[name], tensor), name
    assert found.size == pytest.approx(float(weight.double().norm()), rel=1e-5)
    assert found.error == pytest.approx(float((expanded.double() - weight.double()).norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_numbers_on_the_edge(method: str, dtype: torch.dtype) -> None:
    """Values halfway between levels, a block of zeros, one too small to divide by, an incomplete block and byte."""
    levels = functional.get_4bit_type(method, device="cpu").sort().values
    middles = (levels[1:] + levels[:-1]) / 2
    numbers = torch.zeros(64 * 4 + 7)
    numbers[:16], numbers[16:31], numbers[31:47] = levels, middles, torch.nextafter(levels, torch.tensor(9.0))
    numbers[64:79], numbers[79] = -middles, 1
    numbers[128:192:3] = 1e-42
    numbers[-7:] = middles[4:11] * 3
    incomplete = [most * torch.cat((middles, torch.ones(1))) for most in (3, 7, 0.1)]
    for each in (numbers.to(dtype), torch.zeros(64 + 7, dtype=dtype), *(block.to(dtype) for block in incomplete)):
        codes, scales = nearest_levels(each, method)
        wanted, state = functional.quantize_4bit(each, blocksize=64, quant_type=method)
        assert torch.equal(codes, wanted) and torch.equal(scales, state.absmax)


def test_tensors_lie_where_their_types_may(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """Readers map the file into memory: a misaligned float is an error in some, and slow in others."""
    done(lora("quantize", tiny_llama, "--out", tmp_path / "out"))
    file = tmp_path / "out" / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    with safe_open(file, framework="pt") as shard:
        for name, entry in header.items():
            assert (8 + length + entry["data_offsets"][0]) % shard.get_tensor(name).itemsize == 0, name


@pytest.mark.parametrize(
    ("size", "count"), [("1000", 1000), ("64KB", 64_000), ("500MB", 500_000_000), ("5GB", 5_000_000_000)]
)
def test_a_size_of_a_shard_is_in_decimal_units(size: str, count: int) -> None:
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", ["5 GB", "0", "-1MB", "5GiB", "half"])
def test_no_size_of_a_shard(size: str, tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    result = lora("quantize", tiny_gpt2, "--out", tmp_path / "out", "--max-shard-size", size)
    assert result.exit_code == 2
    assert "--max-shard-size" in result.stderr and not (tmp_path / "out").exists()
