"""`lora adapters compose`, compared with sums of s BA computed here in float64."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from conftest import Base, done, edit_json, write_rows
from made_adapters import R, answers, logits, make_adapter
from peft import PeftModel
from reference import distance
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def products(folder: Path) -> dict[str, torch.Tensor]:
    """Each layer's weight update (out, in), or an embedding's (tokens, width), computed from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        name.removeprefix("base_model.model."): tensor.double()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    found = {}
    for name, a in tensors.items():
        layer, _, part = name.partition(".lora_")
        if part not in ("A.weight", "embedding_A"):
            continue
        b = tensors[name.replace("_A", "_B")]
        rank = a.shape[0]
        own = [alpha for key, alpha in (config["alpha_pattern"] or {}).items() if layer.endswith(key)]
        alpha = own[0] if own else config["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        found[layer] = scale * ((b @ a).T if part == "embedding_A" else b @ a)
    return found


def varied(name: str, folder: Path, out: Path, seed: int, **config: Any) -> Path:
    """Save an adapter with random weights drawn from ``seed``."""
    make_adapter(name, folder, out, **config)
    draw = torch.Generator().manual_seed(seed)
    file = out / "adapter_model.safetensors"
    tensors = {key: 0.1 * torch.randn(value.shape, generator=draw) for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return out


def ranks(folder: Path) -> Counter[str]:
    """Each layer's rank, read from the file alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return Counter({name.partition(".lora_")[0]: a.shape[0] for name, a in tensors.items() if "_A" in name})


def two(name: str, folder: Path, place: Path, **second: Any) -> tuple[Path, Path]:
    return varied(name, folder, place / "a", 1), varied(name, folder, place / "b", 2, **second)


SECOND = {
    "gpt2": {"target_modules": ["c_attn"], "r": 3, "rank_pattern": {"h.1.attn.c_attn": 5}},
    "llama": {
        "target_modules": ["q_proj", "embed_tokens"],
        "use_rslora": True,
        "rank_pattern": {"layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 2},
    },
}


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_the_sum_of_products(base: Base, method: str, swapped: bool, tmp_path: Path, lora: Any) -> None:
    """The adapters differ in ranks, layers and scalings, and are given in either order."""
    name, folder = base
    parts = list(zip(two(name, folder, tmp_path, **SECOND[name]), (0.7, -0.3), strict=True))
    if swapped:
        parts.reverse()
    out = tmp_path / "out"
    given = [f"{part}={weight}" for part, weight in parts]
    rank = ["--rank", "10"] if method == "svd" else []
    report = done(lora("adapters", "compose", *given, "--method", method, *rank, "--out", out, "--json")).json

    wanted: dict[str, torch.Tensor] = {}
    for part, weight in parts:
        for layer, product in products(part).items():
            wanted[layer] = wanted.get(layer, torch.zeros_like(product)) + weight * product
    found = products(out)
    assert found.keys() == wanted.keys()
    assert report["layers"] == len(wanted)
    assert method == "svd" or ranks(out) == sum((ranks(part) for part, _ in parts), Counter())
    for layer, product in found.items():
        assert distance(product, wanted[layer]) < (1e-6 if method == "cat" else 1e-5), layer

    sums = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer, product in wanted.items():
            weight = sums.get_submodule(layer).weight
            weight += (product.T if name == "gpt2" else product).float()
    assert distance(answers(folder, out), logits(sums, AutoTokenizer.from_pretrained(folder))) < 1e-5


def test_cat_is_exact_to_the_bit(base: Base, tmp_path: Path, lora: Any) -> None:
    """Weights and scalings that are powers of two cause no rounding: the factors are concatenated."""
    name, folder = base
    a, b = (
        varied(name, folder, tmp_path / "a", 1, lora_alpha=R),
        varied(name, folder, tmp_path / "b", 2, lora_alpha=2 * R),
    )
    done(lora("adapters", "compose", f"{a}=0.5", f"{b}=0.25", "--out", tmp_path / "out"))
    first, second, found = (load_file(part / "adapter_model.safetensors") for part in (a, b, tmp_path / "out"))
    assert found.keys() == first.keys()
    for key, tensor in found.items():
        if "lora_A" in key:
            wanted = torch.cat([0.5 * first[key], 0.5 * second[key]])
        else:
            wanted = torch.cat([first[key], second[key]], dim=1)
        assert torch.equal(tensor, wanted), key


def test_svd_is_the_nearest_of_its_rank(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    a, b = two("llama", tiny_llama, tmp_path)
    done(lora("adapters", "compose", f"{a}=1", f"{b}=1", "--method", "svd", "--rank", "3", "--out", tmp_path / "out"))
    parts = products(a), products(b)
    for layer, product in products(tmp_path / "out").items():
        whole = parts[0][layer] + parts[1][layer]
        u, s, v = torch.linalg.svd(whole)
        assert distance(product, u[:, :3] @ torch.diag(s[:3]) @ v[:3]) < 1e-5


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "dare_linear", "magnitude_prune", "ties_svd"])
def test_the_other_methods_are_pefts(method: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """The results equal PEFT's on the loaded model. For DARE, the seed decides what is dropped."""
    a, b = two("llama", tiny_llama, tmp_path)
    density = [] if method == "linear" else ["--density", "0.4"]
    given = ["adapters", "compose", f"{a}=0.6", f"{b}=0.4", "--method", method, *density]
    seed = ["--seed", "0"] if method.startswith("dare") else []
    done(lora(*given, "--out", tmp_path / "out", *seed))

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(a), adapter_name="part_a")
    model.load_adapter(str(b), adapter_name="part_b")
    torch.manual_seed(0)
    names, weights = ["part_a", "part_b"], [0.6, 0.4]
    model.add_weighted_adapter(names, weights, "both", method, density=0.4 if density else None)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for layer, product in products(tmp_path / "out").items():
        module = model.base_model.model.get_submodule(layer)
        assert distance(product, module.get_delta_weight("both").double()) < 1e-5 or "dare" in method, layer
    if "dare" in method:
        again = {}
        for seed in ("0", "42"):  # 42 is the default
            done(lora(*given, "--out", tmp_path / seed, "--seed", seed))
            again[seed] = load_file(tmp_path / seed / "adapter_model.safetensors")
        assert all(torch.equal(again["0"][key], found[key]) for key in found)
        assert not all(torch.equal(again["42"][key], found[key]) for key in found)
        kept = [float((tensor != 0).double().mean()) for tensor in found.values()]
        assert 0.5 < sum(kept) / len(kept) < 0.8, "a number is left when either part keeps it: 1 - 0.6 * 0.6"


def test_a_layer_that_the_second_alone_has(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    a = varied("llama", tiny_llama, tmp_path / "a", 1, target_modules=["q_proj"])
    b = varied("llama", tiny_llama, tmp_path / "b", 2, target_modules=["q_proj", "v_proj"])
    done(lora("adapters", "compose", f"{a}=0.6", f"{b}=0.4", "--method", "linear", "--out", tmp_path / "out"))
    found, own = products(tmp_path / "out"), products(b)
    alone = own.keys() - products(a).keys()
    assert len(alone) == 2 and all(distance(found[layer], 0.4 * own[layer]) < 1e-5 for layer in alone)
    c = varied("llama", tiny_llama, tmp_path / "c", 3, target_modules=["o_proj"], r=R + 1)
    result = lora("adapters", "compose", f"{a}=1", f"{c}=1", "--method", "linear", "--out", tmp_path / "no")
    assert result.exit_code == 2 and "takes equal ranks" in result.stderr, "though they share no layer"


def test_what_was_composed_is_told(train: Any, tmp_path: Path, lora: Any) -> None:
    """A composition of two runs records the base's fingerprint and the parts; merge accepts the result."""
    runs = [train({"training.seed": seed, "training.max_steps": 1}) for seed in (1, 2)]
    given = [f"{run.folder}={weight}" for run, weight in zip(runs, (1, 0.5), strict=True)]
    done(lora("adapters", "compose", *given, "--out", tmp_path / "out"))
    shown = done(lora("adapters", "show", tmp_path / "out", "--json")).json
    record = shown["provenance"]
    assert record["base"]["fingerprint"] == runs[0].info["base"]["fingerprint"]
    assert shown["base_state"] == "there"
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "Lighthouse keepers mend the lamp. " * 40}])
    told = "rows are cut to 128 tokens: the adapter has no record"  # the positions of tiny_gpt2
    assert told in done(lora("eval", tmp_path / "out", "--data", rows)).stderr
    assert told not in done(lora("eval", tmp_path / "out", "--data", rows, "--quiet")).stderr
    assert record["made"]["by"] == "compose" and record["made"]["method"] == "cat"
    assert [part["weight"] for part in record["made"]["of"]] == [1, 0.5]
    assert [Path(part["name_or_path"]) for part in record["made"]["of"]] == [run.folder / "adapter" for run in runs]
    assert "recipe" not in record
    tokenizers = [folder / "tokenizer.json" for folder in (tmp_path / "out", runs[0].folder / "adapter")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    done(lora("merge", tmp_path / "out", "--out", tmp_path / "merged"))
    text = done(lora("adapters", "show", tmp_path / "out")).stdout
    assert "compose of" in text


def test_a_composition_of_quantized_runs_knows_what_they_saw(train: Any, tmp_path: Path, lora: Any) -> None:
    seen = {"quantization.method": "nf4", "model.dtype": "bfloat16", "training.max_steps": 1}
    runs = [train(seen | {"training.seed": seed}) for seed in (1, 2)]
    plain = train({"training.max_steps": 1})
    done(lora("adapters", "compose", *(f"{run.folder}=0.5" for run in runs), "--out", tmp_path / "out"))
    report = done(lora("merge", tmp_path / "out", "--out", tmp_path / "merged", "--json")).json
    assert "nf4" in report["into"]
    record = done(lora("adapters", "show", tmp_path / "out", "--json")).json["provenance"]
    assert record["dtype"] == "bfloat16", "from which the base is quantized again"
    result = lora("adapters", "compose", f"{runs[0].folder}=1", f"{plain.folder}=1", "--out", tmp_path / "other")
    assert result.exit_code == 2 and "was not quantized in training as" in result.stderr
    assert not (tmp_path / "other").exists()


def test_bases_are_told_apart_without_a_record(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    """By the bases' weights while they can be found, else by the names of layers and bases."""
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    bases = {"some/llama": ("llama", tiny_llama), "other/llama": ("llama", other), "some/gpt2": ("gpt2", tiny_gpt2)}
    first, *others = (varied(*base, tmp_path / name.replace("/", "-"), 1) for name, base in bases.items())
    commands = [["compose", f"{first}=1", f"{each}=1", "--out", tmp_path / "out"] for each in others]
    commands += [["diff", first, each] for each in others]
    for command in commands:
        result = lora("adapters", *command)
        assert result.exit_code == 2 and f"another base than that of {first}" in result.stderr
    for folder, name in zip((first, *others), bases, strict=True):
        edit_json(folder / "adapter_config.json", base_model_name_or_path=name)
    edit_json(first / "provenance.json", base={"name_or_path": "some/llama", "fingerprint": "0" * 64})
    done(lora("adapters", *commands[0]))
    result = lora("adapters", *commands[1][:-1], tmp_path / "no")
    assert result.exit_code == 2 and "it is for some/gpt2, not some/llama" in result.stderr


def test_every_method_is_known_to_the_command_line() -> None:
    from lora_cli.cli.adapters import compose_command
    from lora_cli.weights.algebra.compose import METHODS

    kind = get_type_hints(compose_command)["method"]
    assert get_args(kind) == tuple(METHODS)


@pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights and the embeddings that it saves
def test_an_embedding_that_peft_keeps_is_no_update(base: Base, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    ends = ["wte" if name == "gpt2" else "embed_tokens", "lm_head"]
    first = make_adapter(name, folder, tmp_path / "a", True, target_modules=ends)
    second = make_adapter(name, folder, tmp_path / "b", "auto", target_modules=ends, lora_alpha=3)
    assert sum("base_layer" in key for key in load_file(first / "adapter_model.safetensors")) == 2
    out = tmp_path / "out"
    done(lora("adapters", "compose", f"{first}=0.5", f"{second}=0.3", "--method", "cat", "--out", out))
    before = (products(first), products(second))
    found = products(out)
    assert len(found) == 2
    for layer, update in found.items():
        assert distance(update, 0.5 * before[0][layer] + 0.3 * before[1][layer]) < 1e-6

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: tensor + 1 if "base_layer" in key else tensor for key, tensor in tensors.items()}

    file = first / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    result = lora("adapters", "compose", f"{first}=0.5", f"{second}=0.3", "--method", "cat", "--out", tmp_path / "no")
    assert result.exit_code == 2 and "replaces the base's" in result.stderr
