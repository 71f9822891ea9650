"""One run on several processes: the same results as on one, one output, one exit code, no loss when a process dies."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import PrecisionType, str_to_bool
from conftest import Run, done, edit_json, fork_lora, free_port
from torch._logging._internal import _parse_log_settings
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lora_cli.model.device import is_usable
from lora_cli.recipe.load import load_recipe
from lora_cli.training.distributed.zero_config import config_faults, deepspeed_faults
from lora_cli.training.run.checkpoint import is_complete

TWO = {"training.gradient_accumulation_steps": 2}
"""Half of the recipe's gradient accumulation, for twice the processes: each step takes the same rows."""
ENDLESS = {"training.num_train_epochs": 100, "training.lr_scheduler_type": "constant", "training.warmup_ratio": 0.0}
"""A run too long to end before it is stopped. Its total length does not affect the steps taken until then."""


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: Any) -> Callable[..., Path]:
    """Writes a recipe, with changes, whose epochs end in an odd number of uneven batches."""
    draw = random.Random(3)
    rows = tmp_path / "uneven.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(37):
            words = " ".join(draw.choices(["alpha", "beta", "gamma", "delta"], k=draw.randint(1, 12)))
            file.write(json.dumps({"prompt": f"{number} {'?' * draw.randint(1, 9)}", "completion": f" {words}"}) + "\n")
    usual = {
        "data.train": str(rows),
        "data.validation": 0.2,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 4,
        "training.max_steps": ...,
        "training.num_train_epochs": 2,
        "training.logging_steps": 1,
        "training.eval_steps": 3,
        "training.save_steps": 3,
        "training.learning_rate": 0.01,
    }
    count = iter(range(100))

    def write(changes: dict[str, Any] | None = None) -> Path:
        number = next(count)
        folder = {"training.output_dir": str(tmp_path / f"run{number}")}
        return write_recipe(usual | folder | (changes or {}), name=f"recipe{number}.yaml")

    return write


def run_of(recipe: Path) -> Run:
    """The run of ``recipe``: its folder has the same number."""
    return Run(recipe.with_name(recipe.stem.replace("recipe", "run")))


def assert_same_numbers(found: Run, wanted: Run) -> None:
    """Assert that each step has the same token count and a loss equal to 1e-5, and that adapters agree to 1e-3."""
    assert found.column("step") == wanted.column("step")
    assert found.column("tokens") == wanted.column("tokens")
    assert found.column("learning_rate") == wanted.column("learning_rate")
    assert found.column("loss") == pytest.approx(wanted.column("loss"), rel=1e-5)
    assert found.column("grad_norm") == pytest.approx(wanted.column("grad_norm"), rel=1e-4)
    assert found.column("tokens", "validation") == wanted.column("tokens", "validation")
    assert found.column("loss", "validation") == pytest.approx(wanted.column("loss", "validation"), rel=1e-5)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert float((found.tensors[name] - tensor).norm()) <= 1e-3 * float(tensor.norm()) + 1e-5, name


@pytest.mark.parametrize("kind", ["copies", "shards of NF4"])
def test_two_processes_take_the_steps_of_one(
    kind: str, recipe: Callable[..., Path], lora: Any, lora_process: Any
) -> None:
    changes: dict[str, Any] = {"training.seed": 2**32 - 1}  # the largest: the second process cannot add 1 to it
    if "NF4" in kind:
        changes |= {"quantization.method": "nf4", "quantization.compute_dtype": "float32"}
    alone, shared = recipe(changes), recipe(changes | TWO | {"training.fsdp": "shards" in kind})
    done(lora("train", alone))
    command = ["train", shared, "--json"]
    ended = fork_lora(command, command) if "NF4" in kind else [lora_process(*command, "--num-processes", "2")]
    first, *others = map(done, ended)

    wanted, found = run_of(alone), run_of(shared)
    assert_same_numbers(found, wanted)
    # Only one process has printed, and each line only once.
    assert first.json["steps"] == wanted.column("step")[-1] == 8
    assert first.stderr.count("step 8  loss") == 1
    assert all(other.stdout == "" and "loss" not in other.stderr for other in others)
    assert found.info["data"] == wanted.info["data"]
    assert found.info["processes"] == 2
    assert found.info["result"]["total_parameters"] == wanted.info["result"]["total_parameters"]
    kept = [sorted(path.name for path in (run.folder / "cache").glob("base-*")) for run in (found, wanted)]
    assert kept[0] == kept[1] and len(kept[0]) == ("NF4" in kind)


def launched(*options: str) -> list[str]:
    """Accelerate's command line for two processes, up to the module's arguments."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return [*launcher, "--mixed_precision", "no", "--dynamo_backend", "no", *options, "-m", "lora_cli"]


def start(command: Sequence[str], *arguments: str | Path) -> subprocess.Popen[str]:
    repository = str(Path(__file__).resolve().parent.parent)
    temporary = os.environ["HF_HOME"]  # which goes with the tests, and with it what Accelerate's own launcher leaves
    environment = os.environ | {"PYTHONPATH": repository, "OMP_NUM_THREADS": "1", "TMPDIR": temporary}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def on_two_machines(*arguments: Sequence[str | Path]) -> list[subprocess.Popen[str]]:
    """Start ``lora`` as one process on each of two simulated machines. ``arguments`` are those of each machine."""
    machines = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    return [start(launched(*machines, "--machine_rank", str(rank)), *given) for rank, given in enumerate(arguments)]


def test_two_machines_of_one_process_each(recipe: Callable[..., Path], lora: Any) -> None:
    alone = recipe({"data.packing": True})
    shared = recipe({"data.packing": True} | TWO)
    children = on_two_machines(["train", shared], ["train", shared])
    done(lora("train", alone))
    for child in children:
        _, errors = child.communicate(timeout=200)
        assert child.returncode == 0, errors
    assert_same_numbers(run_of(shared), run_of(alone))


ON_ITS_OWN_MACHINE = """
import os
import lora_cli.cli.app
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
lora_cli.cli.app._SECONDS_FOR_OTHERS = 0
"""


@pytest.mark.parametrize("differ", [True, False])
def test_machines_that_would_train_otherwise_are_refused(
    differ: bool, recipe: Callable[..., Path], tiny_gpt2: Path, tmp_path: Path
) -> None:
    """Rows and base are compared by content, so their paths may differ between machines."""
    shared = recipe(TWO | {"training.num_train_epochs": 1})
    rows, base = tmp_path / "there.jsonl", tmp_path / "there"
    lines = (tmp_path / "uneven.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(reversed(lines) if differ else lines))
    shutil.copytree(tiny_gpt2, base)
    if differ:
        edit_json(base / "config.json", layer_norm_epsilon=0.5)
    there = [f"data.train={rows}", f"model.name_or_path={base}"]
    there += ["training.learning_rate=0.02", "quantization.method=int8"] if differ else []
    ended = fork_lora(["train", shared], ["train", shared, *there], first=ON_ITS_OWN_MACHINE)
    errors = [process.stderr for process in ended]
    if not differ:
        assert [process.exit_code for process in ended] == [0, 0], errors
        return
    assert [process.exit_code for process in ended] == [2, 2], errors
    for told in errors:
        for what in (
            "training.learning_rate is 0.02, but 0.01",
            "quantization.method is 'int8', but None",
            "the base's fingerprint is ",
            "the training rows' fingerprint is ",
            "the validation rows' fingerprint is ",
        ):
            assert f"process 1 on {socket.gethostname()}: {what}" in told
        assert "loading" not in told
    assert not run_of(shared).folder.exists()


ON_ONE_GPU = """
import torch
import lora_cli.cli.app
torch.cuda.device_count = lambda: 1
lora_cli.cli.app._SECONDS_FOR_OTHERS = 0
"""


def test_processes_that_would_share_a_gpu_are_refused(recipe: Callable[..., Path]) -> None:
    """NCCL would refuse to connect them, which reads as a broken connection."""
    shared = recipe(TWO)
    for process in fork_lora(["train", shared], ["train", shared], first=ON_ONE_GPU):
        assert process.exit_code == 2
        assert "2 processes on this machine, which has 1 GPU for them" in process.stderr
        assert "loading" not in process.stderr


UNCONNECTED = """
import lora_cli.cli.app
from lora_cli.training import setup
from torch.distributed import DistBackendError

def refuse(*_):
    raise DistBackendError("NCCL error in: utils.cpp:77\\nLast error:\\n/dev/shm is too small")

setup.check_agreement = refuse
lora_cli.cli.app._SECONDS_FOR_OTHERS = 0
"""


def test_why_processes_do_not_connect_is_told(recipe: Callable[..., Path]) -> None:
    shared = recipe(TWO)
    for process in fork_lora(["train", shared], ["train", shared], first=UNCONNECTED):
        assert process.exit_code == 3
        assert "the connection to another process of this run broke: /dev/shm is too small" in process.stderr


WITHOUT_LOGITS = """
import torch.nn.functional

def refuse(*_, **__):
    raise AssertionError("there are logits")

torch.nn.functional.cross_entropy = refuse
"""


def test_a_sharded_head_makes_its_loss_in_chunks(recipe: Callable[..., Path], lora: Any) -> None:
    alone, shared = recipe(), recipe(TWO | {"training.fsdp": True})
    done(lora("train", alone))
    for process in fork_lora(["train", shared], ["train", shared], first=WITHOUT_LOGITS):
        done(process)
    assert_same_numbers(run_of(shared), run_of(alone))


def test_shards_compute_in_16_bits_what_one_process_does(recipe: Callable[..., Path], lora: Any) -> None:
    """PEFT's own layers would otherwise multiply by the adapter in float32, on copies of all their inputs."""
    changes = {"model.dtype": "bfloat16", "adapter.fused": False, "training.max_steps": 1}
    changes |= {"training.num_train_epochs": ..., "data.validation": ...}
    alone, shared = recipe(changes), recipe(changes | TWO | {"training.fsdp": True})
    done(lora("train", alone))
    for process in fork_lora(["train", shared], ["train", shared]):
        done(process)
    assert run_of(shared).column("grad_norm") == pytest.approx(run_of(alone).column("grad_norm"), rel=1e-6)


def test_shards_of_a_text_model_whose_vision_tower_transformers_names(
    recipe: Callable[..., Path], lora: Any, tokenizer: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    mixer = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
    mixer |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    layers = {"layer_types": ["linear_attention", "full_attention"], "vocab_size": len(tokenizer)}
    Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **heads, **mixer, **layers)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = {"model.name_or_path": str(tmp_path / "base"), "training.max_steps": 3, "training.num_train_epochs": ...}
    alone, shared = recipe(changes), recipe(changes | TWO | {"training.fsdp": True})
    done(lora("train", alone))
    for process in fork_lora(["train", shared], ["train", shared]):
        done(process)
    assert_same_numbers(run_of(shared), run_of(alone))


def test_shards_of_adapted_layers_outside_the_repeated_ones(
    recipe: Callable[..., Path], lora: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """What only the outermost shards hold, such as OPT's projections of the embedding: its gradient, and the best
    step's weights, with which the adapter is verified."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.0}
    sizes |= {"word_embed_proj_dim": 16, "max_position_embeddings": 128, "vocab_size": len(tokenizer)}
    OPTForCausalLM(OPTConfig(**sizes, pad_token_id=tokenizer.pad_token_id)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = {"model.name_or_path": str(tmp_path / "base"), "adapter.target_modules": "all-linear"}
    changes |= {"training.max_steps": 3, "training.num_train_epochs": ...}
    alone, shared = recipe(changes), recipe(changes | TWO | {"training.fsdp": True})
    diverging = {"training.load_best_model_at_end": True, "training.eval_steps": 1, "training.learning_rate": 1.0}
    best = recipe(changes | TWO | {"training.fsdp": True, "training.warmup_steps": 0} | diverging)
    done(lora("train", alone))
    for each in (shared, best):
        for process in fork_lora(["train", each], ["train", each]):
            done(process)
    assert_same_numbers(run_of(shared), run_of(alone))
    assert run_of(best).info["result"]["adapter_step"] < 3, "the best step is an earlier one"


FLOAT16 = """
import torch
from lora_cli.training import setup
from lora_cli.training.distributed import sharding

def accelerator(*_, make=sharding.Accelerator, **options):
    made = make(*_, **options)
    made.native_amp, made.scaler = True, torch.amp.GradScaler("cpu")
    return made

setup.resolve_dtype = lambda *_: torch.float16
sharding.Accelerator = accelerator
"""
"""Lets a CPU train in float16, with the gradient scaler that Accelerate uses on a GPU."""


def test_shards_in_float16(recipe: Callable[..., Path], lora: Any) -> None:
    changes = {"training.max_steps": 3, "training.num_train_epochs": ..., "data.validation": ...}
    alone, shared = recipe(changes), recipe(changes | TWO | {"training.fsdp": True})
    done(lora("train", alone))
    for process in fork_lora(["train", shared], ["train", shared], first=FLOAT16):
        done(process)
    found, wanted = run_of(shared), run_of(alone)
    assert (found.info["dtype"], wanted.info["dtype"]) == ("float16", "float32")
    assert found.column("loss") == pytest.approx(wanted.column("loss"), rel=1e-3)
    assert found.column("grad_norm") == pytest.approx(wanted.column("grad_norm"), rel=1e-2)


@pytest.mark.parametrize(("version", "reshards"), [(1, True), (2, True), (2, False)])
def test_shards_by_the_launchers_own_configuration(
    version: int, reshards: bool, recipe: Callable[..., Path], lora: Any, tmp_path: Path
) -> None:
    fsdp = {"fsdp_version": version, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    if not reshards:
        fsdp["fsdp_reshard_after_forward"] = False
    usual = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "use_cpu": False, "num_processes": 2}
    configuration = tmp_path / "accelerate.yaml"
    configuration.write_text(json.dumps(usual | {"distributed_type": "FSDP", "fsdp_config": fsdp}))
    alone, shared = recipe({"data.packing": True}), recipe({"data.packing": True} | TWO)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
    child = start([*launcher, "-m", "lora_cli"], "train", shared)
    if version == 2:
        done(lora("train", alone))
    _, errors = child.communicate(timeout=200)
    if version == 1:
        assert child.returncode != 0
        assert "set fsdp_version: 2" in errors
        assert not run_of(shared).folder.exists()
    else:
        assert child.returncode == 0, errors
        assert_same_numbers(run_of(shared), run_of(alone))


def wait_for(folder: Path, step: int, child: subprocess.Popen[str]) -> None:
    """Wait until the run has logged ``step``."""
    metrics = folder / "metrics.jsonl"
    for _ in range(1200):
        if metrics.is_file() and f'"step": {step},' in metrics.read_text(encoding="utf-8"):
            return
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.1)
    raise AssertionError(f"no step {step}")


LORA = (sys.executable, "-m", "lora_cli")


def test_stopped_and_gone_on_with(recipe: Callable[..., Path], lora_process: Any) -> None:
    """Dropout, packing, shuffling: a checkpoint keeps both processes' random states and the position in the rows. Under
    nohup the run continues when the terminal closes."""
    changes = TWO | ENDLESS | {"adapter.lora_dropout": 0.2, "data.packing": True}
    undisturbed, stopped = recipe(changes), recipe(changes)
    child = start(("nohup", *LORA), "train", stopped, "--num-processes", "2")
    wait_for(run_of(stopped).folder, 3, child)
    child.send_signal(signal.SIGHUP)
    wait_for(run_of(stopped).folder, 5, child)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=100)
    assert child.returncode == 143, errors
    assert errors.count("checkpoint written") == 1
    assert "torch/" not in errors, "the launcher says nothing of its own"

    found, wanted = run_of(stopped), run_of(undisturbed)
    steps = f"training.max_steps={len(found.losses) + 4}"
    done(lora_process("train", stopped, steps, "--resume", "--num-processes", "2"))
    for process in fork_lora(["train", undisturbed, steps], ["train", undisturbed, steps]):
        done(process)
    assert found.column("step") == wanted.column("step")
    assert found.column("loss") == wanted.column("loss")
    weights = "adapter/adapter_model.safetensors"
    assert (found.folder / weights).read_bytes() == (wanted.folder / weights).read_bytes()


INTERRUPTED = """
import sys
from pathlib import Path
from types import SimpleNamespace
import psutil
from torch.distributed.elastic.metrics import api
from torch.distributed.elastic.multiprocessing import SignalException
from lora_cli.training import launch
from lora_cli.training.run.run_folder import RunFolder

def interrupted():
    raise SignalException("terminated", 15)

api.time = SimpleNamespace(time=interrupted)
gone = psutil.Popen(["true"])
gone.wait()
psutil.Process.children = lambda *_, **__: [gone]
launch.multi_gpu_launcher = lambda _: api.prof(lambda: None)()
sys.exit(launch.launch([], 2, RunFolder(Path("run"))))
"""
"""A launch in which a signal arrives as the launcher notes the time, and a child ends before it is killed."""


def test_a_signal_during_the_launchers_own_timing_stops_it() -> None:
    """torch's ``prof`` then raises UnboundLocalError for a start time that it has not set. In its own process, since
    the launcher kills all children in the end."""
    stopped = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert stopped.returncode == 143, stopped.stderr


def test_shards_are_gone_on_with(recipe: Callable[..., Path]) -> None:
    changes = TWO | {"training.fsdp": True, "adapter.lora_dropout": 0.2, "training.max_steps": 6}
    undisturbed = recipe(changes | {"training.save_total_limit": None, "training.num_train_epochs": ...})
    for process in fork_lora(["train", undisturbed], ["train", undisturbed]):
        done(process)
    wanted = run_of(undisturbed)
    found = Run(wanted.folder.with_name("cut"))
    shutil.copytree(wanted.folder, found.folder)
    shutil.rmtree(found.folder / "checkpoints" / "step-00000006")
    shutil.rmtree(found.folder / "adapter")
    again = ["train", undisturbed, f"training.output_dir={found.folder}", "--resume"]
    first, _ = map(done, fork_lora(again, again))
    assert "step-00000003" in first.stderr
    assert found.column("loss") == wanted.column("loss")
    assert found.adapter_bytes == wanted.adapter_bytes


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_begins_and_goes_on_as_one_process_would(
    stage: int, recipe: Callable[..., Path], lora: Any, lora_process: Any, tmp_path: Path
) -> None:
    """Checkpoints hold complete tensors, not DeepSpeed's partitions: a run resumes with or without DeepSpeed."""
    pytest.importorskip("deepspeed", reason="an extra: scripts/setup deepspeed")
    configuration = tmp_path / "zero.json"
    configuration.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}}))
    packing = {"data.packing": stage == 3}
    alone, shared = recipe(packing), recipe(packing | TWO | {"training.deepspeed": str(configuration)})
    done(lora("train", alone))
    done(lora_process("train", shared, "--num-processes", "2"))
    wanted, found = run_of(alone), run_of(shared)
    assert_same_numbers(found, wanted)

    weights = found.adapter_bytes
    newest = max((found.folder / "checkpoints").iterdir()).name
    shutil.rmtree(found.folder / "checkpoints" / newest)
    done(lora_process("train", shared, "--resume", "--num-processes", "2"))
    assert found.adapter_bytes == weights
    shutil.rmtree(found.folder / "checkpoints" / newest)
    plain = ["training.gradient_accumulation_steps=4", "training.deepspeed=null"]
    done(lora("train", shared, "--resume", *plain))
    assert_same_numbers(found, wanted)


@pytest.mark.parametrize(
    ("content", "changes", "says"),
    [
        (None, {}, "zero.json"),
        ('{"zero_optimization": 2}', {}, "has no zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 3}}', {"quantization.method": "nf4"}, "training.fsdp: true"),
        ("{}", {"training.fsdp": True}, "keep one"),
        ("{}", {"training.optim": "adamw_8bit"}, "cannot be sharded"),
        ("{}", {"training.on_nonfinite": "skip"}, "takes every step"),
    ],
)
def test_zero_refused(
    content: str | None, changes: dict[str, Any], says: str, recipe: Callable[..., Path], lora: Any, tmp_path: Path
) -> None:
    configuration = tmp_path / "zero.json"
    if content is not None:
        configuration.write_text(content)
    refused = recipe(changes | {"training.deepspeed": str(configuration)})
    result = lora("train", refused)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not run_of(refused).folder.exists()


def test_what_zero_configurations_usually_say_is_taken() -> None:
    offload = {"device": "cpu", "pin_memory": True}
    buffers = {"stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e9, "reduce_bucket_size": "auto"}
    zero = {"stage": 3, "overlap_comm": True, "offload_optimizer": offload, "offload_param": offload} | buffers
    usual = {"bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW"}, "gradient_clipping": "auto"}
    assert config_faults({"zero_optimization": zero, "steps_per_print": 10} | usual, "zero.json") == []


def test_stage_2_takes_a_quantized_base(recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    changes = {"quantization.method": "nf4", "training.deepspeed": str(tmp_path / "zero.json")}
    told = [fault.what for fault in deepspeed_faults(load_recipe(recipe(changes)))]
    assert told == ([] if find_spec("deepspeed") else ["training.deepspeed: deepspeed is not installed"])


def children_of(process: int) -> list[int]:
    return [int(line) for line in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_process_that_dies_ends_the_run(recipe: Callable[..., Path], lora: Any) -> None:
    """The other process does not wait for it. The checkpoints are complete, and one process resumes what two began."""
    dying = recipe(TWO | ENDLESS | {"training.save_total_limit": None})
    folder = run_of(dying).folder
    child = start(LORA, "train", dying, "--num-processes", "2")
    wait_for(folder, 7, child)
    began = time.monotonic()
    os.kill(children_of(child.pid)[-1], signal.SIGKILL)
    _, errors = child.communicate(timeout=100)
    assert child.returncode == 3, errors
    assert time.monotonic() - began < 60
    assert errors.count("error: ") == 1, "the cause alone is told, not what it did to the other process"
    assert "killed (signal 9)" in errors and "the checkpoints are kept; --resume continues from the newest" in errors
    assert "--resume" in errors
    kept = sorted((folder / "checkpoints").glob("step-*"))
    assert kept
    assert all(map(is_complete, kept))
    assert not (folder / "adapter").exists()

    refused = lora("train", dying, "--resume", "training.num_train_epochs=4")
    assert refused.exit_code == 2
    assert "training.gradient_accumulation_steps=4" in refused.stderr
    steps = max(run_of(dying).column("step")) + 4
    done(lora("train", dying, "--resume", "training.gradient_accumulation_steps=4", f"training.max_steps={steps}"))
    alone = recipe(ENDLESS | {"training.max_steps": steps})
    done(lora("train", alone))
    assert run_of(dying).column("step") == list(range(1, steps + 1))
    assert run_of(dying).column("tokens") == run_of(alone).column("tokens")
    assert run_of(dying).column("loss") == pytest.approx(run_of(alone).column("loss"), rel=1e-4)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own doing")
def test_processes_end_with_their_launcher(recipe: Callable[..., Path]) -> None:
    shared = recipe(TWO | ENDLESS)
    folder = run_of(shared).folder
    child = start(LORA, "train", shared, "--num-processes", "2")
    wait_for(folder, 4, child)
    ranks = children_of(child.pid)
    assert len(ranks) >= 2
    child.kill()
    child.communicate(timeout=20)
    for _ in range(100):
        if not any(map(is_alive, ranks)):
            break
        time.sleep(0.1)
    assert not any(map(is_alive, ranks))
    assert all(is_complete(path) for path in (folder / "checkpoints").glob("step-*"))
    steps = max(run_of(shared).column("step")) + 1
    more = ["train", shared, "--resume", f"training.max_steps={steps}"]
    for process in fork_lora(more, more):
        done(process)
    assert run_of(shared).column("step") == list(range(1, steps + 1))


def test_a_fault_is_told_once(
    recipe: Callable[..., Path], lora_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of a configuration file that Accelerate would refuse here."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("{distributed_type: 'NO', gpu_ids: '0'}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    broken = recipe({"adapter.target_modules": ["no_such_layer"]})
    result = lora_process("train", broken, "--num-processes", "2")
    assert result.exit_code == 2
    assert result.stderr.count("no_such_layer") == 1
    assert not run_of(broken).folder.exists()
    assert lora_process("train", broken, "--num-processes", "0").exit_code == 2


COMPLETE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= (environment): expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK=one (environment): expected a whole number"),
        ({"WORLD_SIZE": "two", "RANK": "one"}, "RANK=one (environment): expected a whole number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 (environment): the environment describes one of several"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 (environment): the environment describes one of several"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 (environment): MPI has started several processes"),
        (COMPLETE | {"MASTER_ADDR": ""}, "but does not set MASTER_ADDR"),
        (COMPLETE | {"RANK": "2"}, "RANK=2 (environment): not a rank of 2 processes"),
    ],
)
def test_an_environment_of_several_processes_that_could_not_connect(
    environment: dict[str, str], expected: str, write_recipe: Any, lora: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    """As a shell or a container may have it, of an earlier run or of a launcher that is not torch's."""
    monkeypatch.setattr("lora_cli.cli.app._SECONDS_FOR_OTHERS", 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = lora("train", write_recipe({}))
    assert result.exit_code == 2 and expected in result.stderr
    assert result.stderr.count("unset it") == 1, "what two faults have in common is said once"
    assert not (tmp_path / "run").exists()


def test_a_local_rank_below_zero_is_that_of_a_single_process(write_recipe: Any, lora: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "-1")
    done(lora("train", write_recipe({"training.max_steps": 1})))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ACCELERATE_USE_CPU", "perhaps", "ACCELERATE_USE_CPU (environment): Accelerate refuses its configuration"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron is not installed"),
        ("ACCELERATE_TORCH_DEVICE", "mps", "ACCELERATE_TORCH_DEVICE=mps (environment): there is no such device here"),
        ("HF_HUB_ETAG_TIMEOUT", "soon", "HF_HUB_ETAG_TIMEOUT=soon (environment): a library does not accept it"),
    ],
)
def test_a_variable_that_a_library_refuses_is_named(
    name: str, value: str, expected: str, write_recipe: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lora_cli", "train", write_recipe({})]
    done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "gpus", "wanted"),
    [("cpu", 0, True), ("cuda", 0, False), ("cuda", 1, True), ("cuda:1", 1, False), ("cuda:1", 2, True)],
)
def test_a_gpu_is_usable_if_there_are_as_many(device: str, gpus: int, wanted: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert is_usable(torch.device(device)) is wanted


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("HF_HUB_ETAG_TIMEOUT", " Soon ", int),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", float),
        ("ACCELERATE_USE_CPU", "Perhaps", str_to_bool),
        ("ACCELERATE_MIXED_PRECISION", "fp7", PrecisionType),
        ("ACCELERATE_LOG_LEVEL", "LOUD", logging.Logger("a library's").setLevel),
        ("ACCELERATE_TORCH_DEVICE", "gpu", torch.device),
        ("TORCH_LOGS", "everything", _parse_log_settings),
    ],
)
def test_a_variable_is_found_by_how_a_library_names_its_value(
    name: str, value: str, read: Callable[[str], Any], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.recipe.load.load_recipe", lambda *_: read(value))
    monkeypatch.setenv(name, value)
    result = lora("train", "recipe.yaml")
    assert result.exit_code == 2 and f"{name}={value} (environment): a library does not accept it" in result.stderr


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": ""}, {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "1"}])
def test_other_commands_run_as_one_process_whatever_the_environment_says(
    environment: dict[str, str], lora_process: Any, tmp_path: Path
) -> None:
    began = time.monotonic()
    result = lora_process("adapters", "list", tmp_path / "nowhere", env=environment)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert time.monotonic() - began < 20  # and it has not waited for another process


def test_a_process_that_waits_for_others_says_so(recipe: Callable[..., Path]) -> None:
    """They may never come: the environment may be left over from an earlier run."""
    environment = os.environ | COMPLETE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "lora_cli", "train", str(recipe({}))]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "waiting for all 2 processes to connect (to 127.0.0.1)\n"
        child.kill()


def test_the_first_is_left_time_to_tell_it(recipe: Callable[..., Path]) -> None:
    """The launcher ends all processes once one ends, so process 1 must not end before process 0 reports the fault."""
    command = [sys.executable, "-m", "lora_cli", "train", str(recipe({"adapter.target_modules": ["no_such_layer"]}))]
    launched = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with subprocess.Popen(command, env=launched | {"RANK": "1"}, stderr=subprocess.PIPE, text=True) as second:
        first = subprocess.run(command, env=launched | {"RANK": "0"}, capture_output=True, text=True, check=False)
        assert first.returncode == 2
        assert "no_such_layer" in first.stderr
        time.sleep(1)
        assert second.poll() is None
        second.terminate()
        assert second.communicate()[1] == ""


def test_who_waits_for_the_first_ones_rows_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    places = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as in a terminal
        "from lora_cli.training.distributed.cache_keys import wait_for_keys\n"
        "print('waits', flush=True); wait_for_keys()"
    )
    child = start([sys.executable, "-c", script])
    assert child.stdout is not None and child.stdout.readline() == "waits\n"
    time.sleep(1)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    try:
        assert "KeyboardInterrupt" in child.communicate(timeout=20)[1]
    finally:
        child.kill()


def test_one_of_several_processes_ends_with_the_interpreter_standing() -> None:
    """All output is printed, but the interpreter is not shut down: threads of the process group could abort it then."""
    script = """
import atexit, sys
from lora_cli.cli.app import run
atexit.register(print, "taken down")
sys.argv = ["lora", "explain", "adapter.r"]
run()
"""

    def ended(processes: int) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"WORLD_SIZE": str(processes)}
        return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    alone, one_of_two = ended(1), ended(2)
    assert alone.returncode == one_of_two.returncode == 0
    assert alone.stdout.endswith("taken down\n")
    assert one_of_two.stdout == alone.stdout.removesuffix("taken down\n") != ""
