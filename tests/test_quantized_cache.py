"""A base quantized for a run is kept for the next run. Training on it equals training on a base quantized at load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, done, edited_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from lora_cli.model.device import has_units_for
from lora_cli.recipe.schema import Quantization
from lora_cli.training import setup
from lora_cli.training.setup import set_up
from lora_cli.weights import quantized_cache

QUANTIZING = "quantizing it to"
METHODS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)]


@pytest.fixture
def quantized(tmp_path: Path, write_recipe: Any, lora: Any, no_curves: None) -> Callable[..., tuple[Run, bool]]:
    """``quantized("name", changes)`` trains, and returns the run and whether its base was quantized for it."""

    def go(name: str, changes: dict[str, Any] | None = None) -> tuple[Run, bool]:
        folder = tmp_path / name
        section = {"quantization": {"method": "nf4", "compute_dtype": "float32"}}
        recipe = write_recipe(section | {"training.output_dir": folder} | (changes or {}))
        result = done(lora("train", recipe, "--overwrite"))
        return Run(folder), QUANTIZING in result.stderr

    return go


def kept_in(run: Run) -> list[Path]:
    return sorted((run.folder / "cache").glob("*base-*"))


@pytest.mark.parametrize(("method", "double_quant"), METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_name", ["gpt2", "llama"])
def test_trains_as_if_quantized_at_load(
    base_name: str,
    method: str,
    double_quant: bool,
    dtype: str,
    request: Any,
    quantized: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {
        "model.name_or_path": request.getfixturevalue(f"tiny_{base_name}"),
        "model.dtype": dtype,
        "adapter.target_modules": "all-linear",
        "quantization": {"method": method, "double_quant": double_quant, "compute_dtype": dtype},
        "training.max_steps": 2,
    }
    first, made = quantized("first/run", changes)
    learned = first.losses, first.adapter_bytes
    again, made_again = quantized("first/run", changes)
    assert made and not made_again
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.training.setup.cached_base", lambda *_: None)
        plain, _ = quantized("second/run", changes)
    assert learned == (again.losses, again.adapter_bytes) == (plain.losses, plain.adapter_bytes)


def test_an_adapter_starts_alike_on_a_model_that_draws_numbers_when_it_is_made(
    quantized: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Qwen3-Next is such a model: to quantize it, its joined experts require building the complete model."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2}
    sizes |= {"num_experts_per_tok": 1, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    config = Qwen3NextConfig(**sizes, layer_types=["linear_attention"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = {"model.name_or_path": tmp_path / "base", "adapter.target_modules": "all-linear", "training.max_steps": 1}
    first, made = quantized("first", changes)
    second, made_again = quantized("second", changes)
    assert made and not made_again
    assert first.adapter_bytes == second.adapter_bytes


def test_a_run_beside_takes_it(quantized: Any) -> None:
    first, made = quantized("first")
    second, made_again = quantized("second")
    assert (made, made_again) == (True, False)
    (here,), (there,) = kept_in(second), kept_in(first)
    assert (here / "model.safetensors").samefile(there / "model.safetensors")
    assert first.losses == second.losses


def test_what_another_user_keeps_is_not_taken(quantized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs may be side by side in /tmp, where all users can write."""
    first, _ = quantized("first")
    (folder,) = kept_in(first)
    monkeypatch.setattr("os.getuid", lambda: folder.stat().st_uid + 1)
    second, made = quantized("second")
    assert made and len(kept_in(second)) == 1
    assert first.losses == second.losses


@pytest.mark.parametrize("with_cache", [False, True])
def test_one_that_is_removed_while_it_is_looked_for_is_made(
    with_cache: bool, quantized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = quantized("first")
    (folder,) = kept_in(first)
    gone = folder.parent if with_cache else folder
    glob = Path.glob

    def removed(path: Path, pattern: str) -> list[Path]:
        found = list(glob(path, pattern))
        if gone in found:
            shutil.rmtree(gone)
        return found

    monkeypatch.setattr(Path, "glob", removed)
    second, made = quantized("second")
    assert made and len(kept_in(second)) == 1 and not folder.exists()
    assert first.losses == second.losses


@pytest.mark.parametrize(("once", "stream"), [((setup, "find_cached"), True), ((Path, "hardlink_to"), False)])
def test_one_that_is_removed_once_it_is_found_or_half_taken_over_is_made(
    once: tuple[Any, str], stream: bool, quantized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training.stream_base": stream, "training.gradient_checkpointing": True}
    first, _ = quantized("first", changes)
    (folder,) = kept_in(first)
    find_or_link = getattr(*once)

    def removed(*args: Any) -> Any:
        found = find_or_link(*args)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    monkeypatch.setattr(*once, removed)
    second, made = quantized("second", changes)
    assert made and len(kept_in(second)) == 1 and not folder.exists()
    assert first.losses == second.losses


@pytest.mark.parametrize("links", [True, False])
def test_one_that_is_streamed_from_a_run_beside_outlives_it(
    links: bool, quantized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = {"training.stream_base": True, "training.gradient_checkpointing": True}
    wanted, _ = quantized("undisturbed", streamed)
    (source,) = kept_in(wanted)

    def no_links(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    def set_up_and_remove(*args: Any) -> Any:
        trainer = set_up(*args)
        linked.append((source / "model.safetensors").samefile(trainer.cached_base / "model.safetensors"))
        shutil.rmtree(source)
        return trainer

    linked: list[bool] = []
    monkeypatch.setattr("lora_cli.training.loop.set_up", set_up_and_remove)
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    run, made = quantized("run", streamed)
    assert not made and linked == [links]
    assert [folder.name for folder in kept_in(run)] == [source.name]
    assert run.losses == wanted.losses and run.adapter_bytes == wanted.adapter_bytes


def test_the_adapter_is_for_the_base_itself(quantized: Any, tiny_gpt2: Path, qa_file: Path, lora: Any) -> None:
    run, _ = quantized("run")
    again, _ = quantized("run")
    for told in (
        again.info["base"]["name_or_path"],
        again.config["base_model_name_or_path"],
        json.loads((again.folder / "adapter" / "provenance.json").read_text())["base"]["name_or_path"],
    ):
        assert told == str(tiny_gpt2)
    assert "base-" not in (again.folder / "adapter" / "README.md").read_text()
    before = done(lora("eval", run.folder, "--data", qa_file, "--json")).json
    shutil.rmtree(again.folder / "cache")
    assert done(lora("eval", run.folder, "--data", qa_file, "--json")).json == before
    merged = done(lora("merge", run.folder / "adapter", "--out", run.folder.parent / "merged", "--json")).json
    assert merged["into"] == "the base in nf4, expanded"


def test_every_other_base_or_recipe_has_its_own(quantized: Any, tiny_gpt2: Path, tmp_path: Path) -> None:
    """A kept base that the run no longer uses is removed."""
    base = shutil.copytree(tiny_gpt2, tmp_path / "bases" / "base")
    own = {"model.name_or_path": base}
    names = set()

    def trained(changes: dict[str, Any], anew: bool) -> None:
        run, made = quantized("run", own | changes)
        assert made == anew, changes
        names.update(path.name for path in kept_in(run))
        assert len(kept_in(run)) == 1

    trained({}, anew=True)
    trained({"adapter.r": 2}, anew=False)
    has_units = has_units_for(torch.bfloat16, torch.device("cpu"))  # without them it computes in float32 anyway
    for changes in ({"method": "fp4"}, {"double_quant": False}, *[{"compute_dtype": "bfloat16"}] * has_units):
        trained({"quantization": {"method": "nf4", "compute_dtype": "float32"} | changes}, anew=True)
    trained({"model.dtype": "bfloat16"}, anew=True)
    with edited_weights(base) as weights:
        weights["transformer.h.0.ln_1.weight"] += 1
    trained({"model.dtype": "bfloat16"}, anew=True)
    weights["transformer.wte.weight"][100] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    trained({"model.dtype": "bfloat16"}, anew=True)
    assert len(names) == 6 + has_units
    run, _ = quantized("run", own | {"quantization": ...})
    assert not kept_in(run)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "config", "sums", "draft"])
def test_a_damaged_one_is_made_again(damage: str, quantized: Any) -> None:
    run, _ = quantized("run")
    (kept,) = kept_in(run)
    weights = kept / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "flip":
        middle = len(whole) // 2
        weights.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "cut":
        weights.write_bytes(whole[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "config":
        (kept / "config.json").write_text((kept / "config.json").read_text().replace('"nf4"', '"fp4"'))
    elif damage == "sums":
        (kept / "sha256.json").write_text("{")
    else:  # killed while it was written
        kept.rename(kept.with_name(f".{kept.name}.x1y2"))
    losses = run.losses
    again, made = quantized("run")
    assert made and again.losses == losses
    assert kept_in(again) == [kept] and weights.read_bytes() == whole


def test_of_two_that_make_it_the_first_wins(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes on two machines may share a disk: the later one must not replace the files of the first."""
    folder, write = tmp_path / "cache" / "base", quantized_cache.write_quantized
    settings = (tiny_llama, folder, Quantization(method="nf4"), torch.float32, torch.float32)

    def overtaken(*args: Any, **keywords: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(quantized_cache, "write_quantized", write)
            quantized_cache.write_cached(*settings)
        firsts.extend(file.stat().st_ino for file in sorted(folder.iterdir()))
        return write(*args, **keywords)

    firsts: list[int] = []
    monkeypatch.setattr(quantized_cache, "write_quantized", overtaken)
    quantized_cache.write_cached(*settings)
    assert [file.stat().st_ino for file in sorted(folder.iterdir())] == firsts
    assert [path.name for path in folder.parent.iterdir()] == ["base"]


@pytest.mark.parametrize("when", ["before", "at its folder", "while writing"])
def test_without_room_it_is_quantized_at_load(
    when: str, quantized: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_recipe: Any, lora: Any
) -> None:
    wanted, _ = quantized("there/run")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if when == "before":
        monkeypatch.setattr("lora_cli.weights.quantized_cache.weight_files", lambda _: [sparse(tmp_path / "huge")])
    elif when == "at its folder":
        mkdtemp = tempfile.mkdtemp
        monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **how: full() if ".base-" in str(how) else mkdtemp(**how))
    else:
        monkeypatch.setattr("lora_cli.weights.quantized_cache.write_quantized", full)
    changes = {"quantization": {"method": "nf4", "compute_dtype": "float32"}}
    recipe = write_recipe(changes | {"training.output_dir": tmp_path / "here" / "run"})
    result = done(lora("train", recipe))
    assert "is not kept for the next run" in result.stderr and "free" in result.stderr
    run = Run(tmp_path / "here" / "run")
    assert run.losses == wanted.losses and not kept_in(run)


def sparse(path: Path) -> Path:
    """A sparse file of 4 TiB, which takes no disk space."""
    with path.open("wb") as file:
        file.truncate(2**42)
    return path


def test_nothing_stays_of_a_refused_run(tmp_path: Path, write_recipe: Any, lora: Any) -> None:
    """That warm-up takes the only step of packed rows is known only once the base is loaded."""
    changes = {
        "quantization.method": "nf4",
        "data.packing": True,
        "training.max_steps": ...,
        "training.num_train_epochs": 1,
        "training.gradient_accumulation_steps": 8,
        "training.warmup_steps": 1,
    }
    result = lora("train", write_recipe(changes | {"training.output_dir": tmp_path / "run"}))
    assert result.exit_code == 2
    assert QUANTIZING in result.stderr and "warmup_steps" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_what_the_folders_own_has_kept(train: Callable[..., Run], lora: Any) -> None:
    one_step = {"max_steps": ..., "num_train_epochs": 1, "gradient_accumulation_steps": 8}
    changes = {"quantization.method": "nf4", "data.packing": True}
    run = train(changes | {f"training.{key}": value for key, value in one_step.items()})
    before = sorted(run.folder.rglob("*"))
    refused = lora("train", run.folder / "recipe.yaml", "training.warmup_steps=1", "--overwrite")
    assert refused.exit_code == 2 and "warmup_steps" in refused.stderr
    assert sorted(run.folder.rglob("*")) == before


def test_weights_that_are_no_numbers_are_refused(
    tiny_llama: Path, tmp_path: Path, write_recipe: Any, lora: Any
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    with edited_weights(base) as weights:
        weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    result = lora("train", write_recipe({"model.name_or_path": base, "quantization.method": "int8"}))
    assert result.exit_code == 2
    assert "model.layers.1.mlp.up_proj.weight" in result.stderr and not (tmp_path / "run").exists()


def test_what_could_not_be_loaded_again_is_quantized_at_load(
    joined: Path, quantized: Any, write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"model.name_or_path": joined, "adapter.target_modules": "all-linear", "data.max_length": 32}
    run, _ = quantized("run", changes)
    assert not kept_in(run)
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.training.setup.cached_base", lambda *_: None)
        plain, _ = quantized("plain", changes)
    assert run.losses == plain.losses and run.adapter_bytes == plain.adapter_bytes
    streamed = {"training.output_dir": tmp_path / "streamed", "training.stream_base": True}
    result = lora("train", write_recipe(changes | streamed | {"quantization": {"method": "nf4"}}))
    assert result.exit_code == 3 and "is not kept for the next run: its layers are stored joined" in result.stderr
