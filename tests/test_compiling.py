"""``training.torch_compile``: the same numbers, where it saves more than it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WIDTH, Run, done
from test_fast_paths import GROUPED, build

from lora_cli.model.elementwise import compile_formulas, fuse
from lora_cli.training.compiling import has_compiler

NORMS, GATES = 2 * 2 + 1, 2
"""Of tiny_llama; the gates are twice as wide as the norms."""


def results(model: torch.nn.Module) -> list[torch.Tensor]:
    """Logits and gradients of a fixed input."""
    ids = torch.arange(3, 40)[None]
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=hidden).logits
    (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[..., 5].sum(), hidden)
    return [logits.detach().float(), gradient.float()]


@pytest.mark.skipif(not has_compiler(), reason="torch's compiler needs another one for C++")
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # in what the compiler imports
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which the compiler looks at
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_what_is_compiled_gives_the_same_numbers(
    dtype: torch.dtype, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as the command line has it
    model = build("Llama", GROUPED).to(dtype)
    fuse(model)
    model.requires_grad_(False)
    wanted = results(model)
    torch._dynamo.utils.counters.clear()
    compile_formulas(model, dtype)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    for found, expected in zip(results(model), wanted, strict=True):
        assert float((found - expected).norm() / expected.norm()) < rounding
        assert dtype == torch.float32 or not torch.equal(found, expected)  # nothing is rounded in between


@pytest.mark.skipif(not has_compiler(), reason="torch's compiler needs another one for C++")
def test_the_switch(
    write_recipe: Any, lora: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    runs, graphs = [], []
    for value in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        changes = {"model.name_or_path": tiny_llama, "data.packing": True, "training.torch_compile": value}
        result = done(lora("train", write_recipe(changes | {"training.output_dir": tmp_path / str(value)})))
        assert ("training.torch_compile: true: compiling norms and gates" in result.stderr) is value
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        runs.append(Run(tmp_path / str(value)))
    assert graphs[0] == 0 < graphs[1] <= 2 * 4  # when called first, and as the run calls them
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_auto_compiles_what_saves_twice_its_cost(
    share: float, write_recipe: Any, lora: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a compiler that fails the run tells, and goes on."""
    recipe = write_recipe({"model.name_or_path": tiny_llama, "training.max_steps": 6})
    rows = done(lora("train", recipe, "training.torch_compile=false")).stderr
    info = Run(recipe.parent / "run").info
    steps_in_epoch = info["data"]["rows"] / (2 * 2)  # rows of a micro-batch, micro-batches of a step
    numbers = info["data"]["tokens"] * 6 / steps_in_epoch * WIDTH * (NORMS + 2 * GATES)
    saved = 0.9e-9 * numbers / torch.get_num_threads()
    monkeypatch.setattr("lora_cli.training.compiling.COST", share * saved / 2)

    def fail(*_: Any) -> None:
        raise RuntimeError("g++: internal error\nmore of it")

    monkeypatch.setattr("lora_cli.training.compiling.compile_formulas", fail)
    monkeypatch.setattr("lora_cli.training.compiling.has_compiler", lambda: True)
    before = Run(recipe.parent / "run").losses
    told = " ".join(done(lora("train", recipe, "--overwrite")).stderr.split())
    failed = "training.torch_compile: auto -> false: it failed: g++: internal error"
    assert (failed in told) is (share < 1)
    assert "more of it" not in told and "torch_compile" not in rows
    assert Run(recipe.parent / "run").losses == before


def test_without_a_compiler(
    write_recipe: Any, lora: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    recipe = write_recipe({"model.name_or_path": tiny_llama})
    asked = lora("train", recipe, "training.torch_compile=true")
    assert asked.exit_code == 2 and not (tmp_path / "run").exists()
    assert "training.torch_compile: needs a C++ compiler, and there is none" in asked.stderr
    monkeypatch.setattr("lora_cli.training.compiling.COST", 0)
    told = " ".join(done(lora("train", recipe)).stderr.split())
    assert "training.torch_compile: auto -> false: there is no C++ compiler" in told


@pytest.mark.skipif(not has_compiler(), reason="which is told of first")
def test_what_has_nothing_to_compile(write_recipe: Any, lora: Any) -> None:
    told = " ".join(done(lora("train", write_recipe({"training.torch_compile": True}))).stderr.split())
    assert "training.torch_compile: true -> false: it has no RMS norms or SiLU gates" in told
    refused = lora("train", write_recipe({"training.torch_compile": True, "adapter.fused": False}), "--overwrite")
    assert refused.exit_code == 2
    assert "training.torch_compile: compiles what adapter.fused computes, and that is false" in refused.stderr


def test_a_resumed_run_may_be_compiled_or_not(write_recipe: Any, lora: Any) -> None:
    recipe = write_recipe({"training.max_steps": 2})
    done(lora("train", recipe))
    done(lora("train", recipe, "--resume", "training.max_steps=3", "training.torch_compile=false"))
    assert json.loads((recipe.parent / "run" / "run.json").read_text())["result"]["steps"] == 3
