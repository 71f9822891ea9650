"""Input from which `lora adapters` cannot list, show or make adapters."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

from bad_input import Arguments, World, case

WEIGHTS = "run/adapter/adapter_model.safetensors"


@case("nowhere", "no such folder")
def list_of_nothing(w: World) -> Arguments:
    return ["adapters", "list", "nowhere"]


@case("no adapter here", "give a run or an adapter folder")
def show_of_no_adapter(w: World) -> Arguments:
    w.file("folder/x", "")
    return ["adapters", "show", "folder"]


@case(WEIGHTS, "not a whole safetensors file")
def show_of_a_truncated_adapter(w: World) -> Arguments:
    w.run()
    w.truncate(WEIGHTS)
    return ["adapters", "show", "run"]


def pair(w: World) -> None:
    """Write two finished runs on the same base: run and other."""
    w.run()
    shutil.copytree(w.root / "run", w.root / "other")


def compose(*options: str, parts: tuple[str, ...] = ("run=0.5", "other=0.5")) -> Arguments:
    return ["adapters", "compose", *parts, *options, "--out", "out"]


@case("'run'", "FOLDER=WEIGHT")
def compose_without_a_weight(w: World) -> Arguments:
    pair(w)
    return compose(parts=("run", "other=1"))


@case("'=1'", "FOLDER=WEIGHT")
def compose_without_a_folder(w: World) -> Arguments:
    pair(w)
    return compose(parts=("run=1", "=1"))


@case("'run=inf'", "FOLDER=WEIGHT")
def compose_with_a_weight_beyond_all_numbers(w: World) -> Arguments:
    pair(w)
    return compose(parts=("run=inf", "other=1"))


@case("'run=nan'", "FOLDER=WEIGHT")
def compose_with_a_weight_that_is_no_number(w: World) -> Arguments:
    pair(w)
    return compose(parts=("run=nan", "other=1"))


@case("only one adapter is given")
def compose_of_one(w: World) -> Arguments:
    pair(w)
    return compose(parts=("run=1",))


@case("run/adapter", "given twice")
def compose_of_the_same(w: World) -> Arguments:
    w.run()
    return compose(parts=("run=1", "run/adapter=1"))


@case("other/adapter", "another base than that of run/adapter", "base has changed since one of them was trained")
def compose_of_different_bases(w: World) -> Arguments:
    pair(w)
    base = json.loads((w.root / "other/adapter/provenance.json").read_text())["base"]
    w.edit_json("other/adapter/provenance.json", base=base | {"fingerprint": "0" * 64})
    return compose()


@case("other/adapter", "c_attn.lora_A", "[48, 64]", "in run/adapter of [192, 64]")
def compose_of_different_shapes(w: World) -> Arguments:
    pair(w)
    (w.root / "other/adapter/provenance.json").unlink()

    def narrow(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensors[name] = tensor[:48]

    w.tensors("other/adapter/adapter_model.safetensors", narrow)
    return compose()


@case("other/adapter/adapter_model.safetensors", "c_attn.lora_A.weight holds NaN or infinity")
def compose_with_a_nan(w: World) -> Arguments:
    pair(w)
    w.tensors("other/adapter/adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    return compose()


@case("other/adapter", "IA3", "LoRA adapters are")
def compose_of_another_kind(w: World) -> Arguments:
    pair(w)
    w.edit_json("other/adapter/adapter_config.json", peft_type="IA3")
    return compose()


@case("other/adapter", "c_attn", "equal ranks", "resize")
def compose_linear_of_different_ranks(w: World) -> Arguments:
    pair(w)
    _cut(w, "other/adapter")
    return compose("--method", "linear")


def _cut(w: World, adapter: str) -> None:
    """Halve an adapter's rank from 4 to 2."""

    def cut(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor[:2] if "lora_A" in name else tensor[:, :2]

    w.tensors(f"{adapter}/adapter_model.safetensors", cut)
    w.edit_json(f"{adapter}/adapter_config.json", r=2)


@case("--method ties needs --density")
def compose_ties_without_a_density(w: World) -> Arguments:
    pair(w)
    return compose("--method", "ties")


@case("--rank is not for --method cat", "svd")
def compose_cat_with_a_rank(w: World) -> Arguments:
    pair(w)
    return compose("--rank", "3")


@case("out", "exists already")
def compose_into_what_exists(w: World) -> Arguments:
    pair(w)
    w.file("out/notes.txt", "mine")
    return compose()


@case("is inside", "run/adapter")
def compose_into_a_part(w: World) -> Arguments:
    pair(w)
    return ["adapters", "compose", "run/adapter=1", "other=1", "--out", "run/adapter/new"]


@case("--density nan is out of range")
def compose_with_a_density_that_is_no_number(w: World) -> Arguments:
    pair(w)
    return compose("--method", "ties", "--density", "nan")


@case("--density 0 is out of range")
def compose_with_a_density_of_nothing(w: World) -> Arguments:
    pair(w)
    return compose("--method", "ties", "--density", "0")


@case("other/adapter", "DoRA", "lora merge")
def compose_of_dora(w: World) -> Arguments:
    pair(w)
    _dora(w, "other/adapter")
    return compose()


def _dora(w: World, adapter: str) -> None:
    def magnitudes(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "lora_B" in name]:
            own = name.replace("lora_B.weight", "lora_magnitude_vector")
            tensors[own] = tensors[name].abs().sum(1) + 1

    w.tensors(f"{adapter}/adapter_model.safetensors", magnitudes)
    w.edit_json(f"{adapter}/adapter_config.json", use_dora=True)


@case("either --rank or --energy")
def resize_to_nothing(w: World) -> Arguments:
    return ["adapters", "resize", w.run(), "--out", "out"]


@case("either --rank or --energy")
def resize_to_two_sizes(w: World) -> Arguments:
    return ["adapters", "resize", w.run(), "--rank", "3", "--energy", "0.5", "--out", "out"]


@case("--energy 2 is out of range")
def resize_to_more_than_all(w: World) -> Arguments:
    return ["adapters", "resize", w.run(), "--energy", "2", "--out", "out"]


@case("--energy 0 is out of range")
def resize_to_nothing_at_all(w: World) -> Arguments:
    return ["adapters", "resize", w.run(), "--energy", "0", "--out", "out"]


@case("run/adapter", "--rank 65 is more than the width of any layer (64)", "use at most 64")
def resize_beyond_the_layer(w: World) -> Arguments:
    return ["adapters", "resize", w.run(), "--rank", "65", "--out", "out"]


@case("run/adapter", "PREFIX_TUNING", "LoRA adapters are")
def resize_of_another_kind(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", peft_type="PREFIX_TUNING")
    return ["adapters", "resize", "run", "--rank", "2", "--out", "out"]


@case(WEIGHTS, "c_attn.lora_A.weight holds NaN or infinity")
def resize_of_a_nan(w: World) -> Arguments:
    w.run()
    w.tensors(WEIGHTS, lambda tensors: next(iter(tensors.values())).fill_(math.inf))
    return ["adapters", "resize", "run", "--rank", "2", "--out", "out"]


@case("out", "exists already")
def resize_into_what_exists(w: World) -> Arguments:
    w.file("out/notes.txt", "mine")
    return ["adapters", "resize", w.run(), "--rank", "2", "--out", "out"]


@case("other/adapter", "another base than that of run/adapter")
def diff_of_different_bases(w: World) -> Arguments:
    pair(w)
    base = json.loads((w.root / "other/adapter/provenance.json").read_text())["base"]
    w.edit_json("other/adapter/provenance.json", base=base | {"fingerprint": "0" * 64})
    return ["adapters", "diff", "run", "other"]


@case("other/adapter", "DoRA")
def diff_with_dora(w: World) -> Arguments:
    pair(w)
    _dora(w, "other/adapter")
    return ["adapters", "diff", "run", "other"]


@case("no adapter here")
def diff_with_a_model(w: World) -> Arguments:
    return ["adapters", "diff", w.run(), "base"]


def extract(tuned: str = "tuned") -> Arguments:
    return ["adapters", "extract", "base", tuned, "--rank", "2", "--out", "out"]


@case("tuned", "no linear layer's weight differs")
def extract_of_the_same(w: World) -> Arguments:
    w.model(name="base")
    w.model(name="tuned")
    return extract()


@case("tuned", "tensor transformer.h.0.attn.c_attn.weight is not in this model", "made from this base")
def extract_of_another_architecture(w: World) -> Arguments:
    w.model(name="base")
    w.model("llama", "tuned")
    return extract()


@case("tuned/model.safetensors", "h.1.mlp.c_fc.weight has shape [64, 128]", "[64, 256]")
def extract_of_another_shape(w: World) -> Arguments:
    w.model(name="base")
    w.model(name="tuned")

    def cut(tensors: dict[str, Any]) -> None:
        for name in list(tensors):  # as in GPT-2's original files, whose names lack the prefix
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.1.mlp.c_fc.weight"] = tensors["h.1.mlp.c_fc.weight"][:, :128]

    w.tensors("tuned/model.safetensors", cut)
    return extract()


@case(
    "tensor transformer.h.0.mlp.c_fc.weight has shape [64, 128], the base's [64, 256]", "tuned", "made from this base"
)
def extract_of_a_narrower_model(w: World) -> Arguments:
    w.model(name="base")
    w.model(name="tuned")
    w.edit_json("tuned/config.json", n_inner=128)

    def cut(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if ".mlp.c_fc." in name:
                tensors[name] = tensor[..., :128]
            elif name.endswith(".mlp.c_proj.weight"):
                tensors[name] = tensor[:128]

    w.tensors("tuned/model.safetensors", cut)
    return extract()


@case("tuned/model.safetensors", "h.0.attn.c_attn.weight holds NaN or infinity")
def extract_of_a_nan(w: World) -> Arguments:
    w.model(name="base")
    w.model(name="tuned")

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[next(name for name in tensors if name.endswith("h.0.attn.c_attn.weight"))][3, 4] = math.nan

    w.tensors("tuned/model.safetensors", spoil)
    return extract()


@case("run/out", "is inside run")
def resize_into_its_run(w: World) -> Arguments:
    return ["adapters", "resize", w.run(), "--rank", "2", "--out", "run/out"]


@case("tuned/out", "is inside tuned")
def extract_into_a_part(w: World) -> Arguments:
    w.model(name="base")
    w.model(name="tuned")
    return [*extract()[:-1], "tuned/out"]


@case("tuned/config.json", "model type 'gpt17' is unknown to transformers")
def extract_of_an_unknown_type(w: World) -> Arguments:
    w.model(name="base")
    w.edit_json(w.model(name="tuned") / "config.json", model_type="gpt17")
    return extract()


@case("tuned/config.json", "n_layer says 1,000,000 layers, but the weights are")
def extract_of_a_million_layers(w: World) -> Arguments:
    w.model(name="base")
    w.edit_json(w.model(name="tuned") / "config.json", n_layer=10**6)
    return extract()


@case("run", "no model", "or merge the two first (lora merge)")
def extract_of_an_adapter(w: World) -> Arguments:
    w.run()
    return extract("run/adapter")
