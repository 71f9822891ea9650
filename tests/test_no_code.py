"""Nothing that comes as data is executed: pickles are not read, and a model's Python files are not imported."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import done, edit_json


@dataclass
class Trap:
    """Creates the folder ``mark`` when unpickled; its ``code`` does so when executed."""

    mark: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)

    @property
    def code(self) -> str:
        return f"import os\nos.mkdir({str(self.mark)!r})\nclass Evil: pass\n"

    def write(self, *files: Path) -> None:
        for file in files:
            file.write_bytes(pickle.dumps({"weight": self}))

    @property
    def sprung(self) -> bool:
        return self.mark.exists()


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trap:
    """A trap, in a folder that Python would import from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.stdin", None)  # a question whether to run code would be asked here
    return Trap(tmp_path / "sprung")


def refused(result: Any, *says: str) -> None:
    assert result.exit_code == 2, result.stderr
    for words in says:
        assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_the_trap_works(trap: Trap, tmp_path: Path) -> None:
    trap.write(tmp_path / "file")
    with (tmp_path / "file").open("rb") as file:
        pickle.load(file)
    assert trap.sprung
    trap.mark.rmdir()
    exec(trap.code)
    assert trap.sprung


@pytest.fixture
def run(write_recipe: Any, lora: Any, no_curves: None, tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A finished run in ``run``, trained on its own copy of a base in ``base``."""
    shutil.copytree(tiny_gpt2, tmp_path / "base")
    done(lora("train", write_recipe({"model.name_or_path": tmp_path / "base", "training.max_steps": 2})))
    return tmp_path / "run"


def commands(tmp_path: Path, write_recipe: Any, qa_file: Path) -> dict[str, list[Any]]:
    """The arguments of each command that reads a base."""
    base = tmp_path / "base"
    changes = {"model.name_or_path": base, "training.output_dir": tmp_path / "new"}
    return {
        "train": ["train", write_recipe(changes)],
        "qlora": ["train", write_recipe(changes | {"quantization": {"method": "nf4"}}, name="q.yaml"), "--overwrite"],
        "eval": ["eval", base, "--data", qa_file],
        "quantize": ["quantize", base, "--out", tmp_path / "quantized"],
    }


@pytest.mark.parametrize("weights", ["pickled", "named safetensors", "in the index", "both"])
def test_pickled_weights_of_a_base(
    weights: str,
    trap: Trap,
    tiny_gpt2: Path,
    write_recipe: Any,
    lora: Any,
    no_curves: None,
    qa_file: Path,
    tmp_path: Path,
) -> None:
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    trap.write(*(base / name for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth")))
    edit_json(base / "pytorch_model.bin.index.json", metadata={}, weight_map={"lm_head.weight": "pytorch_model.bin"})
    says = []
    if weights == "named safetensors":
        trap.write(base / "model.safetensors")
        says = ["model.safetensors", "not a whole safetensors file"]
    elif weights == "in the index":
        (base / "model.safetensors").unlink()
        edit_json(
            base / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": "pytorch_model.bin"}
        )
        says = ["pytorch_model.bin", "not a whole safetensors file"]
    elif weights == "pickled":
        (base / "model.safetensors").unlink()
        says = ["pytorch_model.bin", "pickled weights are not read", "safetensors"]
    for arguments in commands(tmp_path, write_recipe, qa_file).values():
        result = lora(*arguments)
        refused(result, *says) if says else done(result)
        assert not trap.sprung


@pytest.mark.parametrize("weights", ["pickled", "named safetensors", "both"])
def test_pickled_weights_of_an_adapter(
    weights: str, trap: Trap, run: Path, write_recipe: Any, lora: Any, no_curves: None, qa_file: Path, tmp_path: Path
) -> None:
    adapter = run / "adapter"
    trap.write(*(adapter / name for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin")))
    says = []
    if weights == "named safetensors":
        trap.write(adapter / "adapter_model.safetensors")
        says = ["adapter_model.safetensors", "not a whole safetensors file"]
    elif weights == "pickled":
        (adapter / "adapter_model.safetensors").unlink()
        says = ["adapter_model.bin", "pickled weights are not read", "safetensors"]
    changes = {"model.name_or_path": tmp_path / "base", "training.output_dir": tmp_path / "on"}
    for arguments in (
        ["eval", run, "--data", qa_file],
        ["merge", adapter, "--out", tmp_path / "merged"],
        ["train", write_recipe(changes | {"adapter.init_from": adapter})],
    ):
        result = lora(*arguments)
        refused(result, *says) if says else done(result)
        assert not trap.sprung


def test_an_adapter_hidden_in_a_base(
    trap: Trap, run: Path, write_recipe: Any, lora: Any, qa_file: Path, tmp_path: Path
) -> None:
    """Transformers would load it along with the base, pickled or not."""
    shutil.copy(run / "adapter" / "adapter_config.json", tmp_path / "base")
    trap.write(tmp_path / "base" / "adapter_model.bin")
    found = commands(tmp_path, write_recipe, qa_file)
    for name in ("train", "qlora"):
        refused(lora(*found[name]), "holds an adapter beside the model", "adapter_config.json")
    for name in ("eval", "quantize"):
        assert lora(*found[name]).exit_code == 2
    assert not trap.sprung


@pytest.mark.parametrize("which", ["weights", "optimizer", "random"])
def test_pickles_in_a_checkpoint(which: str, trap: Trap, run: Path, lora: Any, no_curves: None) -> None:
    checkpoint = run / "checkpoints" / "step-00000002"
    trap.write(*(checkpoint / name for name in ("optimizer.pt", "rng_state.pth", "scheduler.bin")))
    trap.write(checkpoint / f"{which}.safetensors")
    manifest = checkpoint / "manifest.json"
    files = sorted(file for file in checkpoint.iterdir() if file != manifest)
    sums = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()} for file in files
    }
    manifest.write_text(json.dumps(sums), encoding="utf-8")
    result = done(lora("train", run / "recipe.yaml", "--resume", "training.max_steps=3"))
    assert f"{checkpoint} is damaged" in result.stderr
    assert not trap.sprung


def test_pickles_beside_a_tokenizer_and_as_data(
    trap: Trap, run: Path, write_recipe: Any, lora: Any, no_curves: None, qa_file: Path, tmp_path: Path
) -> None:
    names = ("tokenizer.pkl", "vocab.pkl", "tokenizer.model", "added_tokens.bin", "spiece.model", "vocab.bin")
    for folder in (tmp_path / "base", run / "adapter"):
        trap.write(*(folder / name for name in names))
    for arguments in commands(tmp_path, write_recipe, qa_file).values():
        done(lora(*arguments))
    done(lora("eval", run, "--data", qa_file))
    for folder in (tmp_path / "base", run / "adapter"):
        trap.write(folder / "tokenizer.json")
    for target in (tmp_path / "base", run):
        refused(lora("eval", target, "--data", qa_file), "tokenizer")
    for name in ("rows.pkl", "rows.pt", "rows.parquet", "rows.jsonl", "rows.csv", "rows.py"):
        trap.write(tmp_path / name)
        refused(lora("train", write_recipe({"data.train": name, "training.output_dir": "other"})), name)
    assert not trap.sprung


MAPS = {"AutoConfig": "own_code.Evil", "AutoModel": "own_code.Evil", "AutoModelForCausalLM": "own_code.Evil"}


@pytest.mark.parametrize("kind", ["unknown", "known"])
def test_code_in_a_base(
    kind: str, trap: Trap, run: Path, write_recipe: Any, lora: Any, no_curves: None, qa_file: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    (base / "custom_generate").mkdir()
    for name in ("own_code.py", "tokenization.py", "custom_generate/generate.py", "__init__.py"):
        (base / name).write_text(trap.code, encoding="utf-8")
    edit_json(base / "config.json", auto_map=MAPS, **({"model_type": "evil"} if kind == "unknown" else {}))
    edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.Evil", None]})
    for arguments in commands(tmp_path, write_recipe, qa_file).values():
        result = lora(*arguments)
        if kind == "unknown":
            refused(result, "needs its own code (own_code.py), which lora does not run", "config.json")
        else:
            done(result)
        assert not trap.sprung
    (run / "adapter" / "provenance.json").unlink()  # else the changed base would be refused unread
    result = lora("merge", run / "adapter", "--out", tmp_path / "merged")
    refused(result, "own_code.py") if kind == "unknown" else done(result)
    assert not trap.sprung


def test_code_of_a_tokenizer_alone(
    trap: Trap, tiny_gpt2: Path, write_recipe: Any, lora: Any, no_curves: None, qa_file: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    (base / "vocab.bpe").write_text("x", encoding="utf-8")
    (base / "tokenization.py").write_text(trap.code, encoding="utf-8")
    edit_json(
        base / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["tokenization.Evil", None]},
    )
    for name, arguments in commands(tmp_path, write_recipe, qa_file).items():
        result = lora(*arguments)
        assert not trap.sprung
        assert result.exit_code == 2, (name, result.stderr)


@pytest.mark.parametrize("place", [("attn_implementation",), ("text_config", "_attn_implementation")])
def test_kernels_of_the_hub(
    place: tuple[str, ...], tiny_gpt2: Path, write_recipe: Any, lora: Any, qa_file: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    value: Any = "someone/attention"
    for key in reversed(place):
        value = {key: value}
    edit_json(base / "config.json", **value)
    for arguments in commands(tmp_path, write_recipe, qa_file).values():
        refused(lora(*arguments), "someone/attention", "config.json")


def test_a_module_named_by_an_adapter(trap: Trap, run: Path, lora: Any, qa_file: Path, tmp_path: Path) -> None:
    (tmp_path / "evil_core.py").write_text(trap.code, encoding="utf-8")
    for changes in (
        {"megatron_config": {"a": 1}, "megatron_core": "evil_core"},
        {"auto_mapping": {"parent_library": "evil_core", "base_model_class": "Evil"}, "megatron_config": None},
    ):
        edit_json(run / "adapter" / "adapter_config.json", **changes)
        result = lora("eval", run, "--data", qa_file)
        assert not trap.sprung
        refused(result, "megatron_config") if changes["megatron_config"] else done(result)


TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{{ self.__init__.__globals__['__builtins__'].__import__('os').mkdir('MARK') }}",
    "file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_stays_in_its_box(
    name: str, trap: Trap, tiny_llama: Path, write_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATES[name].replace("MARK", str(trap.mark)), encoding="utf-8")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    refused(lora("train", write_recipe({"model.name_or_path": base, "data.train": "chat.jsonl"})), "chat template")
    assert not trap.sprung
