"""Adapters that are damaged, of another kind, or of another base."""

from __future__ import annotations

import json
import shutil
from typing import Any

from bad_input import LFS, ROW, Arguments, World, case


@case("run/adapter/adapter_model.safetensors", "not a whole safetensors file")
def adapter_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/adapter_model.safetensors", LFS)
    return ["eval", "run", "--data", w.rows(ROW)]


@case("run/adapter/adapter_config.json")
def adapter_config_that_is_a_list(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/adapter_config.json", "[]")
    return ["eval", "run", "--data", w.rows(ROW)]


@case("run/adapter/provenance.json")
def provenance_that_is_broken(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/provenance.json", "{")
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "h.9.attn.c_attn")
def adapter_with_a_tensor_too_many(w: World) -> Arguments:
    w.run()

    def add(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "h.1.attn.c_attn" in name]:
            tensors[name.replace("h.1.", "h.9.")] = tensors[name].clone()

    w.tensors("run/adapter/adapter_model.safetensors", add)
    return ["eval", "run", "--data", w.rows(ROW)]


@case("no adapter here", "adapter_config.json", "give a run or an adapter folder")
def merge_of_no_adapter(w: World) -> Arguments:
    w.file("folder/x", "")
    return ["merge", "folder", "--out", "out"]


@case("run/adapter/adapter_config.json", "line 1")
def broken_adapter_config(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/adapter_config.json", "{")
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "adapter_model.safetensors", "missing")
def adapter_without_weights(w: World) -> Arguments:
    (w.root / w.run() / "adapter" / "adapter_model.safetensors").unlink()
    return ["merge", "run", "--out", "out"]


@case("run/adapter/adapter_model.safetensors", "not a whole safetensors file")
def truncated_adapter(w: World) -> Arguments:
    w.truncate(w.run() / "adapter" / "adapter_model.safetensors")
    return ["merge", "run", "--out", "out"]


@case("PREFIX_TUNING", "run/adapter")
def adapter_of_another_kind(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", peft_type="PREFIX_TUNING")
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "base that this adapter is for is not found", "no such model folder", "put it back")
def base_missing(w: World) -> Arguments:
    w.run()
    shutil.rmtree(w.root / "base")
    return ["merge", "run", "--out", "out"]


def _other_weights(tensors: dict[str, Any]) -> None:
    for tensor in tensors.values():
        tensor += 1.0


@case("run/adapter", "another base", "restore that base")
def base_changed(w: World) -> Arguments:
    w.run()
    w.tensors("base/model.safetensors", _other_weights)
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "another base")
def base_changed_before_eval(w: World) -> Arguments:
    w.run()
    w.tensors("base/model.safetensors", _other_weights)
    return ["eval", "run", "--data", w.rows(ROW)]


def _forget_base(w: World) -> None:
    """An adapter made elsewhere says no more of its base than a name."""
    (w.root / "run" / "adapter" / "provenance.json").unlink()


@case("lora_A", "does not fit its base", "belongs to another")
def adapter_of_other_names(w: World) -> Arguments:
    w.run()
    _forget_base(w)
    shutil.rmtree(w.root / "base")
    w.model("llama", "base")
    return ["merge", "run", "--out", "out"]


@case("48 -> 192", "the base's is 64 -> 192", "does not fit its base", "belongs to another")
def adapter_of_other_shapes(w: World) -> Arguments:
    w.run()
    _forget_base(w)

    def widen(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("c_attn.lora_A.weight"):
                tensors[name] = tensor.new_zeros(tensor.shape[0], 48)

    w.tensors("run/adapter/adapter_model.safetensors", widen)
    return ["merge", "run", "--out", "out"]


@case("h.0.attn.c_attn.lora_B.weight is missing")
def adapter_without_a_tensor(w: World) -> Arguments:
    w.run()

    def drop(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith("h.0.attn.c_attn.lora_B.weight"))]

    w.tensors("run/adapter/adapter_model.safetensors", drop)
    return ["merge", "run", "--out", "out"]


@case("h.1.attn.c_attn", "missing")
def adapter_without_a_layer(w: World) -> Arguments:
    w.run()

    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "h.1.attn.c_attn" in name]:
            del tensors[name]

    w.tensors("run/adapter/adapter_model.safetensors", drop)
    return ["eval", "run", "--data", w.rows(ROW)]


@case("folder", "no adapter here")
def start_from_no_adapter(w: World) -> Arguments:
    w.file("folder/x", "")
    return w.train({"adapter.init_from": "folder"})


@case("run/adapter", "another base")
def start_from_an_adapter_of_another_base(w: World) -> Arguments:
    w.run()
    w.tensors("base/model.safetensors", _other_weights)
    return w.train({"adapter.init_from": "run/adapter", "model.name_or_path": "base"})


@case("run/adapter", "not a whole safetensors file")
def start_from_a_truncated_adapter(w: World) -> Arguments:
    w.run()
    w.truncate("run/adapter/adapter_model.safetensors")
    return w.train({"adapter.init_from": "run/adapter", "model.name_or_path": "base"})


@case("adapter.r: 8", "4 in the adapter of init_from")
def start_from_an_adapter_of_another_rank(w: World) -> Arguments:
    w.run()
    return w.train(
        {"adapter.init_from": "run/adapter", "model.name_or_path": "base", "adapter.r": 8, "training.output_dir": "new"}
    )


WEIGHTS = "run/adapter/adapter_model.safetensors"
CONFIG = "run/adapter/adapter_config.json"


def fill(w: World, value: float) -> None:
    w.run()
    w.tensors(WEIGHTS, lambda tensors: next(iter(tensors.values())).view(-1)[3:4].fill_(value))


@case(WEIGHTS, "c_attn.lora_A.weight holds NaN or infinity", "diverged")
def adapter_with_a_nan(w: World) -> Arguments:
    fill(w, float("nan"))
    return ["merge", "run", "--out", "out"]


@case(WEIGHTS, "c_attn.lora_A.weight holds NaN or infinity")
def adapter_with_an_infinity(w: World) -> Arguments:
    fill(w, float("inf"))
    return ["eval", "run", "--data", w.rows(ROW)]


@case(WEIGHTS, "holds NaN or infinity")
def start_from_an_adapter_with_a_nan(w: World) -> Arguments:
    fill(w, float("nan"))
    return w.train({"adapter.init_from": "run/adapter", "model.name_or_path": "base", "training.output_dir": "new"})


@case("run/adapter", "FOO", "LoRA adapters are")
def adapter_of_an_unknown_kind(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", peft_type="FOO")
    return ["eval", "run", "--data", w.rows(ROW)]


@case(CONFIG, "no peft_type")
def adapter_of_no_kind(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", peft_type=...)
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "rank 4", "r: 8")
def adapter_config_of_another_rank(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", r=8)
    return ["merge", "run", "--out", "out"]


@case(CONFIG, "r")
def adapter_config_with_text_for_a_rank(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", r="four")
    return ["eval", "run", "--data", w.rows(ROW)]


@case(CONFIG, "r")
def adapter_config_with_a_rank_of_zero(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", r=0)
    return ["merge", "run", "--out", "out"]


@case(CONFIG, "lora_alpha")
def adapter_config_with_a_nan(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", lora_alpha=float("nan"))
    return ["merge", "run", "--out", "out"]


@case(CONFIG, "target_modules")
def adapter_config_with_a_broken_pattern(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", target_modules="(c_attn")
    return ["eval", "run", "--data", w.rows(ROW)]


@case(CONFIG, "target_modules")
def adapter_config_that_targets_numbers(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", target_modules=[1, 2])
    return ["eval", "run", "--data", w.rows(ROW)]


@case("run/adapter", "c_fc")
def adapter_config_of_more_layers(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", target_modules=["c_attn", "c_fc"])
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "magnitude")
def dora_without_its_magnitudes(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", use_dora=True)
    return ["eval", "run", "--data", w.rows(ROW)]


@case("run/adapter", "something.else")
def adapter_with_a_foreign_tensor(w: World) -> Arguments:
    w.run()
    w.tensors(WEIGHTS, lambda tensors: tensors.update({"something.else": next(iter(tensors.values())).clone()}))
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "no LoRA tensors")
def adapter_without_a_lora_tensor(w: World) -> Arguments:
    w.run()
    w.tensors(WEIGHTS, lambda tensors: tensors.clear())
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "for a layer of 4 -> 4")
def adapter_of_vectors(w: World) -> Arguments:
    w.run()

    def flatten(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].reshape(-1)[:4]

    w.tensors(WEIGHTS, flatten)
    return ["merge", "run", "--out", "out"]


@case("run/adapter/adapter_config.json", "does not say which base")
def adapter_that_names_no_base(w: World) -> Arguments:
    w.run()
    _forget_base(w)
    w.edit_json(CONFIG, base_model_name_or_path=None)
    return ["merge", "run", "--out", "out"]


@case("run/adapter/provenance.json")
def provenance_with_numbers_for_names(w: World) -> Arguments:
    w.run()
    w.edit_json("run/adapter/provenance.json", base={"name_or_path": 7, "relative_path": 8, "fingerprint": 9})
    return ["merge", "run", "--out", "out"]


@case("run/adapter/provenance.json", "recipe")
def provenance_with_a_recipe_that_is_none(w: World) -> Arguments:
    w.run()
    w.edit_json("run/adapter/provenance.json", recipe={"model": 5})
    return ["eval", "run", "--data", w.rows(ROW)]


@case("run/adapter/provenance.json", "not an adapter's record")
def provenance_with_an_unknown_dtype(w: World) -> Arguments:
    w.run()
    record = json.loads((w.root / "run/adapter/provenance.json").read_text())
    recipe = record["recipe"] | {"quantization": {"method": "nf4"}}
    w.edit_json("run/adapter/provenance.json", dtype="float7", recipe=recipe)
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "pickled weights are not read")
def pickled_adapter(w: World) -> Arguments:
    w.run()
    (w.root / WEIGHTS).rename(w.root / "run/adapter/adapter_model.bin")
    return ["eval", "run", "--data", w.rows(ROW)]
