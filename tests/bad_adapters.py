"""Adapters that are damaged, of another kind, or of another base."""

from __future__ import annotations

import json
import os
import shutil
import warnings
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


def trainers(w: World) -> None:
    """Write a Trainer's output folder with two checkpoints of an adapter. The newer one comes first by name."""
    for number, name in enumerate(("checkpoint-90", "checkpoint-100")):
        w.file(f"trainer/{name}/adapter_config.json", "{}")
        os.utime(w.root / f"trainer/{name}/adapter_config.json", (number, number))


@case("trainer: no adapter here", "give the adapter in it: trainer/checkpoint-100")
def merge_of_a_trainers_folder(w: World) -> Arguments:
    trainers(w)
    return ["merge", "trainer", "--out", "out"]


@case("trainer: holds no model", "give the adapter in it: trainer/checkpoint-100")
def eval_of_a_trainers_folder(w: World) -> Arguments:
    trainers(w)
    return ["eval", "trainer", "--data", w.rows(ROW)]


@case("run/adapter/adapter_model.safetensors", "no adapter here", "give a run or an adapter folder")
def merge_of_a_file(w: World) -> Arguments:
    w.run()
    return ["merge", "run/adapter/adapter_model.safetensors", "--out", "out"]


@case("rum", "no adapter here", "did you mean 'run'?")
def merge_of_a_misspelt_run(w: World) -> Arguments:
    w.run()
    return ["merge", "rum", "--out", "out"]


@case("rows.jsonl", "no token to predict")
def merge_verified_on_rows_without_words(w: World) -> Arguments:
    return ["merge", w.run(), "--out", "out", "--data", w.rows({"text": ""})]


@case("run/adapter/adapter_config.json", "line 1")
def broken_adapter_config(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/adapter_config.json", "{")
    return ["merge", "run", "--out", "out"]


@case("run/adapter/adapter_config.json", "not readable")
def adapter_config_nested_without_end(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/adapter_config.json", "[" * 100_000)
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


@case("run/adapter", "the base of this adapter is not found", "no such model folder", "put it back")
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
    """Remove the adapter's record: an adapter made by another tool states only its base's name."""
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
    return _without(w, "h.0.attn.c_attn.lora_B.weight")


@case("h.0.attn.c_attn.lora_A.weight is missing")
def adapter_without_a_layers_first_tensor(w: World) -> Arguments:
    return _without(w, "h.0.attn.c_attn.lora_A.weight")


def _without(w: World, tensor: str) -> Arguments:
    w.run()

    def drop(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith(tensor))]

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


@case("has layers that are not trained here: lm_head", "merge it into its base with lora merge")
def start_from_an_adapter_of_the_head(w: World) -> Arguments:
    made(w, target_modules=["lm_head", "q_proj"])
    return w.train({"adapter.init_from": "adapter", "model.name_or_path": w.llama, "adapter.r": 4})


@case(
    "the recipe adapts 2 layers, the adapter of init_from 2; only one of them has "
    "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj and 2 more",
    "use the adapter's own value in the recipe: target_modules: q_proj",
)
def start_from_an_adapter_of_as_many_other_layers(w: World) -> Arguments:
    made(w, target_modules=["q_proj"])
    adapter = {"init_from": "adapter", "target_modules": ["v_proj"], "r": 4}
    return w.train({"adapter": adapter, "model.name_or_path": w.llama})


@case(
    "the recipe adapts 2 layers, the adapter of init_from 1; only one of them has transformer.h.1.attn.c_attn",
    "use the adapter's own value in the recipe: target_modules: c_attn, layers_to_transform: [0]",
)
def start_from_an_adapter_of_one_layer(w: World) -> Arguments:
    made(w, "gpt2", target_modules=["transformer.h.0.attn.c_attn"])
    recipe = {"adapter": {"target_modules": ["c_attn"], "layers_to_transform": [0]}}
    required = {"model": {"name_or_path": "x"}, "data": {"train": "x"}, "training": {"output_dir": "x"}}
    w.file("adapter/provenance.json", json.dumps({"recipe": required | recipe}))
    adapter = {"init_from": "adapter", "target_modules": ["c_attn"], "r": 4}
    return w.train({"adapter": adapter, "model.name_or_path": w.gpt2})


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


@case(CONFIG, "no peft_type", "PEFT's layout")
def adapter_of_no_kind(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", peft_type=...)
    return ["merge", "run", "--out", "out"]


@case(CONFIG, "no peft_type")
def quantize_of_an_adapter_of_no_kind(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", peft_type=...)
    return ["quantize", "run", "--out", "out"]


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


@case(CONFIG, "r is True, expected a whole number of at least 1", "lora_alpha is True, expected a number")
def merge_with_true_for_numbers(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", r=True, lora_alpha=True)
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


@case("run/adapter: tensor else does not belong in a LoRA adapter")
def adapter_with_a_tensor_of_no_module(w: World) -> Arguments:
    w.run()
    w.tensors(WEIGHTS, lambda tensors: tensors.update({"else": next(iter(tensors.values())).clone()}))
    return ["merge", "run", "--out", "out"]


@case("run/adapter: tensor else replaces the base's")
def a_difference_from_an_adapter_with_a_tensor_of_no_module(w: World) -> Arguments:
    adapter_with_a_tensor_of_no_module.arguments(w)
    w.edit_json("run/adapter/adapter_config.json", modules_to_save=["else"])
    shutil.copytree(w.root / "run/adapter", w.root / "other")
    return ["adapters", "diff", "run", "other"]


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


@case("run/adapter/adapter_config.json", "does not say which base", "write it there as base_model_name_or_path")
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


@case("run/adapter/provenance.json", "not an adapter's record")
def provenance_with_words_for_versions(w: World) -> Arguments:
    w.run()
    w.edit_json("run/adapter/provenance.json", versions="the newest")
    return ["adapters", "show", "run"]


@case("run/adapter/provenance.json", "not an adapter's record")
def provenance_made_of_a_number(w: World) -> Arguments:
    w.run()
    w.edit_json("run/adapter/provenance.json", made={"by": "compose", "of": 3})
    return ["adapters", "show", "run"]


@case("run/adapter/provenance.json", "not an adapter's record")
def provenance_with_a_word_for_the_validation_rows(w: World) -> Arguments:
    w.run()
    w.edit_json("run/adapter/provenance.json", data={"validation": {"fingerprint": "y"}})
    return ["eval", "run", "--data", w.rows(ROW)]


@case("run/checkpoints/step-00000001: no adapter", "a checkpoint is for --resume only; give the run (run)")
def merge_of_a_checkpoint(w: World) -> Arguments:
    w.run()
    w.file("run/checkpoints/step-00000001/manifest.json", "{}")
    return ["merge", "run/checkpoints/step-00000001", "--out", "out"]


@case("run/checkpoints/step-00000001", "no config.json", "give the run (run)")
def eval_of_a_checkpoint(w: World) -> Arguments:
    w.run()
    w.file("run/checkpoints/step-00000001/manifest.json", "{}")
    return ["eval", "run/checkpoints/step-00000001", "--data", w.rows(ROW)]


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


def made(w: World, kind: str = "llama", drop: str = "", grown: str = "", **config: Any) -> str:
    """Save an adapter made by PEFT alone. Tensors named ``drop`` are left out; those named ``grown`` get a row more."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(w.root / kind if kind == "mixtral" else getattr(w, kind))
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    return _saved(
        w, base, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": targets} | config), drop, grown
    )


def _saved(w: World, base: Any, config: Any, drop: str = "", grown: str = "") -> str:
    from peft import get_peft_model

    with warnings.catch_warnings(action="ignore"):  # PEFT warns about some adapters that lora has to refuse
        get_peft_model(base, config).save_pretrained(str(w.root / "adapter"), save_embedding_layers=False)

    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            if drop and drop in name:
                del tensors[name]
            elif grown and grown in name:
                tensors[name] = tensors[name].new_zeros(len(tensors[name]) + 1, *tensors[name].shape[1:])

    w.tensors("adapter/adapter_model.safetensors", change)
    return "adapter"


def experts(w: World) -> None:
    """Save a model whose experts are stored one by one to ``mixtral``, with tiny_llama's tokenizer."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 12, "num_local_experts": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    shutil.copytree(w.llama, w.root / "mixtral", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads)).save_pretrained(w.root / "mixtral")


def merge(adapter: str) -> Arguments:
    return ["merge", adapter, "--out", "out", "--no-verify"]


def quantize(adapter: str) -> Arguments:
    return ["quantize", adapter, "--out", "out"]


def resize(adapter: str) -> Arguments:
    return ["adapters", "resize", adapter, "--rank", "2", "--out", "out"]


def compose(adapter: str) -> Arguments:
    return ["adapters", "compose", f"{adapter}=1.0", f"{adapter}=0.5", "--method", "cat", "--out", "out"]


@case("self_attn.q_proj.lora_A.weight does not have PEFT's name for it", "its names begin with base_model.model.")
def eval_of_names_that_peft_passes_over(w: World) -> Arguments:
    adapter = made(w)

    def shorten(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    w.tensors("adapter/adapter_model.safetensors", shorten)
    return ["eval", adapter, "--data", w.rows(ROW)]


@case("the names of this base's layers in Transformers 4", "load it on its base with PEFT and save it again")
def router_by_its_former_name(w: World) -> Arguments:
    experts(w)
    adapter = made(w, "mixtral", target_modules=["q_proj"], target_parameters=["gate.weight"])

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(".mlp.", ".block_sparse_moe.")] = tensors.pop(name)

    w.tensors("adapter/adapter_model.safetensors", rename)
    return merge(adapter)


BY_PATTERN = r".*\.(q_proj|v_proj)"
GONE = "layers.1.self_attn.v_proj"
MADE_CONFIG = "adapter/adapter_config.json"
BOTH_GONE = (f"model.{GONE}.lora_A.weight is missing", f"model.{GONE}.lora_B.weight is missing")


@case(*BOTH_GONE)
def layer_of_a_pattern_that_is_missing(w: World) -> Arguments:
    return merge(made(w, drop=GONE, target_modules=BY_PATTERN))


@case(*BOTH_GONE)
def quantize_without_a_layer_of_a_pattern(w: World) -> Arguments:
    return quantize(made(w, drop=GONE, target_modules=BY_PATTERN))


@case(*BOTH_GONE)
def eval_without_a_layer_of_a_pattern(w: World) -> Arguments:
    return ["eval", made(w, drop=GONE, target_modules=BY_PATTERN), "--data", w.rows(ROW)]


@case(*BOTH_GONE)
def layer_by_its_number_that_is_missing(w: World) -> Arguments:
    return merge(made(w, drop=GONE, layers_to_transform=[1]))


@case("model.embed_tokens.lora_embedding_A is missing", "model.embed_tokens.lora_embedding_B is missing")
def embedding_that_is_missing(w: World) -> Arguments:
    return merge(made(w, drop="embed_tokens", target_modules=["embed_tokens", "q_proj"]))


@case("layers.1.self_attn.q_proj.lora_A.weight is missing", "layers.1.self_attn.q_proj.lora_B.weight is missing")
def layer_beside_experts_that_is_missing(w: World) -> Arguments:
    experts(w)
    return merge(made(w, "mixtral", drop="layers.1.self_attn.q_proj"))


@case("hada_w1_a is missing", "3 more like these: the adapter does not fit its base", loads=True)
def loha_without_its_factors(w: World) -> Arguments:
    from peft import LoHaConfig
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(w.llama)
    return merge(_saved(w, base, LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]), "hada_w"))


@case("transformer.h.1.mlp.c_fc.bias is missing")
def bias_that_is_missing(w: World) -> Arguments:
    return merge(made(w, "gpt2", drop="h.1.mlp.c_fc.bias", bias="all"))


@case("lm_head.weight is missing")
def module_to_save_that_is_missing(w: World) -> Arguments:
    return merge(made(w, drop="lm_head", modules_to_save=["lm_head"]))


@case("lm_head.weight is missing")
def quantize_without_a_module_to_save(w: World) -> Arguments:
    return quantize(made(w, drop="lm_head", modules_to_save=["lm_head"]))


@case("layers.0.self_attn.v_proj.lora_A and lora_B are for a layer not in adapter_config.json", "1.self_attn.k_proj")
def layers_that_the_configuration_does_not_name(w: World) -> Arguments:
    made(w, target_modules=["q_proj", "k_proj", "v_proj"])
    w.edit_json(MADE_CONFIG, target_modules=["q_proj", "proj"])
    return merge("adapter")


@case("layers.1.self_attn.v_proj.lora_A and lora_B are for a layer not in")
def resize_of_layers_that_the_configuration_does_not_name(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, target_modules=r".*\.(q_proj|v)")
    return resize("adapter")


@case("layers.0.self_attn.q_proj.lora_A.weight is not described by adapter_config.json")
def layers_of_another_number(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, layers_to_transform=[1])
    return merge("adapter")


@case("model/config.json", "num_hidden_layers says 1,000,000,000 layers")
def merge_into_a_base_of_more_layers_than_weights(w: World) -> Arguments:
    w.edit_json(w.model("llama") / "config.json", num_hidden_layers=10**9)
    return ["merge", made(w), "--base", "model", "--out", "out"]


@case("embed_tokens.lora_embedding_A is not described by adapter_config.json")
def embedding_that_the_configuration_does_not_name(w: World) -> Arguments:
    made(w, target_modules=["embed_tokens", "q_proj"])
    w.edit_json(MADE_CONFIG, target_modules=["q_proj"])
    return merge("adapter")


@case("embed_tokens.lora_embedding_A has shape [5, 400], expected [4, 400]")
def embedding_of_another_rank(w: World) -> Arguments:
    return merge(made(w, grown="lora_embedding_A", target_modules=["embed_tokens", "q_proj"]))


@case("lm_head.lora_B.weight has shape [401, 4], expected [400, 4]")
def head_of_more_words(w: World) -> Arguments:
    return merge(made(w, grown="lm_head.lora_B", target_modules=["lm_head", "q_proj"]))


@case("layers.1.self_attn.v_proj.lora_magnitude_vector has shape [33], expected [32]")
def magnitudes_of_another_width(w: World) -> Arguments:
    return merge(made(w, grown="layers.1.self_attn.v_proj.lora_magnitude", use_dora=True))


@case("model.norm.weight has shape [65], expected [64]")
def norm_of_another_width(w: World) -> Arguments:
    return merge(made(w, grown="model.norm", modules_to_save=["norm"]))


@case("layers.0.self_attn.q_proj.lora_B.weight has shape [17, 4], expected [16, 4]")
def layer_beside_experts_of_another_width(w: World) -> Arguments:
    experts(w)
    return merge(made(w, "mixtral", grown="layers.0.self_attn.q_proj.lora_B"))


@case("layers.0.self_attn.q_proj.lora_A has rank 6, adapter_config.json says r: 7")
def rank_of_another_pattern(w: World) -> Arguments:
    made(w, rank_pattern={"q_proj": 6})
    w.edit_json(MADE_CONFIG, rank_pattern={"q_proj": 7})
    return quantize("adapter")


@case("layers.0.self_attn.q_proj.lora_A and lora_B have ranks 4 and 5")
def halves_of_two_ranks(w: World) -> Arguments:
    made(w)

    def widen(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.lora_B.weight"))
        tensors[name] = tensors[name].new_zeros(64, 5)

    w.tensors("adapter/adapter_model.safetensors", widen)
    return resize("adapter")


@case(MADE_CONFIG, "alpha_pattern: q_proj is 'x', expected a number")
def alpha_that_is_text(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, alpha_pattern={"q_proj": "x"})
    return merge("adapter")


@case(
    MADE_CONFIG, "rank_pattern: q_proj is 0, expected a whole number", "alpha_pattern is [3], expected names", "bias is"
)
def values_that_are_none_all_told_at_once(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, rank_pattern={"q_proj": 0}, alpha_pattern=[3], bias="some")
    return compose("adapter")


@case(
    *(MADE_CONFIG, "alpha_pattern is None, expected names", "lora_dropout is 1.5, expected a number from 0 to 1"),
    *("eva_config is [], expected settings by name", "alora_invocation_tokens is ['x'], expected ids of tokens"),
)
def values_that_peft_refuses_all_told_at_once(w: World) -> Arguments:
    made(w)
    strange = {"alpha_pattern": None, "lora_dropout": 1.5, "eva_config": [], "alora_invocation_tokens": ["x"]}
    w.edit_json(MADE_CONFIG, **strange)
    return ["eval", "adapter", "--data", w.rows(ROW)]


@case(MADE_CONFIG, "PEFT cannot put this adapter on its base", "Invalid task type")
def task_that_is_none(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, task_type=[])
    return ["eval", "adapter", "--data", w.rows(ROW)]


@case(MADE_CONFIG, "PEFT cannot put this adapter on its base", "layers_to_transform")
def layers_that_are_no_list(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, layers_to_transform={})
    return ["eval", "adapter", "--data", w.rows(ROW)]


@case(MADE_CONFIG, "rank_pattern is not a regular expression", "(q_proj")
def pattern_that_does_not_close(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, rank_pattern={"(q_proj": 4})
    return merge("adapter")


@case(MADE_CONFIG, "PEFT cannot put this adapter on its base")
def layers_of_no_number(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, layers_to_transform=["first"], layers_pattern=[7])
    return merge("adapter")


@case("alora_invocation_tokens", "use it unmerged, with PEFT")
def adapter_behind_invocation_tokens(w: World) -> Arguments:
    return merge(made(w, alora_invocation_tokens=[5, 6]))


@case("alora_invocation_tokens")
def resize_behind_invocation_tokens(w: World) -> Arguments:
    return resize(made(w, alora_invocation_tokens=[5, 6]))


@case("monteclora_config", "use it unmerged, with PEFT")
def adapter_that_is_drawn_at_random(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, monteclora_config={"num_samples_per_expert": 1})
    return merge("adapter")


@case("the adapter samples its factors at random (monteclora_config)")
def eval_of_an_adapter_drawn_at_random(w: World) -> Arguments:
    from peft import MontecloraConfig

    return ["eval", made(w, monteclora_config=MontecloraConfig()), "--data", w.rows(ROW)]


@case("tensor base_model.model.score.weight", "trained for another task", "task_type: SEQ_CLS")
def adapter_that_classifies(w: World) -> Arguments:
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(w.llama)
    _saved(w, base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    return ["eval", "adapter", "--data", w.rows(ROW)]


@case("layer_replication", "use it unmerged, with PEFT")
def adapter_that_repeats_layers(w: World) -> Arguments:
    return quantize(made(w, layer_replication=[[0, 2], [1, 2]]))


@case("init_lora_weights: pissa_niter_4", "path_initial_model_for_weight_conversion")
def adapter_of_a_start_drawn_at_random(w: World) -> Arguments:
    return ["eval", made(w, init_lora_weights="pissa_niter_4"), "--data", w.rows(ROW)]


@case("init_lora_weights: corda", "path_initial_model_for_weight_conversion")
def adapter_of_a_start_that_data_made(w: World) -> Arguments:
    made(w)
    w.edit_json(MADE_CONFIG, init_lora_weights="corda")
    return quantize("adapter")


@case("init_lora_weights: pissa", "path_initial_model_for_weight_conversion")
def compose_of_another_start(w: World) -> Arguments:
    return compose(made(w, init_lora_weights="pissa"))


@case("init_lora_weights: olora")
def resize_of_another_start(w: World) -> Arguments:
    return resize(made(w, init_lora_weights="olora"))


@case("init_lora_weights: pissa")
def diff_of_another_start(w: World) -> Arguments:
    adapter = made(w, init_lora_weights="pissa")
    return ["adapters", "diff", adapter, adapter]


@case("kind POLY", "use it unmerged, with PEFT")
def adapter_that_goes_by_the_row(w: World) -> Arguments:
    from peft import PolyConfig
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(w.llama)
    return merge(_saved(w, base, PolyConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], n_tasks=2)))


@case("tensor base_model.model.one.hada_w1_a does not belong in this adapter", loads=True)
def adapter_of_another_kind_with_a_tensor_too_many(w: World) -> Arguments:
    from peft import LoHaConfig
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(w.llama)
    _saved(w, base, LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))

    def add(tensors: dict[str, Any]) -> None:
        tensors["base_model.model.one.hada_w1_a"] = next(iter(tensors.values())).clone()

    w.tensors("adapter/adapter_model.safetensors", add)
    return merge("adapter")


@case("PEFT cannot load the adapter", "hada_w1_a", loads=True)
def adapter_of_another_kind_and_width(w: World) -> Arguments:
    from peft import LoHaConfig
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(w.llama)
    config = LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    return merge(_saved(w, base, config, grown="layers.0.self_attn.q_proj.hada_w1_a"))


@case("model", "no tokenizer")
def merge_into_a_base_without_a_tokenizer(w: World) -> Arguments:
    adapter = made(w)
    for file in (w.root / w.model("llama")).glob("tokenizer*"):
        file.unlink()
    return [*merge(adapter), "--base", "model"]


@case("tensor transformer.h.1.ln_2.bias is missing", "download the model again")
def base_without_a_tensor(w: World) -> Arguments:
    made(w, "gpt2")
    w.model("gpt2", "base")
    w.tensors("base/model.safetensors", lambda tensors: tensors.pop("transformer.h.1.ln_2.bias"))
    return [*merge("adapter"), "--base", "base"]


@case("1 of the 6 tensors that model.layers.1.mlp.experts.gate_up_proj is made of are missing")
def base_without_an_expert(w: World) -> Arguments:
    experts(w)
    adapter = made(w, "mixtral")
    w.tensors("mixtral/model.safetensors", lambda tensors: tensors.pop(_an_expert(tensors)))
    return merge(adapter)


def _an_expert(names: Any) -> str:
    return next(name for name in names if "layers.1." in name and name.endswith("experts.2.w3.weight"))
