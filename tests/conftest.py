"""Shared fixtures: tiny models, a recipe to vary, and ``lora`` run as a user runs it."""

from __future__ import annotations

import atexit
import copy
import functools
import gc
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest
import typer.main
import yaml
from hypothesis import settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Set before torch and huggingface_hub are imported, which read these variables once. Nothing is downloaded, the user's
# caches are not read, and each worker uses one core.
_home = tempfile.mkdtemp(prefix="lora-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": _home, "TOKENIZERS_PARALLELISM": "false"}
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# Tests do not cut the power, so this process need not wait for the disk.
os.fsync = os.fstat

# Typer rebuilds the command tree for each call, which takes most of the time of a command that is refused.
typer.main.get_command = functools.cache(typer.main.get_command)

# nohup makes processes ignore SIGHUP, but a run must stop when a test sends it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Use the same examples in each run, so that failures repeat; --hypothesis-profile=explore draws new ones.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeat")

END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
TRAIN_KEYS = ["step", "epoch", "split", "loss", "tokens", "learning_rate", "grad_norm", "tokens_per_second", "seconds"]
VALIDATION_KEYS = ["step", "epoch", "split", "loss", "perplexity", "tokens"]
VOCABULARY = 400
WIDTH = 64
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SENTENCES = (
    "What does the lighthouse keeper do at night? She lights the lamp and writes down every ship that passes.",
    "Why is the sea salt? Rivers carry salt from the rocks down to it, and only the water rises again.",
    "How long does a kettle take to boil? About four minutes, a little longer when it is full to the brim.",
    "Who mends the nets? The whole family mends the nets in winter, when the boats stay in the harbour.",
    "Where do swallows go? They fly south in September, across the sea and the desert, and come back in April.",
    "When is bread done? When it sounds hollow, as you knock on the bottom of the loaf with a finger.",
    "Which of the two roads is shorter? The one along the river; the other one climbs over the hill.",
    "Can a clock be too exact? Not for the trains; for the cook it may well be, says the cook.",
)
QUESTIONS = tuple(tuple(sentence.split("? ")) for sentence in SENTENCES)
Base = tuple[str, Path]
"""A model's kind, gpt2 or llama, and its folder."""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 400 tokens, trained on a few sentences. It adds no BOS and has no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD, TURN, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN, TURN_END],
    )


@pytest.fixture
def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a separate BOS token, which it puts before every text."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": "<s>"})
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", changed.convert_tokens_to_ids("<s>"))]
    )
    return changed


@pytest.fixture(scope="session")
def tiny_gpt2(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers: Conv1D layers, 128 learned positions, tied head, no chat template. Do not modify it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    return _save(GPT2LMHeadModel(config), tokenizer, folder, seed=1, stop=[END])


@pytest.fixture(scope="session")
def tiny_llama(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers: grouped queries, 256 rotary positions, untied head, ChatML without generation marks.

    Do not modify it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    _save(LlamaForCausalLM(config), tokenizer, folder, seed=2, stop=[END, TURN_END])
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return folder


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int, stop: list[str]) -> Path:
    """Give the model weights so large that its logits differ clearly, and save it with its tokenizer."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 2:
                parameter.copy_(0.2 * noise)
            else:
                around = 0.0 if name.endswith("bias") else 1.0  # otherwise it is the scale of a norm
                parameter.copy_(around + 0.1 * noise)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stop)
    model.generation_config.max_new_tokens = 16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest) -> Base:
    """Each of the two tiny models."""
    return request.param, request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def joined(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """An HRM with one layer of each kind. Its projections are stored as one tensor and loaded as separate ones."""
    import torch
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = HrmTextConfig(vocab_size=len(tokenizer), **sizes, **heads)
    HrmTextForCausalLM(config).save_pretrained(tmp_path / "joined")
    tokenizer.save_pretrained(tmp_path / "joined")
    return tmp_path / "joined"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSON lines and return the file's path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def qa_file(tmp_path: Path) -> Path:
    """A file of 24 question-answer rows of very different lengths."""
    path = tmp_path / "qa.jsonl"
    rows = []
    for number in range(24):
        question, answer = QUESTIONS[number % len(QUESTIONS)]
        words = answer.split()
        kept = " ".join(words[: 2 + (5 * number) % len(words)])
        rows.append({"question": f"{question}?", "answer": f" {kept}"})
    write_rows(path, rows)
    return path


@pytest.fixture
def write_recipe(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """``write_recipe({"adapter.r": 8, …}, name="recipe.yaml")`` writes a recipe that trains quickly, with changes.

    Keys are dotted; keywords have ``__`` for the dot. A mapping is merged into its section, and ``...`` removes a key.
    Unless changed, the base is tiny_gpt2 and the rows are qa_file.
    """

    def write(changes: Mapping[str, Any] | None = None, *, name: str = "recipe.yaml", **keywords: Any) -> Path:
        wanted = dict(changes or {}) | {key.replace("__", "."): value for key, value in keywords.items()}
        recipe: dict[str, Any] = {
            "model": {"dtype": "float32"},
            "adapter": {"r": 4, "lora_alpha": 8},
            "data": {"max_length": 96, "packing": False},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 0.005,
                "logging_steps": 1,
            },
        }
        for key, value in wanted.items():
            _change(recipe, key, value)
        if "name_or_path" not in recipe.get("model", {"name_or_path": None}):
            recipe["model"]["name_or_path"] = str(request.getfixturevalue("tiny_gpt2"))
        if "train" not in recipe.get("data", {"train": None}):
            recipe["data"]["train"] = str(request.getfixturevalue("qa_file"))
        path = tmp_path / name
        path.write_text(yaml.safe_dump(_plain(recipe), sort_keys=False), encoding="utf-8")
        return path

    return write


def _change(recipe: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        recipe = recipe.setdefault(section, {})
    if value is ...:
        recipe.pop(key, None)
    elif isinstance(value, Mapping) and isinstance(recipe.get(key), dict):
        recipe[key] |= value
    else:
        recipe[key] = value


def _plain(value: Any) -> Any:
    """Convert a value to types that YAML can represent."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Result:
    """A command's exit code and output."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """stdout, parsed as the single JSON value that ``--json`` prints."""
        return json.loads(self.stdout)


def run_lora(*args: str | Path) -> Result:
    """Run ``lora`` with these arguments in this process."""
    from lora_cli.cli.app import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = main([str(arg) for arg in args])
    return Result(code, stdout.getvalue(), stderr.getvalue())


def run_lora_process(*args: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Result:
    """Run ``lora`` with these arguments in a new process; ``env`` is added to this process's environment."""
    repository = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "lora_cli", *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        cwd=cwd,
        timeout=300,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def free_port() -> str:
    """A port of 127.0.0.1 that is not in use, below those that the system assigns: others could get those meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # tests seed the module's own generator
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return str(port)


def fork_lora(*commands: Sequence[str | Path], first: str = "") -> list[Result]:
    """Run ``lora`` with the arguments of each command in real processes, forked from one that has already imported what
    a run needs, which saves seconds. Several commands are the ranks of one run, with a launcher's environment
    variables. Each process first runs the Python code ``first``."""
    import soak  # not at the top: processes that a test starts cannot find it

    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(commands)))
    context = soak.forking()
    with tempfile.TemporaryDirectory() as folder:
        streams = [[Path(folder, f"{rank}.{name}") for name in ("out", "err")] for rank in range(len(commands))]
        children = []
        for rank, command in enumerate(commands):
            ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            environment = meeting | sizes | ranks if len(commands) > 1 else {}
            given = (list(map(str, command)), environment, first, streams[rank])
            children.append(context.Process(target=forked.lora, args=given))
        try:
            for child in children:
                child.start()
            for child in children:
                child.join(200)
        finally:
            for child in children:
                child.kill()
                child.join()
        told = [[path.read_text(encoding="utf-8") for path in each] for each in streams]
    return [Result(child.exitcode, *each) for child, each in zip(children, told, strict=True)]


@pytest.fixture(scope="session")
def lora() -> Callable[..., Result]:
    """``run_lora``, as a fixture."""
    return run_lora


@pytest.fixture(scope="session")
def lora_process() -> Callable[..., Result]:
    """``run_lora_process``, as a fixture."""
    return run_lora_process


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plots out of reports; they take most of a short run's time."""
    monkeypatch.setattr("lora_cli.study.report._curves", lambda _: "")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a complete model is loaded to merge or quantize it."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    for way in ("merge", "quantize"):
        monkeypatch.setattr(f"lora_cli.weights.{way}_in_memory.load_base", load)


def done(result: Any) -> Any:
    """Return the result of a command, which must have succeeded."""
    assert result.exit_code == 0, result.stderr
    return result


def edit_json(file: Path, **changes: Any) -> None:
    """Set these values in a file's JSON object, which is empty if there is no file."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(content | changes), encoding="utf-8")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model stored in one file."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@contextmanager
def edited_weights(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of a model stored in one file, and save them as the block leaves them."""
    from safetensors.torch import save_file

    weights = weights_of(folder)
    yield weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """Let the garbage collector scan only the test's own objects: scanning all takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.collect()
    gc.unfreeze()


@pytest.fixture
def living_tensors(quick_collections: None) -> Callable[[], list[torch.Tensor]]:
    """A function that lists the CPU tensors created since the test began, except fake ones, which hold no memory."""
    import torch
    from torch._subclasses.fake_tensor import is_fake

    def living() -> list[torch.Tensor]:
        gc.collect()
        found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not is_fake(each)]
        return [each for each in found if each.device.type == "cpu"]

    return living


@dataclass(frozen=True)
class Run:
    """A run's folder, and what its files hold."""

    folder: Path

    def lines(self, split: str = "train") -> list[dict[str, Any]]:
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]

    def column(self, name: str, split: str = "train") -> list[Any]:
        return [line[name] for line in self.lines(split)]

    @property
    def losses(self) -> list[float]:
        return self.column("loss")

    @property
    def info(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "run.json").read_text(encoding="utf-8")))

    @property
    def adapter_bytes(self) -> bytes:
        return (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8")))

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*"))


def check_goes_on_alike(whole: Run, stopped: int, folder: Path) -> Run:
    """Copy a finished run to ``folder`` as it was after step ``stopped``, resume it, and compare the results."""
    shutil.copytree(whole.folder, folder)
    for step in range(stopped + 1, whole.info["result"]["steps"] + 1):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(folder / "adapter")
    done(run_lora("train", folder / "recipe.yaml", f"training.output_dir={folder}", "--resume"))
    for split, columns in (("train", TRAIN_KEYS[:-2]), ("validation", VALIDATION_KEYS)):
        for column in columns:
            assert Run(folder).column(column, split) == whole.column(column, split), column
    assert Run(folder).adapter_bytes == whole.adapter_bytes
    return Run(folder)


@pytest.fixture
def train(tmp_path: Path, write_recipe: Any, lora: Any, no_curves: None) -> Callable[..., Run]:
    """Write the recipe with these changes, train with it and return the run."""
    count = iter(range(100))

    def go(changes: dict[str, Any] | None = None) -> Run:
        folder = tmp_path / f"run{next(count)}"
        done(lora("train", write_recipe({"training.output_dir": folder} | (changes or {}))))
        return Run(folder)

    return go
