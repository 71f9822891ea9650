"""`lora merge`: the folder that it writes holds W + scale * BA, and any program can load it."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from conftest import WIDTH, Base, done, edit_json, edited_weights, weights_of
from made_adapters import ALL_LINEAR, ALPHA, R, answers, in_dtype, logits, make_adapter
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from reference import distance
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)

from lora_cli.model.base import meta_model
from lora_cli.weights import merge
from lora_cli.weights.adapter import expected_tensors
from lora_cli.weights.adapter.origin import find_origin

GEMMA_3 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
GEMMA_3 |= {"num_key_value_heads": 2, "sliding_window": 32, "max_position_embeddings": 64}
SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT |= {"image_size": 28, "patch_size": 14}
PICTURES = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
EXPLICIT_BITS = {torch.float32: 23, torch.bfloat16: 7}


def stored_name(module: str, weights: dict[str, torch.Tensor]) -> str:
    """The name of a module's weight on disk; GPT-2 checkpoints may leave `transformer.` out."""
    return next(
        name for name in (f"{module}.weight", f"{module.removeprefix('transformer.')}.weight") if name in weights
    )


def expected(
    name: str, weights: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], scale: float, dora: bool
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each adapted tensor's merged value in float64, and the magnitude of its terms, which bounds rounding errors."""
    found = {}
    for key in adapter:
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = adapter[key].double(), adapter[key.replace("lora_A", "lora_B")].double()
        stored = stored_name(module, weights)
        weight = weights[stored].double()
        weight = weight.T if name == "gpt2" else weight
        total, size = weight + scale * (b @ a), weight.abs() + scale * (b.abs() @ a.abs())
        if dora:
            magnitude = adapter[key.replace("lora_A.weight", "lora_magnitude_vector")].double()
            factor = (magnitude / total.norm(dim=1))[:, None]
            total, size = factor * total, 4 * factor * size
        found[stored] = (total.T, size.T) if name == "gpt2" else (total, size)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_merged_weights_are_the_sum(base: Base, kind: str, dtype: torch.dtype, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    folder = in_dtype(folder, dtype, tmp_path / "base")
    adapter = make_adapter(name, folder, tmp_path / "adapter", use_rslora=kind == "rslora", use_dora=kind == "dora")
    out = tmp_path / "merged"
    done(lora("merge", adapter, "--out", out))

    before, after = weights_of(folder), weights_of(out)
    scale = ALPHA / math.sqrt(R) if kind == "rslora" else ALPHA / R
    wanted = expected(name, before, load_file(adapter / "adapter_model.safetensors"), scale, kind == "dora")
    assert before.keys() == after.keys()
    assert len(wanted) == sum(any(f".{leaf}.weight" in key for leaf in ALL_LINEAR[name]) for key in before)
    for key, weight in after.items():
        assert weight.dtype == dtype
        if key not in wanted:
            assert torch.equal(weight, before[key]), key
            continue
        exact, size = wanted[key]
        assert distance(exact, before[key].double()) > 0.01, "the adapter must change something"
        # One rounding to the dtype, after the rounding of r + 3 operations in float32.
        half_ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - EXPLICIT_BITS[dtype] - 1)
        assert ((weight.double() - exact).abs() <= half_ulp + (R + 3) * 2.0**-24 * size).all(), key
        if dtype == torch.bfloat16:
            assert (weight == exact.to(dtype)).double().mean() > 0.999


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_any_program_loads_the_merged_model(base: Base, kind: str, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    adapter = make_adapter(name, folder, tmp_path / "adapter", use_rslora=kind == "rslora", use_dora=kind == "dora")
    done(lora("merge", adapter, "--out", tmp_path / "merged"))

    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    adapted = answers(folder, adapter)
    assert distance(answers(tmp_path / "merged"), adapted) < 1e-5
    assert distance(answers(folder), adapted) > 0.01
    assert plain.config.use_cache


def test_the_folder_is_a_whole_model(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    generation = {"eos_token_id": [0, 2], "max_new_tokens": 7, "transformers_version": "5.0.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    adapter = make_adapter("llama", folder, tmp_path / "adapter")
    report = done(lora("merge", adapter, "--out", tmp_path / "merged", "--json")).json

    out = tmp_path / "merged"
    kept = json.loads((out / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["max_new_tokens"]) == ([0, 2], 7)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    assert after.get_vocab() == before.get_vocab()
    assert after.eos_token == before.eos_token
    assert after.chat_template == before.chat_template
    assert report["out"] == str(out)
    assert report["modules"] == 14
    assert report["dtype"] == "float32"
    assert report["bytes"] == (out / "model.safetensors").stat().st_size
    assert oct(out.stat().st_mode & 0o777) == oct(folder.stat().st_mode & 0o777), "readable by whom a new folder is"


def test_a_template_changed_for_training_travels(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(adapter)
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


@pytest.fixture
def trained_in_4_bits(base: Base, tmp_path: Path, write_recipe: Any, lora: Any, no_curves: None) -> Callable[..., Path]:
    """Train an adapter on the base in NF4 and return the run's folder."""

    def train(**quantization: Any) -> Path:
        recipe = write_recipe(
            model={"name_or_path": str(base[1])},
            quantization={"method": "nf4", **quantization},
            adapter={"target_modules": "all-linear"},
            training={"learning_rate": 0.02, "warmup_steps": 0},
        )
        done(lora("train", recipe))
        return tmp_path / "run"

    return train


def in_4_bits(folder: Path, double_quant: bool, compute: torch.dtype) -> Any:
    """Load the model as QLoRA's own scripts do."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
    )
    return unpacked(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32))


def unpacked(model: Any) -> Any:
    """Stop bitsandbytes from repacking the 4-bit weights in an evaluation pass on CPUs with AVX512."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_an_adapter_of_a_4_bit_base_merges_into_what_it_saw(
    base: Base, compute: str, trained_in_4_bits: Callable[..., Path], tmp_path: Path, lora: Any
) -> None:
    _, folder = base
    run = trained_in_4_bits(compute_dtype=compute)
    report = done(lora("merge", run, "--out", tmp_path / "merged", "--json")).json
    assert "nf4" in report["into"]

    model = PeftModel.from_pretrained(in_4_bits(folder, True, getattr(torch, compute)), str(run / "adapter"))
    seen = logits(model, AutoTokenizer.from_pretrained(folder))
    error = distance(answers(tmp_path / "merged"), seen)
    assert error < (1e-5 if compute == "float32" else 0.02)
    assert error < distance(answers(folder, run / "adapter"), seen) / 3
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_4_bit_merge_against_the_plain_quantizer(
    base: Base, trained_in_4_bits: Callable[..., Path], tmp_path: Path, lora: Any
) -> None:
    name, folder = base
    run = trained_in_4_bits(double_quant=False)
    done(lora("merge", run, "--out", tmp_path / "merged"))

    before, after = weights_of(folder), weights_of(tmp_path / "merged")
    seen = {}
    for key, weight in before.items():
        linear = any(f".{leaf}.weight" in key for leaf in ALL_LINEAR[name])
        turned = weight.T.contiguous() if linear and name == "gpt2" else weight
        rounded = reference.nf4_dequantize(*reference.nf4_codes(turned), turned.shape) if linear else weight
        seen[key] = rounded.T.contiguous() if linear and name == "gpt2" else rounded
    wanted = expected(name, seen, load_file(run / "adapter" / "adapter_model.safetensors"), 8 / R, False)
    assert before.keys() == after.keys()
    for key, weight in after.items():
        exact, size = wanted.get(key, (seen[key].double(), seen[key].double().abs()))
        assert ((weight.double() - exact).abs() <= 1e-6 * size.amax()).all(), key


def test_the_folder_that_a_command_is_run_in_is_not_replaced(
    tiny_gpt2: Path, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, place = make_adapter("gpt2", tiny_gpt2, tmp_path / "adapter"), tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    for out in (Path(), place):
        refused = lora("adapters", "resize", adapter, "--rank", "2", "--out", out)
        assert refused.exit_code == 2 and "is the folder that the command is run in" in refused.stderr
    done(lora("adapters", "resize", adapter, "--rank", "2", "--out", "out"))
    assert [path.name for path in Path().iterdir()] == ["out"]
    (tmp_path / "elsewhere").mkdir()
    Path("link").symlink_to("../elsewhere")
    done(lora("adapters", "resize", adapter, "--rank", "2", "--out", "link"))
    assert Path("link").is_symlink() and (tmp_path / "elsewhere" / "adapter_config.json").is_file()


def test_a_run_or_its_adapter_folder_give_the_same(
    tmp_path: Path, write_recipe: Any, lora: Any, no_curves: None
) -> None:
    done(lora("train", write_recipe(training__max_steps=1)))
    done(lora("merge", tmp_path / "run", "--out", tmp_path / "a", "--no-verify"))
    done(lora("merge", tmp_path / "run" / "adapter", "--out", tmp_path / "b", "--no-verify"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_failure_while_writing_leaves_nothing(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    adapter = make_adapter("gpt2", tiny_gpt2, tmp_path / "adapter")
    before = sorted(tmp_path.rglob("*"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        result = lora("merge", adapter, "--out", tmp_path / "merged")
    assert result.exit_code != 0
    needed = sum(tensor.nbytes for tensor in weights_of(tiny_gpt2).values())
    assert f"No space left on device ({needed:,} bytes are needed" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["merge", "train"])
def test_weights_that_the_disk_does_not_give_are_told_by_their_file(
    verb: str, tiny_gpt2: Path, tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    """The system's error for a failing read names no file, and a merge writes another one at that time."""
    base = Path(shutil.copytree(tiny_gpt2, tmp_path / "base"))  # which no other test's command has read
    adapter, weights = make_adapter("gpt2", base, tmp_path / "adapter"), base / "model.safetensors"
    recipe = write_recipe({"model.name_or_path": base})
    command = ("merge", adapter, "--out", tmp_path / "merged") if verb == "merge" else ("train", recipe)
    before, unchanged = sorted(tmp_path.rglob("*")), Path.open

    class Failing(io.FileIO):
        def seek(self, *_: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def failing(path: Path, *how: Any, **more: Any) -> Any:
        return Failing(path) if path == weights else unchanged(path, *how, **more)

    monkeypatch.setattr(Path, "open", failing)
    result = lora(*command)
    assert result.exit_code == 3, result.stderr
    assert f"error: {weights}: could not be read: Input/output error" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


OF_ADAPTER = ("adapter_config.json", "provenance.json")


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", *OF_ADAPTER],
)
def test_a_file_that_the_system_cannot_read_is_not_told_as_damaged(
    name: str, tiny_gpt2: Path, tmp_path: Path, lora: Any, write_recipe: Any
) -> None:
    base, adapter = shutil.copytree(tiny_gpt2, tmp_path / "base"), tmp_path / "found" / "adapter"
    of_adapter = name in OF_ADAPTER
    if of_adapter:
        make_adapter("gpt2", base, adapter)
    if name.endswith(".index.json"):
        (base / "model.safetensors").unlink()
    file = (adapter if of_adapter else base) / name
    file.unlink(missing_ok=True)
    file.symlink_to("/proc/self/mem")  # nothing is mapped at address 0, so that the system fails the read
    recipe = write_recipe({"model.name_or_path": base})
    result = lora(*(("merge", adapter, "--out", tmp_path / "out") if of_adapter else ("train", recipe)))
    assert result.exit_code == 3, result.stderr
    told = file.parent if name == "tokenizer.json" else file
    assert f"error: {told}: could not be read: Input/output error\n    files that were complete" in result.stderr
    if name == "adapter_config.json":
        make_adapter("gpt2", base, tmp_path / "found" / "other")
        listed = done(lora("adapters", "list", tmp_path / "found", "--json")).json
        assert [entry["path"] for entry in listed["adapters"]] == [str(tmp_path / "found" / "other")]
        assert [str(file) in told for told in listed["warnings"]] == [True]


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(
    tiny_llama: Path, tmp_path: Path, lora: Any, monkeypatch: Any
) -> None:
    """All files and their folder are synced before ``out`` exists, then the folder that holds its name."""
    adapter, out = make_adapter("llama", tiny_llama, tmp_path / "adapter"), tmp_path / "merged"
    synced: list[tuple[Path, bool]] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        sync(handle)
        synced.append((Path(f"/proc/self/fd/{handle}").readlink(), out.exists()))

    monkeypatch.setattr(os, "fsync", noted)
    done(lora("merge", adapter, "--out", out, "--no-verify"))
    before = [path for path, stands in synced if not stands]
    assert {path.name for path in before if path.suffix != ".draft"} == {path.name for path in out.iterdir()}
    assert any(path.suffix == ".draft" for path in before)
    assert [path for path, stands in synced if stands] == [tmp_path]


def test_a_base_stored_quantized_is_refused(tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any) -> None:
    done(lora("quantize", tiny_llama, "--out", tmp_path / "small"))
    done(lora("train", write_recipe({"model.name_or_path": tmp_path / "small"})))
    result = lora("merge", tmp_path / "run", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "stored quantized (bitsandbytes)" in result.stderr and "quantization.method" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"0.mlp.down_proj": 5}, "alpha_pattern": {"layers.1.*": 3.0}},
        {"init_lora_weights": "Gaussian"},
        {"use_dora": True, "alpha_pattern": {"q_proj": 1.5}},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=["plain", "patterns", "start", "dora", "norms", "head", "embedding", "tokens"],
)
def test_to_the_bit_what_peft_merges(config: dict[str, Any], tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """The base has several shards. PEFT itself merges what is not a plain product."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    adapter = make_adapter("llama", folder, tmp_path / "adapter", **config)
    done(lora("merge", adapter, "--out", tmp_path / "merged"))

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def test_a_layers_number_is_not_the_end_of_another(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """In a model of twelve layers, patterns for layer 1 do not apply to layer 11."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"num_hidden_layers": 12, "hidden_size": 16, "intermediate_size": 8}
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama, **sizes)).save_pretrained(folder)
    own = {"rank_pattern": {"1.self_attn.q_proj": 2}, "alpha_pattern": {"1.self_attn.q_proj": 12.0}}
    adapter = make_adapter("llama", folder, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **own)
    report = done(lora("merge", adapter, "--out", tmp_path / "merged", "--no-verify", "--json")).json
    assert report["modules"] == 24
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_an_embedding_of_positions_has_no_words(tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    adapter = make_adapter("gpt2", tiny_gpt2, tmp_path / "adapter", modules_to_save=["wpe"])
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert found.config.vocab_size == base.config.vocab_size
    assert torch.equal(found.state_dict()["transformer.wpe.weight"], wanted["transformer.wpe.weight"])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_are_those_of_the_result(
    bias: str, tiny_gpt2: Path, tmp_path: Path, lora: Any, no_model: None
) -> None:
    adapter = make_adapter("gpt2", tiny_gpt2, tmp_path / "adapter", bias=bias)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    biases = [name for name in tensors if name.endswith("bias")]
    for number, name in enumerate(biases):
        tensors[name] = tensors[name] + 0.1 * (number + 1)
    save_file(tensors, file, {"format": "pt"})
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    before, after = weights_of(tiny_gpt2), weights_of(tmp_path / "merged")
    taken = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensors[name] for name in biases}
    assert len(taken) == (13 if bias == "all" else 8)
    for name in (name for name in before if name.endswith("bias")):
        assert torch.equal(after[name], taken.get(name, before[name])), name
        assert (name in taken) != torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"modules_to_save": ["norm", "lm_head"]}, {"bias": "all"}])
def test_no_model_is_loaded(config: dict[str, Any], base: Base, tmp_path: Path, lora: Any, no_model: None) -> None:
    name, folder = base
    if name == "gpt2":
        config = {key: value for key, value in config.items() if key != "modules_to_save"}
    adapter = make_adapter(name, folder, tmp_path / "adapter", **config)
    done(lora("merge", adapter, "--out", tmp_path / "merged"))


def test_two_adapters_add_up(base: Base, tmp_path: Path, lora: Any, no_model: None) -> None:
    name, folder = base
    first = make_adapter(name, folder, tmp_path / "first")
    second = make_adapter(name, folder, tmp_path / "second", use_rslora=True)
    done(lora("merge", first, second, "--out", tmp_path / "merged"))
    before, after = weights_of(folder), weights_of(tmp_path / "merged")
    sums = [
        expected(name, before, load_file(adapter / "adapter_model.safetensors"), scale, False)
        for adapter, scale in ((first, ALPHA / R), (second, ALPHA / math.sqrt(R)))
    ]
    for key, (once, size) in sums[0].items():
        wanted = once + sums[1][key][0] - before[key].double()
        assert ((after[key].double() - wanted).abs() <= 4 * 2.0**-23 * (size + sums[1][key][1])).all(), key


def test_adapters_that_cannot_be_added_are_refused(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    first = make_adapter("llama", tiny_llama, tmp_path / "first")
    norms = make_adapter("llama", tiny_llama, tmp_path / "norms", modules_to_save=["norm"])
    dora = make_adapter("llama", tiny_llama, tmp_path / "dora", use_dora=True)
    out = tmp_path / "merged"
    for second, told in ((norms, "plain LoRA"), (dora, "plain LoRA"), (first, "given twice")):
        result = lora("merge", first, second, "--out", out)
        assert result.exit_code == 2 and told in result.stderr, result.stderr
    again = make_adapter("llama", tiny_llama, tmp_path / "again")
    result = lora("merge", first, again, again.parent / "first/../again", "--out", out)
    assert result.exit_code == 2 and "given twice" in result.stderr, result.stderr
    other = in_dtype(tiny_llama, torch.bfloat16, tmp_path / "other")
    third = make_adapter("llama", other, tmp_path / "third")
    result = lora("merge", first, third, "--out", out)
    assert result.exit_code == 2 and "another base" in result.stderr
    assert not out.exists()
    twin = make_adapter("llama", shutil.copytree(tiny_llama, tmp_path / "twin"), tmp_path / "fourth")
    done(lora("merge", first, twin, "--out", out, "--no-verify"))


def test_into_is_for_a_quantized_base_and_quantized_for_one_adapter(
    train: Callable[..., Any], tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    out = tmp_path / "merged"
    plain = make_adapter("llama", tiny_llama, tmp_path / "plain")
    for into in ("expanded", "original", "quantized"):
        result = lora("merge", plain, "--into", into, "--out", out)
        assert result.exit_code == 2 and f"{plain}: --into {into}: " in result.stderr, result.stderr
        assert "remove --into" in result.stderr
    small = train({"training.max_steps": 1, "quantization": {"method": "nf4"}}).folder
    shutil.copytree(small / "adapter", tmp_path / "second")
    for more in ([tmp_path / "second"], ["--dtype", "float32"]):
        result = lora("merge", small, *more, "--into", "quantized", "--out", out, "--no-verify")
        assert result.exit_code == 2 and "--into quantized takes a single adapter" in result.stderr, result.stderr
    assert not out.exists()
    told = done(lora("merge", small, "--into", "quantized", "--out", out, "--no-verify")).stdout
    assert "merged 4 layers into the base in nf4" in told, told  # not all 8 that were quantized


@pytest.mark.parametrize(("layers", "more"), [(5, 0), (6, 1), (14, 9)])
def test_of_many_faults_of_one_kind_five_are_told(
    layers: int, more: int, tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    """Each layer has rank R, the configuration states another. The hint is printed once, with the number of others."""
    leaves = ALL_LINEAR["llama"]
    named = rf".*0\..*({'|'.join(leaves[:layers])})|.*1\..*({'|'.join(leaves[: max(layers - 7, 0)] or ['none'])})"
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter", target_modules=named)
    edit_json(adapter / "adapter_config.json", r=R + 1)
    result = lora("merge", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 2
    assert result.stderr.count(f"has rank {R}, adapter_config.json says r: {R + 1}") == min(layers, 5)
    *faults, hint = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in faults) and len(faults) == 5
    assert re.findall(r"(\d+) more like these: ", hint) == ([str(more)] if more else [])


def test_adapters_that_saw_the_base_otherwise_are_not_added(
    train: Callable[..., Any], tmp_path: Path, tiny_gpt2: Path, lora: Any
) -> None:
    """One was trained on the base in NF4, one on the base itself, one on the base in NF4 after rounding to bfloat16."""
    quick = {"training.max_steps": 1}
    seen = quick | {"quantization": {"method": "nf4", "compute_dtype": "float32"}}
    small, plain, rounded = train(seen), train(quick), train(seen | {"model.dtype": "bfloat16"})
    out = tmp_path / "merged"
    for first, second in ((small, plain), (plain, small), (small, rounded)):
        result = lora("merge", first.folder, second.folder, "--out", out, "--no-verify")
        assert result.exit_code == 2 and f"not quantized in training as that of {first.folder}" in result.stderr
        assert "--into original" in result.stderr and not out.exists()
        parts = [f"{run.folder}=1" for run in (first, second)]
        result = lora("adapters", "compose", *parts, "--out", tmp_path / "composed")
        assert result.exit_code == 2 and "not quantized in training as" in result.stderr
    done(lora("merge", small.folder, plain.folder, "--into", "original", "--out", tmp_path / "both", "--no-verify"))
    done(lora("merge", small.folder, rounded.folder, "--into", "original", "--out", out, "--no-verify"))
    before, after = weights_of(tiny_gpt2), weights_of(out)
    sums = [expected("gpt2", before, run.tensors, 8 / R, False) for run in (small, rounded)]
    for key, (once, size) in sums[0].items():
        wanted = once + sums[1][key][0] - before[key].double()
        assert ((after[key].double() - wanted).abs() <= 4 * 2.0**-23 * (size + sums[1][key][1])).all(), key


def test_the_type_and_the_size_of_files_can_be_chosen(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    folder = in_dtype(tiny_llama, torch.bfloat16, tmp_path / "base")
    edit_json(folder / "config.json", torch_dtype="bfloat16")  # the key that older versions write and read
    with edited_weights(folder) as weights:
        weights["model.layers.0.mask"] = torch.ones(3, dtype=torch.uint8)  # old files hold such masks
    adapter = make_adapter("llama", folder, tmp_path / "adapter")
    out = tmp_path / "merged"
    done(lora("merge", adapter, "--out", out, "--dtype", "float32", "--max-shard-size", "60KB"))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config.get("torch_dtype", "float32") == "float32"
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    after = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    before = weights_of(folder)
    wanted = expected("llama", before, load_file(adapter / "adapter_model.safetensors"), ALPHA / R, False)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert weight.dtype == (torch.uint8 if name.endswith("mask") else torch.float32)
        exact, size = wanted.get(name, (before[name].double(), before[name].double().abs()))
        assert ((weight.double() - exact).abs() <= 4 * 2.0**-23 * size).all(), name  # and not rounded to bfloat16
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32


def test_what_rounding_swallows_is_told(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """The fraction of weights that a merge in bfloat16 leaves unchanged, counted here from the files."""
    folder = in_dtype(tiny_llama, torch.bfloat16, tmp_path / "base")
    adapter = make_adapter("llama", folder, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 0.02 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    out = tmp_path / "merged"
    told = json.loads(done(lora("merge", adapter, "--out", out, "--json")).stdout)
    before, after = weights_of(folder), weights_of(out)
    adapted = [name for name in before if any(f".{leaf}.weight" in name for leaf in ALL_LINEAR["llama"])]
    same = sum(int((before[name] == after[name]).sum()) for name in adapted)
    share = same / sum(before[name].numel() for name in adapted)
    assert 0.5 < share < 1
    assert told["unchanged"] == pytest.approx(share)
    text = done(lora("merge", adapter, "--out", tmp_path / "again")).stdout
    assert f"{share:.1%} of the weights" in text and "--dtype float32" in text


def test_a_type_that_is_asked_for_is_not_advised(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 1e-6 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    text = done(lora("merge", adapter, "--out", tmp_path / "merged")).stdout
    assert "rounded to float32" in text and "--dtype" not in text


def test_the_base_can_be_named(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    adapter = make_adapter("llama", folder, tmp_path / "adapter")
    moved = folder.rename(tmp_path / "moved")
    out = tmp_path / "merged"
    result = lora("merge", adapter, "--out", out)
    assert result.exit_code == 2 and "--base" in result.stderr
    result = lora("merge", adapter, "--out", out, "--base", tiny_gpt2)
    assert result.exit_code == 2 and "layer that the base does not have" in result.stderr
    done(lora("merge", adapter, "--out", out, "--base", moved))
    assert weights_of(out).keys() == weights_of(moved).keys()


def shown(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


@pytest.mark.parametrize("into", ["expanded", "original", "quantized"])
def test_the_choice_of_a_base_is_seen(
    into: str, tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    """Differences, KL divergence and perplexity of the candidates, computed here from the models and the rows."""
    recipe = write_recipe(
        model={"name_or_path": str(tiny_llama)},
        quantization={"method": "nf4", "compute_dtype": "float32"},
        adapter={"target_modules": "all-linear"},
        training={"learning_rate": 0.02, "warmup_steps": 0},
    )
    done(lora("train", recipe))
    adapter, out = tmp_path / "run" / "adapter", tmp_path / "merged"
    rows = tmp_path / "rows.txt"
    rows.write_text("The first row of several words.\n\nAnother one, which is longer than the first.\n")
    given = ("merge", adapter, "--out", out, "--into", into, "--data", rows, "--json")
    told = done(lora(*given)).json["verified"]

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = [[*tokenizer(line.strip()).input_ids, tokenizer.eos_token_id] for line in rows.read_text().split("\n\n")]

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.eval()(input_ids=torch.tensor([row])).logits[0] for row in ids]).double()

    seen = run(PeftModel.from_pretrained(in_4_bits(tiny_llama, True, torch.float32), str(adapter)))
    original = run(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(adapter)))
    own = original if into == "original" else seen

    def perplexity(logits: torch.Tensor) -> float:
        told = zip(logits.log_softmax(-1).split([len(row) for row in ids]), ids, strict=True)
        right = [float(each[at, row[at + 1]]) for each, row in told for at in range(len(row) - 1)]
        return math.exp(-sum(right) / len(right))

    assert told["apart"] == pytest.approx(perplexity(seen), rel=1e-3)
    for name, said in (("expanded", seen), ("original", original)):
        assert told["candidates"][name]["perplexity"] == pytest.approx(perplexity(said), rel=1e-3)
    if into == "quantized":
        merged = run(unpacked(AutoModelForCausalLM.from_pretrained(out)))
        requantized = (seen.softmax(-1) * (seen.log_softmax(-1) - merged.log_softmax(-1))).sum(-1).mean()
        assert told["candidates"]["quantized"]["kl"] == pytest.approx(float(requantized), rel=1e-3)
        apart = shown(merged) - shown(seen)
        assert told["merged"]["largest"] == pytest.approx(float(apart.abs().max()), rel=1e-3)
        assert told["merged"]["relative"] == pytest.approx(float(apart.norm() / shown(seen).norm()), rel=1e-3)
        assert told["candidates"]["expanded"]["kl"] < float(requantized) / 10
        return
    merged = run(AutoModelForCausalLM.from_pretrained(out))
    assert told["merged"]["largest"] == pytest.approx(float((shown(merged) - shown(own)).abs().max()), abs=2e-5)
    assert told["merged"]["relative"] < 1e-4
    kl = (seen.softmax(-1) * (seen.log_softmax(-1) - original.log_softmax(-1))).sum(-1).mean()
    assert told["candidates"]["original"]["kl"] == pytest.approx(float(kl), rel=1e-3)
    assert told["candidates"]["expanded"]["kl"] < float(kl) / 10
    text = lora("merge", adapter, "--out", tmp_path / "again", "--data", rows).stdout
    assert "KL to training" in text and "original" in text


def test_a_wrong_sum_is_found(tiny_llama: Path, tmp_path: Path, lora: Any, monkeypatch: Any) -> None:
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    monkeypatch.setattr("lora_cli.weights.adapter.products.scaling_of", lambda *_: 1.1 * ALPHA / R)
    result = lora("merge", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 4 and "more than rounding to float32 explains" in result.stderr
    unseen = done(lora("merge", adapter, "--out", tmp_path / "unseen", "--no-verify"))
    assert "not verified" not in unseen.stdout, "it was not asked for"
    monkeypatch.setattr("lora_cli.system.memory.free_bytes", lambda *_: 1000)
    assert "not verified" in done(lora("merge", adapter, "--out", tmp_path / "too-large")).stdout


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig, IA3Config, OFTConfig, VeraConfig, AdaLoraConfig])
def test_other_kinds_peft_merges(kind: Any, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    given: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    given |= {IA3Config: {"feedforward_modules": []}, AdaLoraConfig: {"total_step": 10}}.get(kind, {})
    given |= {OFTConfig: {"oft_block_size": 4, "r": 0}, VeraConfig: {"r": 4}}.get(kind, {})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), kind(**given))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    result = done(lora("merge", tmp_path / "adapter", "--out", tmp_path / "merged"))
    assert "PEFT merged this kind of adapter, with the whole model in memory" in result.stdout
    assert "note: PEFT merges this kind of adapter" in result.stderr
    quiet = ("merge", tmp_path / "adapter", "--out", tmp_path / "quiet", "--no-verify", "--quiet")
    assert kind is not IA3Config or done(lora(*quiet)).stderr == ""
    wanted = logits(adapted, AutoTokenizer.from_pretrained(tiny_llama))
    assert distance(answers(tiny_llama), wanted) > 1e-3
    assert distance(answers(tmp_path / "merged"), wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:Adapter 'default'")
def test_biases_for_layers_without_one_are_refused(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter", lora_bias=True)
    result = lora("merge", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 2, result.stderr
    assert "PEFT cannot merge this adapter: Impossible to merge" in result.stderr
    assert not (tmp_path / "merged").exists()


def test_kinds_without_weights_of_their_own_are_refused(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    prompt = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prompt.save_pretrained(str(tmp_path / "adapter"))
    result = lora("merge", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert result.exit_code == 2 and "PROMPT_TUNING changes no weights" in result.stderr
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("PROMPT_TUNING", "NEWEST_TUNING"))
    result = lora("merge", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert result.exit_code == 2 and "cannot read an adapter of kind NEWEST_TUNING" in result.stderr


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_base_of_no_numbers_is_refused(name: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    with edited_weights(folder) as weights:
        weights[name].view(-1)[3] = math.inf
    adapter = make_adapter("llama", folder, tmp_path / "adapter")
    result = lora("merge", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 2 and f"tensor {name} holds NaN or infinity" in result.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model.norm.weight", {}),
        ("model.layers.0.self_attn.q_proj.weight", {}),
        ("model.norm.weight", {"modules_to_save": ["norm"]}),
        ("model.norm.weight", {"trainable_token_indices": [3]}),
    ],
    ids=["base", "sum", "taken", "in-memory"],
)
def test_numbers_too_large_for_the_type_are_refused(
    name: str, config: dict[str, Any], tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    with edited_weights(folder) as weights:
        weights[name].view(-1)[5] = 1e5
    adapter = make_adapter("llama", folder, tmp_path / "adapter", **config)
    result = lora("merge", adapter, "--out", tmp_path / "merged", "--dtype", "float16", "--no-verify")
    assert result.exit_code == 2 and name.removesuffix(".weight") in result.stderr
    assert "NaN or infinity" in result.stderr and not (tmp_path / "merged").exists()
    done(lora("merge", adapter, "--out", tmp_path / "merged", "--no-verify"))


def test_a_taken_tensor_too_large_for_its_bases_type_is_refused(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    folder = in_dtype(tiny_llama, torch.float16, tmp_path / "base")
    adapter = make_adapter("llama", folder, tmp_path / "adapter", modules_to_save=["norm"])
    file = adapter / "adapter_model.safetensors"
    save_file(
        load_file(file) | {"base_model.model.model.norm.weight": torch.full((WIDTH,), 1e5)}, file, {"format": "pt"}
    )
    result = lora("merge", adapter, "--out", tmp_path / "merged", "--no-verify")
    assert result.exit_code == 2 and "tensor model.norm.weight holds NaN or infinity" in result.stderr


def test_embedding_and_head_are_not_held_at_once(
    tiny_llama: Path, tmp_path: Path, lora: Any, monkeypatch: Any, living_tensors: Any
) -> None:
    adapter, read = make_adapter("llama", tiny_llama, tmp_path / "adapter"), merge.read_tensor
    words, held = weights_of(tiny_llama)["lm_head.weight"].shape, []

    def counted(info: Any) -> torch.Tensor:
        held.append((info.name, sum(each.shape == words for each in living_tensors())))
        return read(info)

    monkeypatch.setattr(merge, "read_tensor", counted)
    done(lora("merge", adapter, "--out", tmp_path / "merged", "--no-verify"))
    counts = dict(held)
    assert counts["lm_head.weight"] == counts["model.embed_tokens.weight"] == min(counts.values())


@pytest.mark.parametrize("tied", [False, True])
def test_words_that_were_added_travel(tied: bool, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    edit_json(folder / "config.json", tie_word_embeddings=tied)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<first>", "<second>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=R, target_modules=ALL_LINEAR["llama"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.add_(0.05)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    tokenizer.save_pretrained(str(tmp_path / "adapter"))

    done(lora("merge", tmp_path / "adapter", "--base", folder, "--out", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    ids = torch.tensor([tokenizer("one <first> two <second> three").input_ids])
    assert ids.max() == len(tokenizer) - 1
    with torch.no_grad():
        wanted, found = (each.eval()(input_ids=ids).logits for each in (adapted, merged))
    assert distance(found.double(), wanted.double()) < 1e-5


@pytest.fixture(params=["gpt2", "llama"])
def tied(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    """A model whose embedding and head are one stored tensor."""
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    if request.param == "gpt2":
        return "gpt2", folder
    shutil.copytree(folder, tmp_path / "tied")
    edit_json(tmp_path / "tied" / "config.json", tie_word_embeddings=True)
    weights = weights_of(folder)
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    return "llama", tmp_path / "tied"


ENDS = {
    "gpt2": ("wte", "transformer.wte.weight", "c_attn"),
    "llama": ("embed_tokens", "model.embed_tokens.weight", "q_proj"),
}


def test_ends_that_are_stored_apart_are_not_tied(
    tiny_llama: Path, tmp_path: Path, lora: Any, no_model: None, recwarn: Any
) -> None:
    """Transformers loads both as they are stored, whatever the configuration says."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    adapter = make_adapter("llama", folder, tmp_path / "adapter", "auto", target_modules=["lm_head", "q_proj"])
    assert done(lora("merge", adapter, "--out", tmp_path / "merged", "--json")).json["verified"]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert base.get_input_embeddings().weight is not base.get_output_embeddings().weight
    assert distance(answers(tmp_path / "merged"), answers(folder, adapter)) < 1e-5


def test_tokens_trained_in_the_head_alone_are_not_merged_into_the_embedding(
    tied: Base, tmp_path: Path, lora: Any
) -> None:
    name, folder = tied
    tokens = {ENDS[name][0]: [3, 7], "lm_head": [1]}
    adapter = make_adapter(name, folder, tmp_path / "adapter", trainable_token_indices=tokens)
    result = lora("quantize", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "trains tokens of the head, which is tied" in result.stderr
    assert not (tmp_path / "out").exists()
    both = make_adapter(name, folder, tmp_path / "both", trainable_token_indices=[3, 7])
    done(lora("merge", both, "--out", tmp_path / "merged"))
    assert distance(answers(tmp_path / "merged"), answers(folder, both)) < 1e-5


@pytest.mark.parametrize("saved", [False, "auto"], ids=["bare", "as-peft-saves-it"])
@pytest.mark.parametrize("ends", ["embedding", "head", "both"])
def test_an_update_of_one_tied_tensor_is_none_of_the_other(
    ends: str, saved: bool | str, tied: Base, tmp_path: Path, lora: Any, no_model: None, recwarn: Any
) -> None:
    name, folder = tied
    leaf, stored, linear = ENDS[name]
    targets = {"embedding": [leaf], "head": ["lm_head"], "both": [leaf, "lm_head"]}[ends]
    adapter = make_adapter(name, folder, tmp_path / "adapter", saved, target_modules=[*targets, linear])
    done(lora("merge", adapter, "--out", tmp_path / "merged"))

    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not plain.config.tie_word_embeddings
    assert distance(answers(tmp_path / "merged"), answers(folder, adapter)) < 1e-5

    before, after = weights_of(folder)[stored].double(), weights_of(tmp_path / "merged")
    tensors = load_file(adapter / "adapter_model.safetensors")
    update = {key.removeprefix("base_model.model."): tensor.double() for key, tensor in tensors.items()}
    layer = stored.removesuffix(".weight")
    wanted = {stored: before, "lm_head.weight": before}
    if ends != "head":
        a, b = update[f"{layer}.lora_embedding_A"], update[f"{layer}.lora_embedding_B"]
        wanted[stored] = before + ALPHA / R * (b @ a).T
    if ends != "embedding":
        a, b = update["lm_head.lora_A.weight"], update["lm_head.lora_B.weight"]
        wanted["lm_head.weight"] = before + ALPHA / R * b @ a
    for key, weight in wanted.items():
        assert (after[key] - weight).abs().max() < 1e-5, key


def test_a_tied_model_is_quantized_with_updates_of_its_own(
    tied: Base, tmp_path: Path, lora: Any, no_model: None, recwarn: Any
) -> None:
    name, folder = tied
    leaf, stored, linear = ENDS[name]
    adapter = make_adapter(name, folder, tmp_path / "adapter", "auto", target_modules=[leaf, "lm_head", linear])
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    done(lora("quantize", tmp_path / "merged", "--out", tmp_path / "two-passes"))
    done(lora("quantize", adapter, "--out", tmp_path / "one-pass"))
    one, two = weights_of(tmp_path / "one-pass"), weights_of(tmp_path / "two-passes")
    assert one.keys() == two.keys() and {stored, "lm_head.weight"} < one.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    config = json.loads((tmp_path / "one-pass" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("end", ["embedding", "head"])
def test_a_tied_tensor_that_was_trained_whole(end: str, tied: Base, tmp_path: Path, lora: Any, recwarn: Any) -> None:
    name, folder = tied
    leaf, _, linear = ENDS[name]
    saved = leaf if end == "embedding" else "lm_head"
    adapter = make_adapter(name, folder, tmp_path / "adapter", target_modules=[linear], modules_to_save=[saved])
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    wanted = answers(folder, adapter)
    assert distance(answers(folder), wanted) > 0.1
    assert distance(answers(tmp_path / "merged"), wanted) < 1e-5


def test_words_that_were_added_to_a_tied_embedding_that_was_adapted(
    tied: Base, tmp_path: Path, lora: Any, no_model: None, recwarn: Any
) -> None:
    name, folder = tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<first>", "<second>"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=R, target_modules=[ENDS[name][0]]))
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.add_(0.05)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    done(lora("merge", tmp_path / "adapter", "--out", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer)
    ids = torch.tensor([tokenizer("one <first> two <second> three").input_ids])
    with torch.no_grad():
        wanted, found = (each.eval()(input_ids=ids).logits for each in (adapted, merged))
    assert distance(found.double(), wanted.double()) < 1e-5


def test_what_peft_ties_by_itself(tied: Base, tmp_path: Path, lora: Any, no_model: None, recwarn: Any) -> None:
    name, folder = tied
    targets = [ENDS[name][0], ENDS[name][2]]
    adapter = make_adapter(name, folder, tmp_path / "adapter", target_modules=targets, ensure_weight_tying=True)
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    assert distance(answers(tmp_path / "merged"), answers(folder, adapter)) < 1e-5


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_dora_of_a_tied_tensor_is_refused(verb: str, tied: Base, tmp_path: Path, lora: Any, recwarn: Any) -> None:
    name, folder = tied
    adapter = make_adapter(name, folder, tmp_path / "adapter", target_modules=[ENDS[name][0]], use_dora=True)
    before = sorted(tmp_path.rglob("*"))
    result = lora(verb, adapter, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "tied in its base" in result.stderr, result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_both_of_two_that_could_have_been_tied(tiny_llama: Path, tmp_path: Path, lora: Any, recwarn: Any) -> None:
    """The checkpoint has two tensors, the configuration says that they are tied. Transformers ties them if equal."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    adapter = make_adapter("llama", folder, tmp_path / "adapter", target_modules=["embed_tokens"])
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    before, after = weights_of(folder), weights_of(tmp_path / "merged")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert not torch.equal(before["lm_head.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_text_model_within_another_is_untied_in_both_configurations(
    tokenizer: Any, tmp_path: Path, lora: Any, no_model: None, recwarn: Any
) -> None:
    sizes = GEMMA_3 | {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    text = sizes | {"layer_types": ["sliding_attention", "full_attention"], "vocab_size": len(tokenizer)}
    model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = make_adapter("llama", tmp_path / "base", tmp_path / "adapter", target_modules=["lm_head"])
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert distance(answers(tmp_path / "merged"), answers(tmp_path / "base", adapter)) < 1e-5


@pytest.mark.parametrize("leaf", ["embed_tokens", "lm_head"])
def test_an_embedding_that_peft_saves_by_itself(
    leaf: str, tiny_llama: Path, tmp_path: Path, lora: Any, no_model: None, recwarn: Any
) -> None:
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter", "auto", target_modules=[leaf, "q_proj"])
    assert any(f"{leaf}.base_layer.weight" in name for name in load_file(adapter / "adapter_model.safetensors"))
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is False
    assert distance(answers(tmp_path / "merged"), answers(tiny_llama, adapter)) < 1e-5


def started_from(start: str, folder: Path, out: Path) -> Any:
    """Save the adapter of a model that PEFT initializes by ``start``, after a random change. Return the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=R, target_modules=["q_proj", "v_proj"], init_lora_weights=start)  # type: ignore[arg-type]
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape))
    adapted.save_pretrained(str(out))
    return adapted


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_of_another_start_merges_as_peft_has_it(
    start: str, tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    adapted = started_from(start, tiny_llama, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    wanted = logits(adapted, tokenizer)
    result = done(lora("merge", tmp_path / "adapter", "--out", tmp_path / "merged", "--no-verify"))
    assert "PEFT merges this kind of adapter" in result.stderr
    assert distance(answers(tmp_path / "merged"), wanted) < 1e-5

    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    done(lora("quantize", tmp_path / "whole", "--out", tmp_path / "wanted", "--method", "int8"))
    done(lora("quantize", tmp_path / "adapter", "--out", tmp_path / "new" / "int8", "--method", "int8"))
    one, other = weights_of(tmp_path / "new" / "int8"), weights_of(tmp_path / "wanted")
    for name, weight in other.items():
        assert (one[name].double() - weight.double()).abs().max() <= (1 if weight.dtype == torch.int8 else 1e-5), name


def test_what_an_adapter_changes_is_told_against_its_base_as_it_is(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """An untrained PiSSA adapter changes nothing: its initial product has been subtracted from the base."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=R, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    told = done(lora("merge", tmp_path / "adapter", "--out", tmp_path / "merged")).stdout
    changes = re.search(r"the adapter changes the logits by (\S+)", " ".join(told.split()))
    assert changes is not None and float(changes[1]) < 1e-4


def test_a_double_in_the_base_is_added_to(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    folder = in_dtype(tiny_llama, torch.float32, tmp_path / "base")
    layer = "model.layers.0.self_attn.q_proj"
    with edited_weights(folder) as before:
        before[f"{layer}.weight"] = before[f"{layer}.weight"].double()
    adapter = make_adapter("llama", folder, tmp_path / "adapter", target_modules=["q_proj"])
    done(lora("merge", adapter, "--out", tmp_path / "merged", "--no-verify"))
    found = weights_of(tmp_path / "merged")[f"{layer}.weight"]
    exact, _ = expected("llama", before, load_file(adapter / "adapter_model.safetensors"), ALPHA / R, False)[
        f"{layer}.weight"
    ]
    assert found.dtype == torch.float64 and (found - exact).abs().max() < 1e-5


def test_the_type_is_that_of_most_numbers(tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    """More of its tensors are vectors, which have another dtype."""
    folder = in_dtype(tiny_gpt2, torch.bfloat16, tmp_path / "base")
    with edited_weights(folder) as weights:
        weights |= {name: each.float() for name, each in weights.items() if each.dim() == 1}
    adapter = make_adapter("gpt2", folder, tmp_path / "adapter")
    told = done(lora("merge", adapter, "--out", tmp_path / "merged", "--no-verify", "--json")).json
    assert told["dtype"] == "bfloat16"


def test_an_empty_tensor_in_the_base_is_copied(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    folder = in_dtype(tiny_llama, torch.float32, tmp_path / "base")
    save_file(weights_of(folder) | {"extra": torch.empty(0, 4)}, folder / "model.safetensors", {"format": "pt"})
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    done(lora("merge", adapter, "--base", folder, "--out", tmp_path / "merged", "--no-verify"))
    assert weights_of(tmp_path / "merged")["extra"].shape == (0, 4)


def test_of_a_model_written_twice_that_is_read_which_transformers_reads(
    tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    """Transformers does not remove a single file when it saves shards, or the shards' index when it saves one file."""
    folder, adapter = in_dtype(tiny_llama, torch.float32, tmp_path / "base"), tmp_path / "adapter"
    whole = (folder / "model.safetensors").read_bytes()
    other = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    other.get_input_embeddings().weight.data.zero_()
    other.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "model.safetensors").write_bytes(whole)
    make_adapter("llama", folder, adapter)
    done(lora("merge", adapter, "--out", tmp_path / "merged", "--no-verify"))
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    done(lora("merge", adapter, "--out", tmp_path / "again", "--no-verify"))
    assert weights_of(tmp_path / "again")["model.embed_tokens.weight"].any()
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "merged/model.safetensors").read_bytes()


def test_a_mask_that_no_model_reads_may_be_infinite(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    folder = in_dtype(tiny_llama, torch.float32, tmp_path / "base")
    mask = {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e9).half()}
    save_file(weights_of(folder) | mask, folder / "model.safetensors", {"format": "pt"})
    adapter = make_adapter("llama", folder, tmp_path / "adapter")
    done(lora("merge", adapter, "--out", tmp_path / "merged"))


def test_the_base_is_of_the_revision_that_the_adapter_names(
    tiny_llama: Path, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model = cache / "models--somebody--model"
    for revision, scale in (("a" * 40, 1), ("b" * 40, 2)):
        shutil.copytree(tiny_llama, model / "snapshots" / revision)
        one = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        one.get_submodule("model.norm").weight.data *= scale
        one.save_pretrained(model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("a" * 40)
    (model / "refs/step1").write_text("b" * 40)
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    for revision, commit in ((None, "a" * 40), ("step1", "b" * 40)):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="somebody/model", revision=revision)
        done(lora("merge", adapter, "--out", tmp_path / str(revision)))
        norm = weights_of(tmp_path / str(revision))["model.norm.weight"]
        assert torch.equal(norm, weights_of(model / "snapshots" / commit)["model.norm.weight"])


def test_a_hub_id_that_is_an_adapters_is_told(
    tiny_gpt2: Path, tmp_path: Path, lora: Any, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--somebody--adapter"
    make_adapter("gpt2", tiny_gpt2, model / "snapshots" / ("a" * 40))
    (model / "refs").mkdir()
    (model / "refs/main").write_text("a" * 40)
    result = lora("train", write_recipe({"model.name_or_path": "somebody/adapter"}))
    assert result.exit_code == 2
    what, hint = (
        "holds no model (no config.json)",
        "this is an adapter: give its base, or merge the two first (lora merge)",
    )
    assert result.stderr == f"error: somebody/adapter: {what}\n    {hint}\n"


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight", "model.embed_tokens.weight"],
)
def test_a_base_without_a_tensor_is_refused(name: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    folder = in_dtype(tiny_llama, torch.float32, tmp_path / "base")
    with edited_weights(folder) as weights:
        del weights[name]
    result = lora("merge", adapter, "--base", folder, "--out", tmp_path / "merged", "--no-verify")
    assert result.exit_code == 2 and f"tensor {name} is missing" in result.stderr, result.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("saved", [False, "auto"], ids=["bare", "as-peft-saves-it"])
def test_dora_of_an_embedding_merges_as_peft_has_it(
    saved: bool | str, tiny_llama: Path, tmp_path: Path, lora: Any, recwarn: Any
) -> None:
    targets = ["embed_tokens", "q_proj"]
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter", saved, target_modules=targets, use_dora=True)
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    assert distance(answers(tmp_path / "merged"), answers(tiny_llama, adapter)) < 1e-5


def test_a_tied_embedding_that_was_saved_as_it_is(tied: Base, tmp_path: Path, lora: Any) -> None:
    name, folder = tied
    adapter = make_adapter(name, folder, tmp_path / "adapter", True, target_modules=[ENDS[name][2]])
    assert any("lm_head.weight" in key for key in load_file(adapter / "adapter_model.safetensors"))
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    assert distance(answers(tmp_path / "merged"), answers(folder, adapter)) < 1e-5


def test_an_embedding_that_peft_saves_by_itself_is_quantized(
    tiny_llama: Path, tmp_path: Path, lora: Any, no_model: None, recwarn: Any
) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter", "auto", target_modules=targets)
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    done(lora("quantize", tmp_path / "merged", "--out", tmp_path / "two-passes"))
    done(lora("quantize", adapter, "--out", tmp_path / "one-pass"))
    one, two = weights_of(tmp_path / "one-pass"), weights_of(tmp_path / "two-passes")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("more", [False, True])
def test_a_base_may_store_other_names_and_more_than_the_model_has(
    more: bool, tiny_llama: Path, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3's layers are in language_model.model in the file, and in model.language_model once loaded. Layers that
    predict further tokens are stored but not loaded. One model skeleton is built to check whether the adapter fits."""
    folder = tmp_path / "base"
    if more:
        folder = in_dtype(tiny_llama, torch.float32, folder)
        weights = weights_of(folder)
        further = {"model.layers.2.self_attn.q_proj.weight": weights["model.layers.1.self_attn.q_proj.weight"].clone()}
        save_file(weights | further, folder / "model.safetensors", {"format": "pt"})
    else:
        text = GEMMA_3 | {"vocab_size": AutoConfig.from_pretrained(tiny_llama).vocab_size}
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=SIGHT, **PICTURES))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    adapter = make_adapter("llama", folder, tmp_path / "adapter", target_modules=["q_proj"])
    if not more:
        assert "language_model.model.layers.0.self_attn.q_proj.weight" in weights_of(folder)
    laid_out: list[Any] = []
    monkeypatch.setattr(expected_tensors, "meta_model", lambda config: laid_out.append(config) or meta_model(config))
    find_origin(adapter)
    assert len(laid_out) == 1
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for name, weight in wanted.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
    refused = lora("merge", adapter, "--base", tiny_llama, "--out", tmp_path / "other")
    assert (refused.exit_code == 0) is more or "are for a layer" in refused.stderr


MIXED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
MIXED |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize(
    ("name", "more", "layer"),
    [
        ("DeepseekV4", {"q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 8}, "o_b_proj"),
        ("InklingText", {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}, "o_proj"),
    ],
)
def test_architectures_of_their_own_ways(
    name: str, more: dict[str, Any], layer: str, tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    """Transformers mistakes the stored name of DeepSeek-V4's final norm for another norm's, and keeps it. Inkling's
    configuration does not state whether embedding and head are tied."""
    words = AutoConfig.from_pretrained(tiny_llama).vocab_size
    config = getattr(transformers, f"{name}Config")(vocab_size=words, **MIXED, **more)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    adapter = make_adapter("llama", tmp_path / "base", tmp_path / "adapter", target_modules=[layer])
    done(lora("merge", adapter, "--out", tmp_path / "merged"))
    assert distance(answers(tmp_path / "merged"), answers(tmp_path / "base", adapter)) < 1e-5
