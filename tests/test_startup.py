"""Frequent commands answer at once: help, version and the refusal of a recipe import no heavy library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_json
from made_adapters import make_adapter

from lora_cli.system.cores import SPINS, usable_cores

HEAVY = ("torch", "transformers", "datasets", "pandas", "peft", "accelerate", "bitsandbytes", "numpy", "pyarrow")
VERBS = {
    "train": ("--resume", "--overwrite", "--json", "--quiet", "--debug", "recipe", "adapter.r=32"),
    "eval": ("--data", "--perplexity", "--json", "--quiet", "--debug", "target"),
    "merge": ("--out", "--json", "--quiet", "--debug", "adapter"),
    "quantize": ("--out", "--method", "--double-quant", "--data", "--json", "--quiet", "--debug", "model"),
    "adapters": ("list", "show", "compose", "resize", "diff", "extract"),
    "explain": ("--schema", "--quiet", "--debug", "key"),
}
SCRIPT = f"""
import json, sys
from lora_cli.cli.app import main
code = main(sys.argv[1:])
sys.stderr.write("\\n" + json.dumps([code, [name for name in {(*HEAVY, "pydantic")!r} if name in sys.modules]]))
"""


def run(*args: str, cwd: Path | None = None) -> tuple[int, list[str], str, str]:
    """Run ``lora`` in its own process. Return its exit code, the heavy modules imported, stdout and stderr."""
    repository = Path(__file__).resolve().parent.parent
    script = f"import sys; sys.path.insert(0, {str(repository)!r}); {SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=60, cwd=cwd)
    told, _, report = done.stderr.rpartition("\n")
    code, modules = json.loads(report)
    return code, modules, done.stdout, told


ADAPTERS = {
    "list": ("--json", "--quiet", "--debug", "folder"),
    "show": ("--json", "--quiet", "--debug", "adapter"),
    "resize": ("--rank", "--energy", "--out", "--json", "--quiet", "--debug", "adapter"),
    "diff": ("--json", "--quiet", "--debug", "first", "second"),
    "extract": ("--rank", "--energy", "--out", "--json", "--quiet", "--debug", "base", "tuned"),
    "compose": ("--method", "--rank", "--density", "--seed", "--out", "--json", "--quiet", "--debug", "adapter"),
}


@pytest.mark.parametrize("verb", ADAPTERS)
def test_help_of_the_verbs_for_adapters(verb: str) -> None:
    code, modules, stdout, stderr = run("adapters", verb, "--help")
    assert (code, modules, stderr) == (0, [], "")
    assert all(word in stdout for word in ADAPTERS[verb])


@pytest.mark.parametrize("verb", [None, *VERBS])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_loads_nothing_and_names_the_options(verb: str | None, flag: str) -> None:
    code, modules, stdout, stderr = run(*([verb] if verb else []), flag)
    assert (code, modules, stderr) == (0, [], "")
    for word in VERBS[verb] if verb else (*VERBS, "--version", "--help"):
        assert word in stdout


def test_version() -> None:
    from lora_cli import __version__

    assert run("--version")[:3] == (0, [], f"lora {__version__}\n")


def test_nothing_asked_for_shows_the_help() -> None:
    code, modules, stdout, stderr = run()
    assert (code, modules, stdout) == (2, [], "")
    assert "train" in stderr


@pytest.mark.parametrize("arguments", [("explain",), ("explain", "adapter.r"), ("explain", "--schema")])
def test_the_reference_needs_pydantic_alone(arguments: tuple[str, ...]) -> None:
    code, modules, stdout, _ = run(*arguments)
    assert (code, modules) == (0, ["pydantic"])
    assert "r" in stdout


def test_a_bad_recipe_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {name_or_path: x}\nadapter: {rank: 0}\n", encoding="utf-8")
    code, modules, stdout, stderr = run("train", "bad.yaml", cwd=tmp_path)
    assert (code, modules, stdout) == (2, ["pydantic"], "")
    assert "bad.yaml:2:11" in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "{recipe}", "data.train=missing.jsonl"),
        ("train", "{recipe}", "adapter.target_modules=[nothing]"),
        ("train", "{recipe}", "adapter.target_modules=attentio"),
        ("train", "{recipe}", "adapter.target_modules=h.(0"),
        ("train", "{recipe}", "adapter.r=999"),
        ("train", "{recipe}", "data.format=chat"),
        ("train", "{recipe}", "training.output_dir={recipe}"),
        ("merge", "{recipe}", "--out", "out"),
        ("quantize", "nowhere", "--out", "out"),
        ("quantize", "{base}", "--out", "out", "--data", "missing.jsonl"),
        ("adapters", "resize", "nowhere", "--rank", "2", "--out", "out"),
        ("eval", "nowhere", "--data", "missing.jsonl"),
        ("eval", "{base}", "--data", "missing.jsonl"),
    ],
    ids=lambda arguments: "-".join(arguments[::2]),
)
def test_what_files_alone_tell_is_told_without_torch(
    arguments: tuple[str, ...], tiny_gpt2: Path, write_recipe: Any, tmp_path: Path
) -> None:
    recipe = str(write_recipe({"model.name_or_path": tiny_gpt2}))
    places = {"recipe": recipe, "base": tiny_gpt2}
    code, modules, stdout, _ = run(*(argument.format_map(places) for argument in arguments), cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert not {"torch", "transformers", "peft", "datasets", "pandas"} & set(modules)


def test_an_adapter_of_another_model_is_told_without_torch(
    tiny_gpt2: Path, tiny_llama: Path, write_recipe: Any, tmp_path: Path
) -> None:
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    recipe = str(write_recipe({"model.name_or_path": tiny_gpt2}))
    code, modules, _, stderr = run("train", recipe, f"adapter.init_from={adapter}", cwd=tmp_path)
    assert code == 2 and "are for a layer that the base does not have" in stderr
    assert not {"torch", "transformers", "peft"} & set(modules)


def test_adapters_are_listed_and_shown_without_torch(tiny_gpt2: Path, tmp_path: Path) -> None:
    make_adapter("gpt2", tiny_gpt2, tmp_path / "a")
    for verb, folder in (("list", tmp_path), ("show", tmp_path / "a")):
        code, modules, stdout, _ = run("adapters", verb, str(folder))
        assert code == 0 and "torch" not in modules and "c_attn" in stdout


def test_a_whole_plain_adapter_is_merged_without_peft(tiny_llama: Path, tmp_path: Path) -> None:
    """Importing PEFT takes longer than many merges, and more memory than a merge of a few layers."""
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    code, modules, _, stderr = run("merge", str(adapter), "--out", str(tmp_path / "out"), "--no-verify")
    assert code == 0 and not {"peft", "transformers"} & set(modules), stderr


def test_an_unknown_model_type_is_told_without_torch(tiny_llama: Path, write_recipe: Any, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    edit_json(model / "config.json", model_type="gpt17")
    recipe = str(write_recipe({"model.name_or_path": model}))
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    for arguments in (
        ("train", recipe),
        ("merge", str(adapter), "--base", "model", "--out", "out"),
        ("quantize", "model", "--out", "out"),
        ("eval", "model", "--data", "qa.jsonl"),
    ):
        code, modules, stdout, stderr = run(*arguments, cwd=tmp_path)
        assert (code, stdout) == (2, "")
        assert "'gpt17' is unknown to transformers" in stderr
        assert not {"torch", "transformers"} & set(modules)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/system.slice/a.service", {"system.slice/a.service/cpu.max": "50000 100000"}, 1),
        ("0::/job/step", {"job/cpu.max": "50000 100000", "job/step/cpu.max": "max 100000"}, 1),
        ("0::/on/the/host", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "?"}, None),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_control_groups_share_of_the_cores(
    membership: str, files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    named = {f"sys/fs/cgroup/{name}": content for name, content in files.items()} | {"proc/self/cgroup": membership}
    for name, content in named.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert usable_cores(tmp_path) == (expected or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("given", "spins"), [({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_idle_threads_sleep_soon_unless_the_environment_says_otherwise(given: dict[str, str], spins: str) -> None:
    script = "from lora_cli.cli.app import main; main(['--version']); import torch"
    inherited = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}  # set by lora in here
    env = inherited | {"OMP_DISPLAY_ENV": "VERBOSE"} | given
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_opened(closed: str, write_recipe: Any, tmp_path: Path) -> None:
    """Otherwise there is nothing to show progress on, and files that are opened get the numbers of the streams."""
    command = f'exec "$0" -m lora_cli train "$1" training.max_steps=1 {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, write_recipe({})], capture_output=True, check=False)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["finished"]


def test_a_working_directory_that_is_gone_is_told(write_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = 'cd gone; rmdir ../gone; exec "$0" -m lora_cli train "$1"'
    arguments = ["sh", "-c", command, sys.executable, write_recipe({})]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "the working directory no longer exists" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_needs_no_working_directory(option: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = 'cd gone; rmdir ../gone; exec "$0" -m lora_cli "$1"'
    arguments = ["sh", "-c", command, sys.executable, option]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "lora" in done.stdout


def test_an_interpreter_without_docstrings_is_told(write_recipe: Any, lora_process: Any) -> None:
    recipe = write_recipe({"training.max_steps": 1})
    for level in ("1", "2"):
        result = lora_process("train", recipe, env={"PYTHONOPTIMIZE": level})
        assert (result.exit_code, "PYTHONOPTIMIZE=2" in result.stderr) == ((0, False) if level == "1" else (2, True))


@pytest.mark.parametrize(
    ("module", "code", "told"),
    [("peft", 3, "a library could not be imported: "), ("lora_cli.recipe.load", 1, "bug in lora: ModuleNotFoundError")],
)
def test_a_library_that_is_not_there_is_no_bug(module: str, code: int, told: str, write_recipe: Any) -> None:
    """As where lora was installed without what it requires. A module of lora's own is always there."""
    absent = f"import sys; sys.modules[{module!r}] = None"
    script = f"{absent}; from lora_cli.cli.app import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "train", str(write_recipe({}))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code and told in done.stderr and module in done.stderr


@pytest.mark.parametrize(
    "environment", [{"LOGLEVEL": ""}, {"LOGLEVEL": "debug", "MPLBACKEND": "a window"}, {"LOGLEVEL": "INFO"}], ids=str
)
def test_settings_for_other_programs_do_not_keep_libraries_from_being_imported(
    environment: dict[str, str], write_recipe: Any, lora_process: Any
) -> None:
    recipe = write_recipe({"training.max_steps": 1})
    assert lora_process("train", recipe, env=environment).exit_code == 0


def test_training_imports_no_compiler(write_recipe: Any) -> None:
    """bitsandbytes calls torch.compile when it is imported. This must not import the compiler, which no step uses."""
    seen = "[name for name in ('bitsandbytes', 'torch._inductor.compile_fx') if name in sys.modules]"
    script = f"import sys; from lora_cli.cli.app import main; print(main(sys.argv[1:]), {seen})"
    arguments = ["train", str(write_recipe({})), "training.max_steps=1", "--quiet"]
    child = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[-1] == "0 ['bitsandbytes']"


def test_setup_does_not_empty_what_a_link_leads_to(tmp_path: Path) -> None:
    project, other = tmp_path / "project", tmp_path / "other"
    (project / "scripts").mkdir(parents=True)
    other.mkdir()
    (other / "pyvenv.cfg").touch()
    for name in ("pyproject.toml", "scripts/constraints.txt", "scripts/setup"):
        shutil.copy(Path(__file__).parents[1] / name, project / name)
    (project / ".venv").symlink_to(other)
    done = subprocess.run([project / "scripts" / "setup"], capture_output=True, text=True, check=False)
    assert (done.returncode, list(other.iterdir())) == (2, [other / "pyvenv.cfg"])
    assert f".venv is a link, to {other}" in done.stderr
