"""`lora adapters resize`, `diff` and `extract`, checked against float64 products and singular values computed here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Base, Run, done, edit_json, weights_of
from made_adapters import R, answers, make_adapter
from peft import PeftModel
from reference import distance
from safetensors.torch import load_file, save_file
from test_compose import products, varied
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.weights.algebra import extract

UNEVEN = {
    "gpt2": {"rank_pattern": {"h.0.attn.c_attn": 6}, "alpha_pattern": {"c_fc": 5}},
    "llama": {
        "use_rslora": True,
        "target_modules": ["q_proj", "embed_tokens"],
        "rank_pattern": {"1.self_attn.q_proj": 3},
    },
}


@pytest.mark.parametrize("kind", ["", "rslora", "dora", "uneven"])
def test_up_changes_nothing(base: Base, kind: str, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    config: dict[str, Any] = UNEVEN[name] if kind == "uneven" else {f"use_{kind}": True} if kind else {}
    adapter, out = varied(name, folder, tmp_path / "a", 1, **config), tmp_path / "out"
    report = done(lora("adapters", "resize", adapter, "--rank", "10", "--out", out, "--json")).json
    assert {layer["after"] for layer in report["layers"]} == {10}
    assert {layer["energy"] for layer in report["layers"]} == {1.0}

    before, after = (load_file(part / "adapter_model.safetensors") for part in (adapter, out))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        found = after[key]
        if "magnitude" in key:
            assert torch.equal(found, tensor)
            continue
        ranked = 0 if key.endswith(("lora_A.weight", "embedding_A")) else 1
        assert found.shape[ranked] == 10
        rank = tensor.shape[ranked]
        assert torch.equal(found.narrow(ranked, 0, rank), tensor), "what was there is there to the bit"
        new = found.narrow(ranked, rank, 10 - rank)
        if key.endswith(("lora_B.weight", "embedding_A")):
            assert not new.any()
        else:
            assert new.any(dim=1 - ranked).all(), "what is trained at zero on both sides never moves"
            if ranked == 0:
                assert 0.8 < new.abs().max() * new.shape[1] ** 0.5 <= 1, "as PEFT draws it"
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(part))
        for part in (adapter, out)
    ]
    for layer in products(adapter):
        deltas = [model.base_model.model.get_submodule(layer).get_delta_weight("default") for model in models]
        assert torch.equal(*deltas), layer
    assert distance(answers(folder, out), answers(folder, adapter)) < 1e-6


def test_down_from_nothing_can_be_trained_on(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """PEFT initializes B to zero. The resized A must have no zero row, else training could not change that rank."""
    adapter, out = make_adapter("llama", tiny_llama, tmp_path / "a"), tmp_path / "out"
    tensors = load_file(adapter / "adapter_model.safetensors")
    begun = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    save_file(begun, adapter / "adapter_model.safetensors")
    report = done(lora("adapters", "resize", adapter, "--rank", R - 1, "--out", out, "--json")).json
    assert {layer["energy"] for layer in report["layers"]} == {1}
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert bool(tensor.any(1).all()) is ("lora_A" in name) and R - 1 in tensor.shape


def test_up_can_be_trained_on(train: Callable[..., Run], tmp_path: Path, lora: Any) -> None:
    """With the new adapter's rank and alpha in the recipe, the new columns of B learn."""
    first = train({"adapter.r": 2, "adapter.lora_alpha": 6})
    done(lora("adapters", "resize", first.folder, "--rank", "5", "--out", tmp_path / "wide"))
    assert json.loads((tmp_path / "wide" / "adapter_config.json").read_text())["lora_alpha"] == 15
    same = {"training.warmup_steps": 0, "data.shuffle": False}
    wide, narrow = (
        train(same | {"adapter.r": rank, "adapter.lora_alpha": 3 * rank, "adapter.init_from": start})
        for rank, start in ((5, tmp_path / "wide"), (2, first.folder / "adapter"))
    )
    assert wide.losses[0] == pytest.approx(narrow.losses[0], rel=1e-6)
    assert wide.losses[1:] != narrow.losses[1:]
    new = [tensor[:, 2:] for name, tensor in wide.tensors.items() if "lora_B" in name]
    assert new and all(tensor.any() for tensor in new)


@pytest.mark.parametrize("to", [["--rank", str(R)], ["--energy", "1"]])
def test_down_to_the_true_rank_changes_nothing(base: Base, to: list[str], tmp_path: Path, lora: Any) -> None:
    """An adapter of rank 4 is stored at rank 9, with A and B rotated so that no rank's row or column is zero."""
    name, folder = base
    adapter = varied(name, folder, tmp_path / "a", 1)
    done(lora("adapters", "resize", adapter, "--rank", "9", "--out", tmp_path / "wide"))
    file = tmp_path / "wide" / "adapter_model.safetensors"
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))[0]
    tensors = load_file(file)
    turned = {key: (turn @ value if "lora_A" in key else value @ turn.T).contiguous() for key, value in tensors.items()}
    save_file(turned, file, {"format": "pt"})
    report = done(lora("adapters", "resize", tmp_path / "wide", *to, "--out", tmp_path / "out", "--json")).json
    assert all(layer["after"] == R and layer["energy"] > 1 - 1e-9 for layer in report["layers"])
    wanted = products(adapter)
    for layer, product in products(tmp_path / "out").items():
        assert distance(product, wanted[layer]) < 1e-5, layer
    assert distance(answers(folder, tmp_path / "out"), answers(folder, adapter)) < 1e-5


@pytest.mark.parametrize("kind", ["", "uneven"])
def test_down_is_the_nearest_of_its_rank(base: Base, kind: str, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    adapter, out = varied(name, folder, tmp_path / "a", 1, **(UNEVEN[name] if kind else {})), tmp_path / "out"
    report = done(lora("adapters", "resize", adapter, "--rank", "2", "--out", out, "--json")).json
    found = products(out)
    for layer, product in products(adapter).items():
        u, s, v = torch.linalg.svd(product, full_matrices=False)
        assert distance(found[layer], u[:, :2] @ torch.diag(s[:2]) @ v[:2]) < 1e-5, layer
        (told,) = (each for each in report["layers"] if each["name"] == layer)
        assert told["energy"] == pytest.approx(float(s[:2].square().sum() / s.square().sum()), abs=1e-6)


def test_energy_takes_the_smallest_rank(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    adapter, out = varied("llama", tiny_llama, tmp_path / "a", 1, r=8, lora_alpha=8), tmp_path / "out"
    report = done(lora("adapters", "resize", adapter, "--energy", "0.7", "--out", out, "--json")).json
    ranks = {}
    for layer, product in products(adapter).items():
        squares = torch.linalg.svdvals(product)[:8].square()
        shares = squares.cumsum(0) / squares.sum()
        ranks[layer] = 1 + int((shares < 0.7).sum())
    assert {layer["name"]: layer["after"] for layer in report["layers"]} == ranks
    assert len(set(ranks.values())) > 1
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(out)).base_model.model
    for layer, product in products(out).items():
        assert distance(adapted.get_submodule(layer).get_delta_weight("default").double(), product) < 1e-6
    least = done(lora("adapters", "resize", adapter, "--energy", "0.01", "--out", tmp_path / "least", "--json")).json
    assert {layer["after"] for layer in least["layers"]} == {1}
    whole = done(lora("adapters", "resize", adapter, "--energy", "1", "--out", tmp_path / "whole")).stdout
    quiet = done(lora("adapters", "resize", adapter, "--energy", "1", "--out", tmp_path / "again", "--quiet")).stdout
    *table, total = whole.splitlines(keepends=True)
    assert [row.split()[0] for row in table] == ["layer", *ranks]
    assert total.startswith(f"{tmp_path / 'whole'}: {len(ranks)} layers, rank 8 -> 8, ")
    assert quiet == total.replace("whole:", "again:")
    before, after = (load_file(each / "adapter_model.safetensors") for each in (adapter, tmp_path / "whole"))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items()), "there was nothing to cut"


def test_a_resized_run_keeps_its_record(train: Callable[..., Run], tmp_path: Path, lora: Any) -> None:
    run = train({"quantization.method": "nf4", "adapter.r": 4, "training.max_steps": 1})
    for rank in (2, 6):
        out = tmp_path / f"r{rank}"
        done(lora("adapters", "resize", run.folder, "--rank", str(rank), "--out", out))
        record = done(lora("adapters", "show", out, "--json")).json["provenance"]
        assert record["made"]["by"] == "resize" and record["made"]["rank"] == rank
        assert record["recipe"]["quantization"]["method"] == "nf4"
        assert record["base"]["fingerprint"] == run.info["base"]["fingerprint"]
        assert ("result" in record) == (rank == 6), "what was measured of the whole is not said of a part"
        merged = done(lora("merge", out, "--out", tmp_path / f"merged{rank}", "--json")).json
        assert "nf4" in merged["into"]


def test_diff_of_the_same_and_of_others(base: Base, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    a, b = varied(name, folder, tmp_path / "a", 1), varied(name, folder, tmp_path / "b", 2, **UNEVEN[name])
    copy = varied(name, folder, tmp_path / "c", 1)
    same = done(lora("adapters", "diff", a, copy, "--json")).json
    assert same["cosine"] == pytest.approx(1, abs=1e-9)
    for layer in same["layers"]:
        assert [layer[key] for key in ("cosine", "overlap_out", "overlap_in")] == pytest.approx([1, 1, 1], abs=1e-9)

    found = done(lora("adapters", "diff", a, b, "--json")).json
    first, second = products(a), products(b)
    shared = first.keys() & second.keys()
    assert {layer["name"] for layer in found["layers"]} == shared
    assert set(found["only_first"]) == first.keys() - shared and set(found["only_second"]) == second.keys() - shared
    for layer in found["layers"]:
        x, y = first[layer["name"]], second[layer["name"]]
        assert layer["cosine"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-6)
        assert layer["norms"] == pytest.approx([float(x.norm()), float(y.norm())], rel=1e-6)
        ranks = [int(torch.linalg.matrix_rank(each, rtol=1e-6)) for each in (x, y)]
        spaces = [torch.linalg.svd(each, full_matrices=False) for each in (x, y)]
        left = spaces[0].U[:, : ranks[0]].T @ spaces[1].U[:, : ranks[1]]
        right = spaces[0].Vh[: ranks[0]] @ spaces[1].Vh[: ranks[1]].T
        assert layer["overlap_out"] == pytest.approx(float(left.square().sum()) / min(ranks), abs=1e-6)
        assert layer["overlap_in"] == pytest.approx(float(right.square().sum()) / min(ranks), abs=1e-6)
    whole = sum(float((first[layer] * second[layer]).sum()) for layer in shared)
    norms = [sum(float(each.square().sum()) for each in part.values()) ** 0.5 for part in (first, second)]
    assert found["cosine"] == pytest.approx(whole / (norms[0] * norms[1]), abs=1e-6)
    assert f"{found['cosine']:.4f}" in done(lora("adapters", "diff", a, b)).stdout


def test_layers_that_one_adapter_alone_has_are_named(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    """The first alone has four layers, of which three are named; the second alone has three; both have two."""
    a = make_adapter("llama", tiny_llama, tmp_path / "a", target_modules=["q_proj", "k_proj", "v_proj"])
    only = r"0\.self_attn\.o_proj|\d\.mlp\.up_proj|\d\.self_attn\.q_proj"
    b = make_adapter("llama", tiny_llama, tmp_path / "b", target_modules=rf".*({only})")
    found = done(lora("adapters", "diff", a, b, "--json")).json
    assert [len(found[key]) for key in ("only_first", "only_second", "layers")] == [4, 3, 2]
    text = done(lora("adapters", "diff", a, b)).stdout.splitlines()
    assert text[-2] == f"4 layers are in {a} only: {', '.join(found['only_first'][:3])} ..."
    assert text[-1] == f"3 layers are in {b} only: {', '.join(found['only_second'])}"
    rows = {line.split()[0]: line.split()[1:] for line in text[1:-3]}
    shares = ("cosine", "overlap_out", "overlap_in")
    assert rows == {each["name"]: [f"{each[key]:.4f}" for key in shares] for each in found["layers"]}
    assert text[-3].split() == ["all", "layers", f"{found['cosine']:.4f}"]


def test_diff_with_an_adapter_that_adds_nothing(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    a, b = varied("llama", tiny_llama, tmp_path / "a", 1), varied("llama", tiny_llama, tmp_path / "b", 2)
    file = b / "adapter_model.safetensors"
    zero = {key: value * ("lora_A" in key) for key, value in load_file(file).items()}
    save_file(zero, file, {"format": "pt"})
    found = done(lora("adapters", "diff", a, b, "--json")).json
    assert found["cosine"] is None
    assert all(layer["cosine"] is None and layer["overlap_out"] is None for layer in found["layers"])


@pytest.mark.parametrize("to", [["--rank", str(R)], ["--energy", "1"]])
def test_what_was_merged_is_extracted(base: Base, to: list[str], tmp_path: Path, lora: Any) -> None:
    name, folder = base
    adapter = varied(name, folder, tmp_path / "a", 1)
    done(lora("merge", adapter, "--out", tmp_path / "tuned"))
    report = done(
        lora("adapters", "extract", folder, tmp_path / "tuned", *to, "--out", tmp_path / "out", "--json")
    ).json
    wanted = products(adapter)
    assert {layer["name"] for layer in report["layers"]} == wanted.keys()
    assert all(layer["energy"] > 1 - 1e-9 for layer in report["layers"])
    if to[0] == "--rank":
        assert {layer["rank"] for layer in report["layers"]} == {R}
    assert report["left_out"] == []
    for layer, product in products(tmp_path / "out").items():
        assert distance(product, wanted[layer]) < 1e-4, layer
    done(lora("merge", tmp_path / "out", "--out", tmp_path / "again"))
    before, after = weights_of(tmp_path / "tuned"), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert (after[key] - weight).abs().max() <= 2.0**-20 * weight.abs().max(), key
    shown = done(lora("adapters", "show", tmp_path / "out", "--json")).json
    assert shown["base_state"] == "there" and shown["provenance"]["made"]["by"] == "extract"
    assert Path(shown["base"]) == folder.resolve()


def test_extract_of_full_training(base: Base, tmp_path: Path, lora: Any) -> None:
    """Every weight of the model differs. Layers are extracted by their singular values. The other tensors are reported,
    each once, even where GPT-2's own names omit ``transformer.``."""
    name, folder = base[0], shutil.copytree(base[1], tmp_path / "base")
    stored = {key.removeprefix("transformer."): tensor for key, tensor in weights_of(folder).items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "tuned", max_shard_size="40KB")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "tuned")
    given = ["adapters", "extract", folder, tmp_path / "tuned"]
    report = done(lora(*given, "--energy", "0.8", "--out", tmp_path / "out", "--json")).json
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = products(tmp_path / "out")
    for layer in report["layers"]:
        delta = (model.get_submodule(layer["name"]).weight - bare.get_submodule(layer["name"]).weight).detach().double()
        delta = delta.T if name == "gpt2" else delta
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        shares = s.square().cumsum(0) / s.square().sum()
        assert layer["rank"] == 1 + int((shares < 0.8).sum())
        assert layer["energy"] == pytest.approx(float(shares[layer["rank"] - 1]), abs=1e-5)
        kept = slice(layer["rank"])
        assert distance(found[layer["name"]], u[:, kept] @ torch.diag(s[kept]) @ v[kept]) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and len(report["layers"]) == len(found)
    assert any("norm" in each or "ln_" in each for each in report["left_out"])
    assert len(report["left_out"]) == len(weights_of(folder)) - len(found)
    result = done(lora(*given, "--rank", "1000", "--out", tmp_path / "whole"))
    names = ", ".join(report["left_out"][:5])
    assert f"other tensors differ and cannot go into the adapter: {names} ...\n" in result.stderr
    loaded = PeftModel.from_pretrained(bare, str(tmp_path / "whole")).base_model.model
    for layer, product in products(tmp_path / "whole").items():
        assert (
            distance(
                loaded.get_submodule(layer)
                .get_delta_weight("default")
                .double()
                .view_as(product.T if name == "gpt2" else product),
                product.T if name == "gpt2" else product,
            )
            < 1e-5
        )


def test_extract_of_a_model_with_more_words(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.data += 0.1
    model.save_pretrained(tmp_path / "tuned")
    given = ["adapters", "extract", tiny_llama, tmp_path / "tuned", "--rank", "2", "--out"]
    report = done(lora(*given, tmp_path / "out", "--json")).json
    assert [layer["name"] for layer in report["layers"]] == ["model.layers.0.self_attn.q_proj"]
    assert any("embed_tokens" in name for name in report["left_out"])
    done(lora("quantize", tiny_llama, "--out", tmp_path / "small"))
    refused = lora("adapters", "extract", tiny_llama, tmp_path / "small", "--rank", "2", "--out", tmp_path / "other")
    assert refused.exit_code == 2 and "the model is stored quantized (bitsandbytes)" in refused.stderr


@pytest.mark.parametrize("change", [0.0, 0.5])
def test_extract_tells_of_no_copies_and_masks(tiny_gpt2: Path, tmp_path: Path, lora: Any, change: float) -> None:
    """The base stores the masks of published GPT-2 checkpoints. The tuned model stores a head: a copy of the embedding,
    or a changed one."""
    base, tuned = (shutil.copytree(tiny_gpt2, tmp_path / name) for name in ("base", "tuned"))
    weights = weights_of(tiny_gpt2)
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for layer in range(2)}
    save_file(weights | masks, base / "model.safetensors", {"format": "pt"})
    own = {key: weights[key] + 0.1 for key in weights if key.endswith("h.0.mlp.c_fc.weight")}
    own["lm_head.weight"] = weights["transformer.wte.weight"] + change
    save_file(weights | own, tuned / "model.safetensors", {"format": "pt"})
    report = done(lora("adapters", "extract", base, tuned, "--rank", "1", "--out", tmp_path / "out", "--json")).json
    assert [layer["name"] for layer in report["layers"]] == ["transformer.h.0.mlp.c_fc"]
    assert report["left_out"] == (["lm_head.weight"] if change else [])


def test_extract_holds_one_layers_factors(
    tiny_llama: Path, tmp_path: Path, lora: Any, monkeypatch: Any, living_tensors: Any
) -> None:
    adapter = varied("llama", tiny_llama, tmp_path / "a", 1)
    done(lora("merge", adapter, "--out", tmp_path / "tuned", "--no-verify"))
    held, difference = [], extract.Pair.difference

    def counted(pair: extract.Pair) -> torch.Tensor:
        held.append(sum(each.nbytes for each in living_tensors()))
        return difference(pair)

    monkeypatch.setattr(extract.Pair, "difference", counted)
    given = ("adapters", "extract", tiny_llama, tmp_path / "tuned", "--energy", "1", "--out", tmp_path / "out")
    assert len(done(lora(*given, "--json")).json["layers"]) == len(held) == 14
    assert max(held[8:]) <= max(held[1:8]), "the second block's layers are those of the first"


@pytest.mark.parametrize("command", ["resize", "compose", "extract"])
def test_a_failure_while_writing_leaves_nothing(
    command: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    adapter = varied("llama", tiny_llama, tmp_path / "a", 1)
    other = varied("llama", tiny_llama, tmp_path / "b", 2)
    done(lora("merge", adapter, "--out", tmp_path / "tuned"))
    arguments: dict[str, list[Any]] = {
        "resize": [adapter, "--rank", "9"],
        "compose": [f"{adapter}=1", f"{other}=1"],
        "extract": [tiny_llama, tmp_path / "tuned", "--rank", "2"],
    }
    before = sorted(tmp_path.rglob("*"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_cli.weights.algebra.lora_adapter.save_file", full)
    monkeypatch.setattr("lora_cli.weights.files.stream._Shard.add", full)
    result = lora("adapters", command, *arguments[command], "--out", tmp_path / "out")
    assert result.exit_code == 3 and "No space left" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_that_names_no_base_stays_without_one(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    adapter = varied("llama", tiny_llama, tmp_path / "a", 1)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    narrowest = min(min(product.shape) for product in products(adapter).values())
    done(lora("adapters", "resize", adapter, "--rank", narrowest, "--out", tmp_path / "out"))
    shown = done(lora("adapters", "show", tmp_path / "out", "--json")).json
    assert (shown["base"], shown["base_state"]) == (None, "not found")
    assert shown["provenance"]["base"] == {"name_or_path": None, "relative_path": None, "fingerprint": None}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about tied weights and about what it saves
def test_an_embedding_that_peft_keeps_is_kept(base: Base, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    end = "wte" if name == "gpt2" else "embed_tokens"
    adapter, out = make_adapter(name, folder, tmp_path / "a", True, target_modules=[end]), tmp_path / "out"
    done(lora("adapters", "resize", adapter, "--rank", "9", "--out", out))
    assert distance(answers(folder, out), answers(folder, adapter)) < 1e-6
    kept = [load_file(part / "adapter_model.safetensors") for part in (adapter, out)]
    names = [name for name in kept[0] if "base_layer" in name]
    assert len(names) == 1 and torch.equal(kept[1][names[0]], kept[0][names[0]])
