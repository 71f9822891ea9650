"""A streamed base, and activations offloaded to host memory: the same run, in less memory."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WIDTH, Run, done, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, OpenAIGPTConfig, Zamba2Config
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from lora_cli.display import Display
from lora_cli.errors import RunError
from lora_cli.model.fast_paths.fuse import SwiGLU
from lora_cli.recipe.load import load_recipe, with_changes
from lora_cli.training import setup, step
from lora_cli.training.memory import activations, offload
from lora_cli.training.memory.activations import choose_checkpointing
from lora_cli.training.memory.estimate import activation_bytes, estimate, largest_batch
from lora_cli.training.memory.out_of_memory import out_of_memory
from lora_cli.training.memory.streaming import detach_weights
from lora_cli.training.prepare import prepare
from lora_cli.weights.files.shards import model_headers

pytestmark = pytest.mark.usefixtures("no_curves", "quick_collections")

METHODS: dict[str, dict[str, Any]] = {
    "float32": {},
    "PEFT's own layers": {"adapter.fused": False},
    "some layers, dropout": {"adapter.target_modules": "minimal", "adapter.lora_dropout": 0.1},
    "nf4": {"quantization": {"method": "nf4"}},
    "fp4, plain scales, PEFT's own layers": {
        "quantization": {"method": "fp4", "double_quant": False},
        "adapter.fused": False,
    },
    "nf4, some layers": {"quantization": {"method": "nf4"}, "adapter.target_modules": "minimal"},
}


@pytest.fixture
def largest_away(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the layers' frozen weights in memory after each forward pass."""
    seen: list[int] = []
    original = step.summed_loss

    def look(model: Any, *args: Any) -> Any:
        loss = original(model, *args)
        frozen = [
            p for name, p in model.named_parameters() if not p.requires_grad and (".h." in name or ".layers." in name)
        ]
        seen.append(sum(p.data.untyped_storage().nbytes() for p in frozen))
        return loss

    monkeypatch.setattr(step, "summed_loss", look)
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_a_streamed_base_trains_as_a_resident_one(
    base: str,
    method: str,
    request: pytest.FixtureRequest,
    write_recipe: Any,
    lora: Any,
    qa_file: Path,
    tmp_path: Path,
    largest_away: list[int],
) -> None:
    changes = (
        {"adapter.target_modules": "all-linear"}
        | METHODS[method]
        | {
            "model.name_or_path": request.getfixturevalue(f"tiny_{base}"),
            "data.packing": True,
            "data.validation": qa_file,
            "training.eval_steps": 2,
            "training.gradient_checkpointing": True,
        }
    )
    held, adapters, losses = [], [], []
    for value in (False, True):
        folder = tmp_path / str(value)
        largest_away.clear()
        recipe = write_recipe(changes | {"training.stream_base": value, "training.output_dir": folder})
        result = done(lora("train", recipe))
        assert ("training.stream_base" in result.stderr) is value
        held.append(max(largest_away))
        adapters.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]
    assert adapters[0] == adapters[1]
    assert held[1] < held[0] / 20


@pytest.mark.parametrize("kind", ["Mamba", "Lfm2", "Qwen3_5Text", "Doge"])
def test_weights_that_a_module_reads_past_their_layer_are_there(
    kind: str, write_recipe: Any, lora: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """These are a convolution's weights, in Mamba also a linear layer's, and in Doge the scale of a layer's input."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    if kind != "Mamba":
        mixer = {"Lfm2": "conv", "Qwen3_5Text": "linear_attention", "Doge": "full_attention"}[kind]
        sizes |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        sizes |= {"layer_types": [mixer, "full_attention"]}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    runs = []
    for value in (False, True):
        changes = {"training.stream_base": value, "training.output_dir": tmp_path / str(value)}
        changes |= {"model.name_or_path": tmp_path / "model", "adapter.target_modules": "all-linear"}
        done(lora("train", write_recipe(changes | {"training.gradient_checkpointing": True})))
        runs.append(Run(tmp_path / str(value)))
    assert runs[0].losses == runs[1].losses
    assert runs[0].adapter_bytes == runs[1].adapter_bytes


@pytest.mark.parametrize("method", ["float32", "nf4"])
def test_a_base_that_is_replaced_meanwhile_is_gone_on_with(
    method: str, tiny_llama: Path, write_recipe: Any, lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for replaces in (False, True):
        base, folder = tmp_path / f"base-{replaces}", tmp_path / f"run-{replaces}"
        shutil.copytree(tiny_llama, base)

        def advance(_: Any, step: int, replaces: bool = replaces, places: tuple[Path, ...] = (base, folder)) -> None:
            if replaces and step == 1:
                for file in [file for place in places for file in place.rglob("model*.safetensors")]:
                    other = file.with_suffix(".new")
                    save_file({name: torch.zeros_like(each) for name, each in load_file(file).items()}, other)
                    other.replace(file)

        changes = METHODS[method] | {"model.name_or_path": base, "training.output_dir": folder}
        with monkeypatch.context() as patch:
            patch.setattr(Display, "advance", advance)
            done(lora("train", write_recipe(changes | {"training.stream_base": True})))
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]


def test_weights_stored_in_another_type_are_converted_on_the_way(
    tiny_llama: Path, write_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    """A few weights may have another dtype than most."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.get_submodule("model.norm").float().weight.data += torch.rand(len(model.model.norm.weight))
    shutil.copytree(tiny_llama, tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    assert {info.dtype for info in model_headers(tmp_path / "half").values()} == {"BF16", "F32"}
    adapters = []
    for value in (False, True):
        changes = {"model": {"name_or_path": tmp_path / "half", "dtype": "float32"}}
        changes |= {"training.gradient_checkpointing": True, "training.stream_base": value}
        changes |= {"training.output_dir": tmp_path / str(value)}
        done(lora("train", write_recipe(changes)))
        adapters.append((tmp_path / str(value) / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_what_loading_has_changed_is_kept_and_all_else_is_read_from_the_file(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Transformers rearranges some weights, which keep name and shape. GPT-2's own files omit ``transformer.``."""
    folder = shutil.copytree(tiny_gpt2, tmp_path / "base")
    file, device = folder / "model.safetensors", torch.device("cpu")
    save_file(
        {name.removeprefix("transformer."): each for name, each in load_file(file).items()}, file, {"format": "pt"}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first, last = model.transformer.h
    first.attn.c_proj.weight.data = first.attn.c_proj.weight.data.T.contiguous()
    last.mlp.c_fc.weight.data = last.mlp.c_fc.weight.data[:, [0, 3, 2, 1, *range(4, 4 * WIDTH)]]
    wanted = {weight: weight.data.to(torch.bfloat16) for weight in model.transformer.h.parameters()}
    sources = detach_weights(model, folder, device, torch.bfloat16)  # in another dtype: what is kept is a copy
    assert all(torch.equal(sources[weight](), before) for weight, before in wanted.items())
    with file.open("r+b") as stored:
        stored.seek(8 + int.from_bytes(stored.read(8), "little"))
        stored.write(bytes(file.stat().st_size - stored.tell()))
    assert {weight for weight in wanted if sources[weight]().any()} == {first.attn.c_proj.weight, last.mlp.c_fc.weight}


@pytest.mark.parametrize(("free", "streams"), [(10**12, False), (1000, True)])
def test_auto_streams_when_the_weights_do_not_fit(
    free: int, streams: bool, write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.training.memory.streaming.free_bytes", lambda device: free)
    result = done(lora("train", write_recipe({"training.max_steps": 1})))
    told = " ".join(result.stderr.split())
    assert (
        "training.stream_base: auto -> true: the base needs about 0.5 MB, and cpu has 0.0 MB free" in told
    ) is streams
    assert ("training.stream_base: a layer's frozen weights are read" in told) is streams
    held = done(lora("train", write_recipe({"adapter.use_dora": True, "training.max_steps": 1}), "--overwrite"))
    told = " ".join(held.stderr.split())
    assert ("0.0 MB free; adapter.use_dora reads every weight's norm" in told) is streams
    assert "frozen weights are read" not in told


def test_auto_streams_a_base_stored_in_4_bits_too(
    tiny_llama: Path, write_recipe: Any, lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(lora("quantize", tiny_llama, "--out", tmp_path / "small"))
    monkeypatch.setattr("lora_cli.training.memory.streaming.free_bytes", lambda device: 1000)
    told = done(lora("train", write_recipe({"model.name_or_path": tmp_path / "small", "training.max_steps": 1}))).stderr
    assert "training.stream_base: auto -> true: the base needs about" in " ".join(told.split())
    assert "a layer's frozen weights are read whenever it runs" in " ".join(told.split())


@pytest.mark.parametrize("method", [None, "nf4", "int8"])
def test_what_a_base_needs_is_told_before_it_is_loaded(
    method: str | None, tiny_llama: Path, write_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    """The estimate is for the base as it is stored, and is compared with the model that Transformers loads from it."""
    folder = tiny_llama
    if method is not None:
        folder = tmp_path / "small"
        done(lora("quantize", tiny_llama, "--out", folder, "--method", method))
    model = AutoModelForCausalLM.from_pretrained(folder)
    held = sum({id(each): each.nbytes for each in model.parameters()}.values())
    states = [each.quant_state for each in model.parameters() if hasattr(each, "quant_state")]
    for state in states + [each.state2 for each in states if each.nested]:
        held += state.absmax.nbytes + state.code.nbytes
    recipe = load_recipe(write_recipe({"model.name_or_path": folder, "model.dtype": "float32"}))
    job = prepare(recipe, resume=False, overwrite=False)
    assert estimate(job, job.recipe).weights == pytest.approx(held, rel=0.05)
    half = load_recipe(write_recipe({"model.name_or_path": folder, "model.dtype": "bfloat16"}))
    assert estimate(job, half).weights < held


def test_weights_that_several_layers_share_are_counted_once(tokenizer: Any, write_recipe: Any, tmp_path: Path) -> None:
    """Both of Zamba2's hybrid layers hold the block that they share."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "attention_head_dim": 16}
    mamba = {"n_mamba_heads": 4, "mamba_headdim": 16, "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8}
    layers = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
    config = Zamba2Config(vocab_size=len(tokenizer), num_mem_blocks=1, adapter_rank=4, **shape, **mamba, **layers)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "zamba")
    tokenizer.save_pretrained(tmp_path / "zamba")
    recipe = load_recipe(write_recipe({"model.name_or_path": tmp_path / "zamba", "model.dtype": "float32"}))
    job = prepare(recipe, resume=False, overwrite=False)
    weights = {each: each.nbytes for each in model.parameters()}
    assert estimate(job, recipe).weights == sum(weights.values())
    one_by_one = [sum(weights[each] for each in layer.parameters()) for layer in model.model.layers]
    outside = sum(each.nbytes for name, each in model.named_parameters() if ".layers." not in name)
    streamed = with_changes(recipe, {"training.stream_base": True})
    assert estimate(job, streamed).weights == outside + max(one_by_one)


@pytest.mark.parametrize(("optim", "moments"), [("adamw_torch", 8), ("adamw_8bit", 2)])
def test_what_is_trained_is_counted_with_its_gradient_and_moments(optim: str, moments: int, write_recipe: Any) -> None:
    """The adapters are on c_attn of GPT-2's two layers, from WIDTH to 3 * WIDTH."""
    targets = {"adapter.r": 3, "adapter.target_modules": ["c_attn"]}
    job = prepare(load_recipe(write_recipe(targets | {"training.optim": optim})), resume=False, overwrite=False)
    assert estimate(job, job.recipe).optimizer == 2 * 3 * (WIDTH + 3 * WIDTH) * (4 + 4 + moments)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_hidden_states_are_kept_of_layers_that_stream(
    cache: str, tiny_llama: Path, write_recipe: Any, lora: Any, tmp_path: Path, largest_away: list[int]
) -> None:
    adapters, held = [], []
    for value in (False, True):
        folder = tmp_path / str(value)
        largest_away.clear()
        changes = {
            "model.name_or_path": tiny_llama,
            "adapter.layers_to_transform": [1],
            "training.cache_frozen": cache,
            "training.gradient_checkpointing": True,
            "training.stream_base": value,
            "training.output_dir": folder,
        }
        result = done(lora("train", write_recipe(changes)))
        assert "hidden states below layer 1 computed once" in " ".join(result.stderr.split())
        adapters.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
        held.append(max(largest_away))
    assert adapters[0] == adapters[1]
    assert held[1] < held[0] / 20


@pytest.mark.parametrize("changes", [{}, {"adapter.fused": False}, {"adapter.target_modules": "minimal"}], ids=str)
def test_nothing_holds_a_layers_codes_after_its_forward_pass(
    changes: dict[str, Any], tiny_llama: Path, write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is stored in 4 bits. Autograd, bitsandbytes and PEFT could hold the codes."""
    from bitsandbytes.nn import Params4bit

    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    brought, taken = Params4bit.from_prequantized, step.summed_loss

    def bring(*args: Any, **kwargs: Any) -> Any:
        weight = brought(*args, **kwargs)
        made.extend(weakref.ref(each) for each in (weight, weight.quant_state.absmax))
        return weight

    def take(*args: Any) -> Any:
        loss = taken(*args)
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        return loss

    small = tiny_llama.parent / "small"
    if not small.exists():
        done(lora("quantize", tiny_llama, "--out", small))
    monkeypatch.setattr(step, "summed_loss", take)
    original = setup.detach_weights

    def put_away(*args: Any) -> Any:
        sources = original(*args)
        monkeypatch.setattr(Params4bit, "from_prequantized", bring)
        return sources

    monkeypatch.setattr(setup, "detach_weights", put_away)
    # bfloat16, the layers' stored compute dtype: with another dtype, they would not be fused.
    stored = {"model.name_or_path": small, "model.dtype": "bfloat16", "adapter.target_modules": "all-linear"}
    done(lora("train", write_recipe(stored | {"training.stream_base": True} | changes)))
    assert len(made) > 100
    assert alive and not any(alive)


def test_a_base_stored_in_8_bits_is_not_streamed(
    tiny_llama: Path, write_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    done(lora("quantize", tiny_llama, "--out", tmp_path / "small", "--method", "int8"))
    changes = {"model.name_or_path": tmp_path / "small", "training.stream_base": True}
    result = lora("train", write_recipe(changes))
    assert result.exit_code == 2
    told = " ".join(result.stderr.split())
    assert "training.stream_base: of quantized bases, only those in bitsandbytes' 4 bits can be streamed" in told
    assert not (tmp_path / "run").exists()


def test_layers_that_call_methods_of_their_parts_are_not_streamed(
    tokenizer: Any, write_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    """Gemma 3n has such layers. Nothing is reported unless streaming is asked for."""
    sizes = {"hidden_size": 32, "intermediate_size": [64], "num_attention_heads": 2, "num_key_value_heads": 2}
    words = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), len(tokenizer))
    alternate = {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0]}
    layers = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_kv_shared_layers": 0, "head_dim": 16}
    config = Gemma3nTextConfig(**sizes, **words, **alternate, **layers)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = {"model.name_or_path": tmp_path / "base", "adapter.target_modules": "attention", "training.max_steps": 1}
    result = lora("train", write_recipe(changes | {"training.stream_base": True}))
    assert result.exit_code == 2
    assert "training.stream_base: the layers of gemma3n_text cannot be streamed" in " ".join(result.stderr.split())
    assert "stream_base" not in done(lora("train", write_recipe(changes))).stderr


def test_a_quantized_base_that_cannot_be_kept_is_not_streamed(
    write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise RunError("9 bytes are wanted, 1 are free", "cache")

    monkeypatch.setattr(setup, "write_cached", no_room)
    result = lora("train", write_recipe({"quantization": {"method": "nf4"}, "training.stream_base": True}))
    assert result.exit_code == 3
    told = " ".join(result.stderr.split())
    assert "training.stream_base: a quantized base is streamed from its cached copy, and there is none" in told


def test_a_quantized_base_comes_into_host_memory_first_where_there_is_a_gpu(
    write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a device map, Transformers loads the base onto the GPU, here replaced by the meta device."""
    monkeypatch.setattr(Bnb4BitHfQuantizer, "update_device_map", lambda _, told: told or {"": "meta"})
    done(lora("train", write_recipe({"quantization": {"method": "nf4"}, "training.stream_base": True})))


def test_streaming_is_advised_once_layers_are_checkpointed(write_recipe: Any, monkeypatch: Any) -> None:
    """One of GPT-2's two layers, of 12 x WIDTH x WIDTH weights and 13 x WIDTH biases and scales, stays in memory."""
    layer = 4 * (12 * WIDTH * WIDTH + 13 * WIDTH)
    monkeypatch.setattr(
        "lora_cli.training.memory.out_of_memory.REMEDIES", 9
    )  # with such small layers, others save more
    job = prepare(load_recipe(write_recipe({"training.gradient_checkpointing": True})), resume=False, overwrite=False)
    told = str(out_of_memory(job, MemoryError(), checkpointing=True, streams=False).faults)
    assert f"training.stream_base=true (saves about {layer / 1e6:.1f} MB)" in told
    for checkpointing in (True, False):  # whatever is said of it, layers that stream are recomputed
        told = str(out_of_memory(job, MemoryError(), checkpointing, streams=True).faults)
        assert "stream_base" not in told and "gradient_checkpointing" not in told
    training = job.recipe.training.model_copy(update={"deepspeed": "zero.json"})
    job = replace(job, recipe=job.recipe.model_copy(update={"training": training}))
    told = str(out_of_memory(job, MemoryError(), checkpointing=True, streams=False).faults)
    assert "adapter.r=" in told and "stream_base" not in told and "8bit" not in told


@pytest.mark.parametrize(
    ("length", "rows", "shorter", "fewer"), [(3, 1, [], []), (5, 2, [], ["1"]), (6, 3, ["3"], ["1"])]
)
def test_no_advice_is_beyond_what_a_recipe_may_say(
    length: int, rows: int, shorter: list[str], fewer: list[str], write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows under 3 tokens, empty batches, half a rank: none is advised, but the lack of memory is still reported."""
    monkeypatch.setattr("lora_cli.training.memory.out_of_memory.REMEDIES", 9)
    small = {"data.train_on": "all", "data.max_length": length, "adapter.r": 1}
    job = prepare(
        load_recipe(write_recipe(small | {"training.per_device_train_batch_size": rows})), resume=False, overwrite=False
    )
    told = " ".join(out_of_memory(job, MemoryError(), checkpointing=False, streams=False).faults[0].hint or ())
    assert re.findall(r"data\.max_length=(\d+)", told) == shorter
    assert re.findall(r"per_device_train_batch_size=(\d+)", told) == fewer
    assert ("gradient_accumulation_steps=4" in told) == (rows == 2), "an odd batch has no exact half"
    assert "adapter.r" not in told


def test_nothing_is_advised_that_saves_nothing(write_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """All rows are shorter than half of max_length."""
    monkeypatch.setattr("lora_cli.training.memory.out_of_memory.REMEDIES", 9)
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "What?", "answer": " It"}] * 4)
    job = prepare(load_recipe(write_recipe({"data.train": rows})), resume=False, overwrite=False)
    told = str(out_of_memory(job, MemoryError(), checkpointing=True, streams=False).faults)
    assert "adapter.r=" in told and "max_length" not in told


@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_is_advised_where_it_is_no_crawl(units: bool, write_recipe: Any, monkeypatch: Any) -> None:
    """A CPU without bfloat16 units takes up to 250 times as long."""
    monkeypatch.setattr("lora_cli.training.memory.out_of_memory.REMEDIES", 9)
    monkeypatch.setattr("lora_cli.training.memory.out_of_memory.has_units_for", lambda *_: units)
    job = prepare(load_recipe(write_recipe({"model.dtype": "float32"})), resume=False, overwrite=False)
    told = str(out_of_memory(job, MemoryError(), checkpointing=True, streams=False).faults)
    assert ("model.dtype=bfloat16" in told) == units and "quantization.method=nf4" in told


@pytest.mark.parametrize(
    "change",
    [
        {"training.gradient_checkpointing": False},
        {"training.fsdp": True},
        {"adapter.use_dora": True},
        {"quantization": {"method": "int8"}},
    ],
    ids=str,
)
def test_what_does_not_go_with_streaming(change: dict[str, Any], write_recipe: Any, lora: Any, tmp_path: Path) -> None:
    result = lora("train", write_recipe(change | {"training.stream_base": True}))
    assert result.exit_code == 2
    assert "training.stream_base" in result.stderr and not (tmp_path / "run").exists()


def test_offloaded_activations(
    tiny_gpt2: Path, write_recipe: Any, lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's input goes through host memory once per micro-batch, in pieces; none of its inner activations."""
    kept: list[torch.Size] = []

    def watched(tensor: torch.Tensor) -> Any:
        kept.append(tensor.shape)
        assert offload.to_host(tensor) is tensor or tensor.is_cuda, "what is in host memory is not copied"
        return offload.in_pieces(tensor)  # as from a GPU

    monkeypatch.setattr(step, "to_host", watched)
    monkeypatch.setattr(offload, "PIECE", 1000)
    adapters = []
    for value in (True, "offload"):
        folder = tmp_path / str(value)
        done(lora("train", write_recipe({"training.gradient_checkpointing": value, "training.output_dir": folder})))
        adapters.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
        if value is True:
            assert not kept
    assert adapters[0] == adapters[1]
    widths = [shape[-1] for shape in kept if len(shape) == 3]
    assert widths.count(WIDTH) >= 4 * 2 * 2, "steps x batches x layers"
    assert max(widths) == WIDTH, "an MLP's inner activations are recomputed, not kept"
    vocabulary = json.loads((tiny_gpt2 / "config.json").read_text())["vocab_size"]
    assert not any(vocabulary in shape for shape in kept), "the output layer's weight is not an activation"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_a_saved_tensor_comes_back_from_host_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE", 64)
    numbers = torch.arange(210, dtype=torch.float32).reshape(2, 3, 35).to(dtype)
    for tensor in (numbers, numbers.mT, numbers[0, 0, 1], numbers[:0], numbers[:, :, ::2], numbers.expand(4, 2, 3, 35)):
        device, shape, pieces = offload.in_pieces(tensor)
        assert max(piece.nbytes for piece in pieces) <= 64 and sum(piece.numel() for piece in pieces) == tensor.numel()
        back = offload.to_device((device, shape, pieces))
        assert back.dtype == dtype and torch.equal(back, tensor)


@pytest.mark.parametrize("streams", [False, True])
def test_offloading_takes_mlps_in_parts(
    streams: bool, write_recipe: Any, lora: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An MLP processes a long row in parts of ``MLP_TOKENS`` tokens, and the run is the same."""
    monkeypatch.setattr(activations, "MLP_TOKENS", 8)
    tokens: list[int] = []
    original = SwiGLU.apply

    def watched(gate: torch.Tensor, *others: Any) -> torch.Tensor:
        tokens.append(gate.shape[:-1].numel())
        product: torch.Tensor = original(gate, *others)
        return product

    monkeypatch.setattr(SwiGLU, "apply", watched)
    runs, most = [], []
    for value in (True, "offload"):
        tokens.clear()
        changes = {"training.gradient_checkpointing": value, "training.output_dir": tmp_path / str(value)}
        changes |= {"model.name_or_path": tiny_llama, "adapter.target_modules": "all-linear"}
        done(lora("train", write_recipe(changes | {"training.stream_base": streams})))
        runs.append(Run(tmp_path / str(value)))
        most.append(max(tokens))
    assert most[0] > 8 == most[1]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-5)
    assert runs[1].column("grad_norm") == pytest.approx(runs[0].column("grad_norm"), rel=1e-4)


@pytest.mark.parametrize(
    ("device", "room", "wanted"),
    [("cuda", "plain", False), ("cuda", "checkpointed", True), ("cuda", "none", "offload"), ("cpu", "none", True)],
)
def test_auto_offloads_when_checkpointing_alone_would_not_do(
    device: str, room: str, wanted: bool | str, write_recipe: Any
) -> None:
    job = prepare(load_recipe(write_recipe()), resume=False, overwrite=False)
    schedule = setup.make_schedule(job, packing=False, processes=1)
    batch = largest_batch(schedule.lengths, schedule.supervised, 2, job.max_length, False)
    needed = {"plain": activation_bytes(job.config, *batch, 4, whole_logits=True), "none": 0}
    needed["checkpointed"] = activation_bytes(job.config, *batch, 4, True, whole_logits=True)
    free = int(1.26 * needed[room])  # of which 4/5 may be used
    known = job, schedule, torch.float32, torch.device(device), free, True, True
    assert choose_checkpointing(*known)[0] == wanted
    assert choose_checkpointing(*known, kept=0.0)[0] == (wanted if room == "none" else False)
    assert choose_checkpointing(*known, kept=1e12)[0] == (True if device == "cpu" else "offload")


def test_a_run_says_that_it_recomputes_activations(write_recipe: Any, lora: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("lora_cli.training.distributed.sharding.free_bytes", lambda device: 0)
    told = " ".join(done(lora("train", write_recipe({"training.max_steps": 1}))).stderr.split())
    found = re.search(
        r"gradient_checkpointing: auto -> true: a batch's activations would take about (\d+)\.\d MB", told
    )
    assert found and int(found[1]) > 80, told


@pytest.fixture
def on_gpt_1(tokenizer: Any, write_recipe: Any, tmp_path: Path) -> Any:
    """Writes recipes for an architecture that has no gradient checkpointing."""
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return lambda **training: write_recipe({"model.name_or_path": tmp_path / "base", "training": training})


@pytest.mark.parametrize("wanted", [True, "offload"])
def test_an_architecture_that_cannot_recompute_activations_says_so(wanted: Any, on_gpt_1: Any, lora: Any) -> None:
    result = lora("train", on_gpt_1(gradient_checkpointing=wanted))
    assert result.exit_code == 2 and "this architecture cannot recompute its activations" in result.stderr
    assert "loading" not in result.stderr


def test_auto_recomputes_nothing_where_the_architecture_cannot(
    on_gpt_1: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory is free, neither for activations nor when the batch size is chosen."""
    monkeypatch.setattr("lora_cli.training.distributed.sharding.free_bytes", lambda device: 0)
    told = " ".join(done(lora("train", on_gpt_1(max_steps=1))).stderr.split())
    assert "gradient_checkpointing: auto -> false: " in told and "this architecture cannot recompute them" in told
    by_itself = on_gpt_1(max_steps=1, per_device_train_batch_size="auto", gradient_accumulation_steps=2)
    told = done(lora("train", by_itself, "--overwrite")).stderr
    assert "even that may not fit" in told and "activations recomputed" not in told
    monkeypatch.setattr("lora_cli.training.memory.out_of_memory.REMEDIES", 9)
    job = prepare(load_recipe(on_gpt_1(gradient_checkpointing=False)), resume=False, overwrite=True)
    told = str(out_of_memory(job, MemoryError(), checkpointing=False, streams=False).faults)
    assert "adapter.r=" in told and "gradient_checkpointing" not in told
