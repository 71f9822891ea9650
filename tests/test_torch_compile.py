"""``training.torch_compile`` gives the same results. ``auto`` compiles where this saves at least twice its cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WIDTH, Run, done
from test_fast_paths import GROUPED, build

from lora_cli.model.fast_paths.fuse import compile_formulas, fuse
from lora_cli.training.torch_compile import has_compiler

pytestmark = pytest.mark.usefixtures("no_curves")

NORMS, GATES = 2 * 2 + 1, 2
"""Numbers of norms and gates in tiny_llama. The gates are twice as wide as the norms."""
ON_A_PROCESSOR = pytest.mark.skipif(torch.cuda.is_available(), reason="the run would take the GPU")
COMPILER = pytest.mark.skipif(not has_compiler(), reason="torch's compiler needs another one for C++")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start with nothing compiled and the compiler off, as the command line sets it."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1" and os.environ.get("TORCHINDUCTOR_CACHE_DIR") == folder
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def graphs() -> int:
    """How many functions were compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def results(model: torch.nn.Module) -> list[torch.Tensor]:
    """Logits and gradients of a fixed input."""
    ids = torch.arange(3, 40)[None]
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=hidden).logits
    (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[..., 5].sum(), hidden)
    return [logits.detach().float(), gradient.float()]


@COMPILER
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # from the compiler's imports
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler reads it
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_what_is_compiled_gives_the_same_numbers(
    dtype: torch.dtype, rounding: float, anew: None, tmp_path: Path
) -> None:
    """The model has norms of two widths: over hidden states and over each head."""
    model = build("Qwen3", GROUPED).to(dtype)
    fuse(model)
    model.requires_grad_(False)
    wanted = results(model)
    compile_formulas(model, dtype, tmp_path)
    for found, expected in zip(results(model), wanted, strict=True):
        assert float((found - expected).norm() / expected.norm()) < rounding
        assert dtype == torch.float32 or not torch.equal(found, expected)  # intermediate results are not rounded
    assert graphs() == 4
    norm = model.get_submodule("model.norm")
    alone = torch.ones(1, 1, 32, dtype=dtype)
    torch.testing.assert_close(norm(alone), norm(alone.expand(1, 2, 32))[:, :1])  # one vector is computed uncompiled
    assert graphs() == 4


@COMPILER
@ON_A_PROCESSOR
def test_true_compiles_all_before_the_first_step_and_false_nothing(
    write_recipe: Any, lora: Any, tmp_path: Path, tiny_llama: Path, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is compiled before the first step: anything that compiles later fails here."""
    set_stance = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: set_stance(stance.replace("eager", "fail")))
    runs = []
    for value in (False, True):
        changes = {"model.name_or_path": tiny_llama, "data.packing": True, "training.torch_compile": value}
        changes |= {"data.validation": 0.2, "training.output_dir": tmp_path / str(value)}
        result = done(lora("train", write_recipe(changes)))
        assert ("training.torch_compile: true: compiling norms and gates" in result.stderr) is value
        assert graphs() == (4 if value else 0)
        runs.append(Run(tmp_path / str(value)))
    for split in ("train", "validation"):
        assert runs[0].column("loss", split) == pytest.approx(runs[1].column("loss", split), rel=1e-5)


@ON_A_PROCESSOR
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_auto_compiles_what_saves_twice_its_cost(
    share: float, write_recipe: Any, lora: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the compiler fails, the run reports it and goes on. What a killed run compiled is removed."""
    recipe = write_recipe({"model.name_or_path": tiny_llama, "training.max_steps": 9})
    without = done(lora("train", recipe, "training.torch_compile=false")).stderr
    info = Run(recipe.parent / "run").info
    steps_in_epoch = info["data"]["rows"] / (2 * 2)  # rows per micro-batch, micro-batches per step
    numbers = info["data"]["tokens"] * 9 / steps_in_epoch * WIDTH * (NORMS + 2 * GATES)
    saved = 1.2e-9 * numbers / torch.get_num_threads()
    monkeypatch.setattr("lora_cli.training.torch_compile.COST", share * saved / 2)

    def fail(*_: Any) -> None:
        raise RuntimeError("g++: internal error\nmore of it")

    monkeypatch.setattr("lora_cli.model.fast_paths.fuse.compile_formulas", fail)
    monkeypatch.setattr("lora_cli.training.torch_compile.has_compiler", lambda: True)
    before = Run(recipe.parent / "run").losses
    left = recipe.parent / ".lora-compiles.abcdefgh.draft"
    left.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(recipe.parent))
    told = " ".join(done(lora("train", recipe, "--overwrite")).stderr.split())
    failed = "training.torch_compile: auto -> false: it failed: g++: internal error"
    assert (failed in told) is (share < 1)
    assert left.exists() is (share > 1)
    assert "more of it" not in told and "torch_compile" not in without
    assert Run(recipe.parent / "run").losses == before


@ON_A_PROCESSOR
def test_without_a_compiler(
    write_recipe: Any, lora: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    recipe = write_recipe({"model.name_or_path": tiny_llama})
    asked = lora("train", recipe, "training.torch_compile=true")
    assert asked.exit_code == 2 and not (tmp_path / "run").exists()
    assert "training.torch_compile: needs a C++ compiler, and there is none" in asked.stderr
    monkeypatch.setattr("lora_cli.training.torch_compile.COST", 0)
    told = " ".join(done(lora("train", recipe)).stderr.split())
    assert "training.torch_compile: auto -> false: there is no C++ compiler" in told


@COMPILER
@ON_A_PROCESSOR
def test_what_has_nothing_to_compile(write_recipe: Any, lora: Any) -> None:
    told = " ".join(done(lora("train", write_recipe({"training.torch_compile": True}))).stderr.split())
    assert "training.torch_compile: true -> false: there are no fused RMS norms or SiLU gates" in told
    refused = lora("train", write_recipe({"training.torch_compile": True, "adapter.fused": False}), "--overwrite")
    assert refused.exit_code == 2
    assert "training.torch_compile: needs adapter.fused, which is false" in refused.stderr


def test_a_resumed_run_may_be_compiled_or_not(write_recipe: Any, lora: Any) -> None:
    recipe = write_recipe({"training.max_steps": 2})
    done(lora("train", recipe))
    done(lora("train", recipe, "--resume", "training.max_steps=3", "training.torch_compile=false"))
    assert json.loads((recipe.parent / "run" / "run.json").read_text())["result"]["steps"] == 3
