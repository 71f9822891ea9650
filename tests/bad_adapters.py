"""Adapters that are damaged, of another kind, or of another base."""

from __future__ import annotations

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


@case("lora_A", "does not fit its base", "another base")
def adapter_of_other_names(w: World) -> Arguments:
    w.run()
    _forget_base(w)
    shutil.rmtree(w.root / "base")
    w.model("llama", "base")
    return ["merge", "run", "--out", "out"]


@case("48 -> 96", "the base's is 32 -> 96", "does not fit its base", "another base")
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
