"""The proof after training: the adapter on disk is the trained one, and it has an effect. Otherwise, exit code 3."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, done, edit_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Zamba2Config

from lora_cli.errors import SecondaryError
from lora_cli.training import loop, proof
from lora_cli.training.proof import digests, prove

FILE = "adapter_model.safetensors"
SOME = "base_model.model.transformer.h.1.attn.c_attn"


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Apply ``change`` to the folder of each adapter that PEFT writes."""
    original = PeftModel.save_pretrained

    def save(model: PeftModel, folder: str, *args: Any, **kwargs: Any) -> None:
        original(model, folder, *args, **kwargs)
        change(Path(folder))

    monkeypatch.setattr(PeftModel, "save_pretrained", save)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / FILE)
        change(found)
        save_file(found, folder / FILE, {"format": "pt"})

    return rewrite


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def one_slice(found: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        found[name] = tensor[: len(tensor) // 2].contiguous()


def one_bit(found: dict[str, torch.Tensor]) -> None:
    found[f"{SOME}.lora_A.weight"].view(torch.int32)[0, 0] ^= 1


def renamed(found: dict[str, torch.Tensor]) -> None:
    found[f"{SOME}.lora_B.default.weight"] = found.pop(f"{SOME}.lora_B.weight")


SPOILED = {
    "a tensor left out": (
        tensors(lambda found: found.pop(f"{SOME}.lora_B.weight")),
        f"{SOME}.lora_B.weight is missing",
    ),
    "a tensor renamed": (tensors(renamed), f"{SOME}.lora_B.weight is missing"),
    "a tensor of zeros": (
        tensors(lambda found: found[f"{SOME}.lora_B.weight"].zero_()),
        "lora_B.weight has other values",
    ),
    "one rank's slice": (tensors(one_slice), "lora_A.weight has shape [2, 64], not [4, 64]"),
    "one bit": (tensors(one_bit), f"{SOME}.lora_A.weight has other values"),
    "in 16 bits": (tensors(lambda found: found.update({n: t.bfloat16() for n, t in found.items()})), "other values"),
    "another alpha": (config(lora_alpha=8.4), "reloaded from disk"),
    "another scaling": (config(use_rslora=True), "reloaded from disk"),
    "fewer targets": (config(target_modules=["c_proj"]), "reloaded from disk"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_was_written_otherwise_than_trained_is_found(
    name: str, write_recipe: Any, lora: Any, no_curves: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = write_recipe({"data.validation": 0.2}), tmp_path / "run"
    done(lora("train", recipe, f"training.output_dir={tmp_path / 'undisturbed'}"))
    change, says = SPOILED[name]
    with monkeypatch.context() as patch:
        spoil(patch, change)
        result = lora("train", recipe)
    assert result.exit_code == 3
    assert says in result.stderr and "Traceback" not in result.stderr and len(result.stderr) < 4000
    assert json.loads((run / "run.json").read_text())["finished"] is None
    assert not (run / "adapter").exists(), "what is not proven is not put in place"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]

    done(lora("train", recipe, "--resume"))
    assert (run / "adapter" / FILE).read_bytes() == (tmp_path / "undisturbed" / "adapter" / FILE).read_bytes()
    assert json.loads((run / "run.json").read_text())["finished"]


def held_still(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """Keep training from changing the weights whose names contain one of ``names``."""
    original = loop.take_step

    def step(trainer: Any, *args: Any) -> Any:
        kept = {name: weight.detach().clone() for name, weight in trainer.trained}
        result = original(trainer, *args)
        with torch.no_grad():
            for name, weight in trainer.trained:
                if any(part in name for part in names):
                    weight.copy_(kept[name])
        return result

    monkeypatch.setattr(loop, "take_step", step)


@pytest.mark.parametrize(
    ("still", "changes"),
    [
        (("h.1.attn.c_attn",), {}),
        (("h.1.attn.c_attn.lora_B",), {"training.weight_decay": 0.1}),  # A decays, yet the update stays zero
        (("h.1.attn.c_attn.lora_",), {"adapter.use_dora": True}),
        (("h.1.attn.c_attn",), {"adapter.init_from": "first/adapter"}),
        (("",), {"adapter.init_from": "first"}),
    ],
    ids=["lora", "B alone", "dora", "continued", "continued, all"],
)
def test_layers_that_did_not_move_are_named(
    still: tuple[str, ...],
    changes: dict[str, Any],
    write_recipe: Any,
    lora: Any,
    no_curves: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "adapter.init_from" in changes:
        done(lora("train", write_recipe({"training.output_dir": "first"})))
    held_still(monkeypatch, still)
    result = lora("train", write_recipe(changes))
    assert result.exit_code == 3
    assert "transformer.h.0.attn.c_attn" in result.stderr if still == ("",) else "h.1.attn.c_attn" in result.stderr
    told = "4 of 4 adapted layers" if still == ("",) else "1 of 4 adapted layers"
    assert told in result.stderr
    assert ("nothing was learned" in result.stderr) is (still == ("",))
    assert ("remove layers that the model does not use" in result.stderr) is (still != ("",))
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_magnitude_that_moved_is_an_update(
    write_recipe: Any, lora: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_still(monkeypatch, ("h.1.attn.c_attn.lora_A", "h.1.attn.c_attn.lora_B"))
    done(lora("train", write_recipe({"adapter.use_dora": True})))


def test_an_adapter_without_effect_is_refused(write_recipe: Any, lora: Any, no_curves: None) -> None:
    result = lora("train", write_recipe({"training.learning_rate": 1e-30}))
    assert result.exit_code == 3
    assert "changes no finite logit of a training row" in result.stderr
    assert "training.learning_rate" in result.stderr


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter.use_rslora": True, "data.packing": True},
        {"adapter.use_dora": True, "adapter.lora_dropout": 0.3},
        {"model.dtype": "bfloat16", "adapter.target_modules": "all-linear"},
        {"model.dtype": "bfloat16", "adapter.use_dora": True},
        {"quantization": {"method": "nf4"}, "adapter.target_modules": "all-linear"},
        {"quantization": {"method": "fp4"}, "model.dtype": "bfloat16"},
        {"quantization": {"method": "int8"}},
        {"training.gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_run_of_one_step_is_proven(
    base: str,
    changes: dict[str, Any],
    write_recipe: Any,
    lora: Any,
    no_curves: None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"tiny_{base}")
    one = {"model.name_or_path": folder, "training.max_steps": 1, "training.learning_rate": 1e-5}
    done(lora("train", write_recipe(one | changes)))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["learning_rate"] == 1e-5, "a ratio leaves a run of one step its learning rate"
    stored = load_file(tmp_path / "run" / "adapter" / FILE)
    assert all(bool(tensor.any()) for tensor in stored.values())


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"training.warmup_steps": 3, "training.max_steps": 1}, "recipe.yaml:"),
        ({"training.warmup_steps": 3, "training.max_steps": ..., "training.num_train_epochs": 0.1}, ""),
    ],
    ids=["max_steps", "epochs"],
)
def test_one_step_of_warmup_alone_is_refused(
    changes: dict[str, Any], where: str, write_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    result = lora("train", write_recipe(changes))
    assert result.exit_code == 2
    assert "training.warmup_steps" in result.stderr and where in result.stderr and "set it to 0" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_update_that_16_bits_do_not_show_is_held_against_its_file_enlarged(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[float] = []
    rescale = proof.rescale_adapter_scale
    monkeypatch.setattr(proof, "rescale_adapter_scale", lambda model, by: scales.append(by) or rescale(model, by))
    train({"model.dtype": "bfloat16", "training.learning_rate": 1e-7, "training.max_steps": 1})
    assert scales == [1, 1024, 1024]


def test_a_second_step_learns_behind_a_warmup_of_one(train: Callable[..., Run]) -> None:
    run = train({"training.warmup_steps": 1, "training.max_steps": 2})
    assert run.column("learning_rate") == [0.0, 0.005]


def test_what_a_follower_can_no_longer_read_has_its_cause_elsewhere(tmp_path: Path) -> None:
    """The first process removes what it could not prove, perhaps while another one opens it."""
    for read in (load_file, lambda path: torch.UntypedStorage.from_file(str(path), False, 8)):
        with pytest.raises(SecondaryError, match="could not be verified"), loop.follower_errors():
            read(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("dora", [False, True])
def test_the_proof_leaves_no_trace(dora: bool, tiny_llama: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    options = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], use_dora=dora, lora_dropout=0.5
    )
    model = get_peft_model(base, options)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    start = digests(weights)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(0.1)
    model.save_pretrained(str(tmp_path))
    model.train()

    def state() -> Any:
        keys, place = np.random.get_state()[1:3]
        return (
            [torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), place],
            {name: module.training for name, module in model.named_modules()},
            {
                name: (weight.requires_grad, weight.dtype, weight.data_ptr())
                for name, weight in model.named_parameters()
            },
            {name: weight.sum().item() for name, weight in model.named_parameters()},
            (model.active_adapter, list(model.peft_config), torch.is_grad_enabled()),
        )

    before = state()
    prove(tmp_path, "run", model, weights, start, [torch.arange(5, 25)])
    assert state() == before


def test_layers_that_no_gradient_comes_to_are_told_after_the_first_step(
    tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Zamba2, each use of a shared block holds the layers of all uses, of which it runs only its own. They are not
    adapted; here they stand for those of a model that nobody has looked at."""
    monkeypatch.setattr("lora_cli.model.targets.UNTRAINED", re.compile("(?!)"))
    base = shutil.copytree(tiny_llama, tmp_path / "zamba", ignore=shutil.ignore_patterns("*.safetensors"))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "attention_head_dim": 16}
    mamba = {"n_mamba_heads": 4, "mamba_headdim": 16, "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8}
    layers = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
    config = Zamba2Config(vocab_size=400, num_mem_blocks=1, adapter_rank=4, **shape, **mamba, **layers)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    changes = {"model.name_or_path": base, "adapter.target_modules": "all-linear", "training.logging_steps": 1}
    result = lora("train", write_recipe(changes))
    assert result.exit_code == 3
    told = "warning: 4 of 26 adapted layers got no gradient in the first step: model.layers.1.shared_transformer"
    assert result.stderr.index(told) < result.stderr.index("step 1  loss")
    assert "4 of 26 adapted layers were not changed by training" in result.stderr
