"""Wrong input is reported in a few lines with place and remedy; exit code 2, nothing written, no weights loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_adapters
import bad_models
import bad_options
import bad_recipes
import bad_rows
import bad_runs
import bad_tools
import pytest
import yaml
from bad_input import ROW, Case, World

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = (bad_recipes, bad_rows, bad_models, bad_adapters, bad_runs, bad_options, bad_tools)
CASES = [case for module in MODULES for case in vars(module).values() if isinstance(case, Case)]


@pytest.fixture(scope="session")
def trained(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory, lora: Any) -> Callable[[], Path]:
    """A function that trains on its first call, and returns a folder with ``base`` and ``run``."""
    home = tmp_path_factory.mktemp("trained")

    def train() -> Path:
        if not (home / "run").exists():
            shutil.copytree(tiny_gpt2, home / "base")
            (home / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 4)
            recipe = {
                "model": {"name_or_path": str(home / "base")},
                "adapter": {"r": 4, "target_modules": ["c_attn"]},
                "data": {"train": str(home / "rows.jsonl"), "max_length": 32},
                "training": {"output_dir": str(home / "run"), "max_steps": 1, "learning_rate": 0.005},
            }
            (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            done = lora("train", home / "recipe.yaml")
            assert done.exit_code == 0, done.stderr
        return home

    return train


@pytest.fixture
def world(
    tmp_path: Path,
    tiny_gpt2: Path,
    tiny_llama: Path,
    write_recipe: Any,
    trained: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, tiny_gpt2, tiny_llama, write_recipe, trained)


def everything_in(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below ``root``, with its modification time and content, if that may be read."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if not path.is_symlink() and path.is_file() and os.access(path, os.R_OK) else b"",
        )
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused(case: Case, world: World, lora: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments(world)
    before = everything_in(world.root)
    if not case.loads:
        from transformers import AutoModelForCausalLM

        def load(*_: Any, **__: Any) -> None:
            pytest.fail("weights were loaded before the fault was told")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    result = lora(*arguments)
    if report := os.environ.get("LORA_MESSAGES"):
        with Path(report).open("a") as file:
            file.write(
                f"--- {case.name}: lora {' '.join(map(str, arguments))} -> {result.exit_code}\n{result.stderr}\n"
            )
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for words in case.says:
        assert words in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(result.stderr.splitlines()) < (62 if len(errors) > 12 else 30)  # many faults get a line each
    assert len(set(errors)) == len(errors), "a fault is told twice"
    assert everything_in(world.root) == before


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_writes_in_its_folder_alone(processes: str, write_recipe: Any, lora_process: Any, tmp_path: Path) -> None:
    """Nothing is written to the working directory, the home folder, or folders for temporary or cached files."""
    places = {"HOME": "home", "TMPDIR": "tmp", "HF_HOME": "home/hub", "XDG_CACHE_HOME": "home/cache"}
    for place in ("here", *places.values()):
        (tmp_path / place).mkdir()
    recipe = write_recipe({"data.validation": 0.2, "training.output_dir": "run", "quantization.method": "nf4"})
    before = everything_in(tmp_path)
    env = {name: str(tmp_path / place) for name, place in places.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = lora_process("train", recipe, "--num-processes", processes, env=env, cwd=tmp_path / "here")
    assert result.exit_code == 0, result.stderr
    after = everything_in(tmp_path)
    assert "here/run/adapter/adapter_model.safetensors" in after
    fonts = ("home/.config", "home/cache/matplotlib")  # matplotlib's own list of fonts
    outside = {name: kept for name, (_, kept) in after.items() if not name.startswith(("here/run", *fonts))}
    assert outside == {name: kept for name, (_, kept) in before.items()}


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_recipes_that_are_shipped_are_read(path: Path) -> None:
    from lora_cli.recipe.load import load_recipe

    assert load_recipe(path).training.output_dir.startswith("runs/")
