"""Running out of memory is recognized, reported with figures, and loses nothing."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import Result, Run, fork_lora
from peft import LoraConfig, get_peft_model
from transformers import Gemma3nTextConfig, LlamaConfig, LlamaForCausalLM

from lora_cli.data import resource_limits
from lora_cli.model.adapters import adapt
from lora_cli.model.base import load_base
from lora_cli.model.fast_paths.fuse import fuse
from lora_cli.model.layers import linear_layers
from lora_cli.recipe.schema import Adapter, Model, Quantization
from lora_cli.system.memory import free_bytes, is_out_of_memory, requested_bytes, total_bytes
from lora_cli.training.memory.activations import recompute_activations, saved_bytes_per_token
from lora_cli.training.memory.estimate import activation_bytes, largest_batch

LIMIT = """
import resource
from pathlib import Path
def limit():
    data = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, ((data << 10) + {more}, resource.RLIM_INFINITY))
"""
AT_STEP_2 = """
from lora_cli.training import loop
take = loop.take_step
def limited(trainer, step, rate):
    if step.number == 2:
        limit()
    return take(trainer, step, rate)
loop.take_step = limited
"""
ONCE_IMPORTED = """
import peft, transformers.models.llama.modeling_llama, lora_cli.evaluation.compare, lora_cli.weights.merge
limit()
"""


def test_an_allocation_the_processor_refuses_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert requested_bytes(refused.value) == 2**60


@pytest.mark.parametrize(
    ("error", "is_one", "asked"),
    [
        (MemoryError(), True, None),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), True, 5 * 2**29),
        (RuntimeError("std::bad_alloc"), True, None),
        (OSError(12, "Cannot allocate memory"), True, None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), False, None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, None),
        (ValueError("out of memory."), False, None),
    ],
)
def test_what_is_a_lack_of_memory(error: Exception, is_one: bool, asked: int | None) -> None:
    assert is_out_of_memory(error) is is_one
    assert requested_bytes(error) == asked


GROUPS: dict[str, tuple[str, str, dict[str, int], int, int]] = {
    # proc/self/cgroup, folder under sys/fs/cgroup, limits by group, expected total, expected free
    "version 2": ("0::/a/b", "", {"a/b": 1000}, 1000, 1000 - 60),
    "version 2, a group above": ("0::/a/b", "", {"a": 500, "a/b": 1000}, 500, 500 - 60),
    "version 2, a container's own": ("0::/", "", {"": 700}, 700, 700 - 60),
    "version 1": ("9:name=systemd:/x\n4:cpu,memory:/a/b\n0::/", "memory", {"a/b": 900}, 900, 900 - 60),
    "version 1, a container's own": ("4:memory:/docker/f00", "memory", {"": 800}, 800, 800 - 60),
    "all is used": ("0::/a", "", {"a": 50}, 50, 0),
}


@pytest.mark.parametrize("case", GROUPS)
def test_a_control_groups_limit_is_the_memory_there_is(case: str, tmp_path: Path) -> None:
    membership, mount, limits, total, free = GROUPS[case]
    limit, used, reclaimable = ("max", "current", "inactive_file")
    if mount:
        limit, used, reclaimable = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership + "\n")
    for group in ("", "a", "a/b"):
        folder = tmp_path / "sys/fs/cgroup" / mount / group
        folder.mkdir(parents=True, exist_ok=True)
        allowed = limits.get(group, "max" if not mount else 0x7FFFFFFFFFFFF000)
        (folder / f"memory.{limit}").write_text(f"{allowed}\n")
        (folder / f"memory.{used}").write_text("100\n")
        (folder / "memory.stat").write_text(f"anon 55\n{reclaimable} 40\nactive_file 5\n")
    assert total_bytes(torch.device("cpu"), tmp_path) == total
    assert free_bytes(torch.device("cpu"), tmp_path) == free


def test_without_control_groups_memory_is_the_machines(tmp_path: Path) -> None:
    assert total_bytes(torch.device("cpu"), tmp_path) == psutil.virtual_memory().total


@pytest.mark.parametrize(("kind", "used"), [(resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")])
def test_a_limit_of_the_process_is_the_memory_there_is(kind: int, used: str, tmp_path: Path) -> None:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (getattr(psutil.Process().memory_info(), used) + 2**28, before[1]))
    try:
        free = free_bytes(torch.device("cpu"), tmp_path)
    finally:
        resource.setrlimit(kind, before)
    assert free == pytest.approx(2**28, abs=2**26)


@pytest.mark.parametrize("room", [resource_limits.MAX_EXTRA_BYTES // 2, 2 * resource_limits.MAX_EXTRA_BYTES])
def test_a_template_takes_no_more_than_the_process_may(room: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    own = (used + room, before[1])
    resource.setrlimit(resource.RLIMIT_AS, own)
    try:
        with resource_limits.resource_limits():
            most = resource.getrlimit(resource.RLIMIT_AS)[0]
        after = resource.getrlimit(resource.RLIMIT_AS)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert most - used == pytest.approx(min(room, resource_limits.MAX_EXTRA_BYTES), abs=2**24) and after == own


def test_the_largest_batch() -> None:
    lengths, supervised = np.array([10, 4, 6]), np.array([2, 3, 1])
    assert largest_batch(lengths, supervised, 2, 16, False) == (20, 10)
    assert largest_batch(lengths, supervised, 2, 5, False) == (10, 10)
    assert largest_batch(lengths, supervised, 8, 16, False) == (30, 18)
    assert largest_batch(lengths, supervised, 1, 16, True) == (16, 6)
    assert largest_batch(lengths, supervised, 8, 16, True) == (20, 6)


def highest(step: Callable[[], None], trace: Path) -> int:
    """The peak of the bytes allocated during ``step``, beyond those allocated before."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        step()
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    return int(max(event["args"]["Total Allocated"] for event in memory) - before)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("inner", "hidden", "layers"), [(344, 128, 4), (344, 128, 12), (2400, 64, 4)])
def test_a_small_llamas_backward_pass_takes_what_is_estimated(
    inner: int, hidden: int, layers: int, checkpointing: bool, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=targets)).train()
    if checkpointing:
        recompute_activations(model)
    ids = torch.zeros((4, 128), dtype=torch.long)

    def step() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.sum().backward()

    step()  # allocates the adapter's gradients
    measured = highest(step, tmp_path / "trace.json")
    whole = activation_bytes(config, 4 * 128, 0, 4, checkpointing)
    assert whole - activation_bytes(config, 0, 0, 4, checkpointing) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("dropout", "targets", "method"),
    [(0.0, ".", None), (0.1, ".", None), (0.0, r"\.[89]\.", None), (0.0, "self_attn", "int8")],
)
def test_what_is_kept_of_a_token_is_found_out_whatever_the_adapter(
    dropout: float, targets: str, method: str | None, fused: bool, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=172, num_hidden_layers=10, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    quantization = method and Quantization(method=method)
    base = load_base(tmp_path, Model(name_or_path=str(tmp_path)), quantization, torch.device("cpu"), torch.float32)
    if fused:
        fuse(base)
    names = [name for name in linear_layers(base) if re.search(targets, name)]
    model = adapt(base, Adapter(r=2, lora_dropout=dropout), names, fused)
    ids = torch.zeros((1, 512), dtype=torch.long)

    def step() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.sum().backward()

    AcceleratorState._reset_state()  # an earlier test may have trained in another precision
    accelerator = Accelerator(cpu=True)
    kept = saved_bytes_per_token(model, None, accelerator, False, 512)
    step()
    whole = activation_bytes(config, 512, 0, 4, kept=kept)
    assert whole - activation_bytes(config, 0, 0, 4) == pytest.approx(highest(step, tmp_path / "trace.json"), rel=0.15)


def test_a_width_for_each_layer_counts_as_the_largest() -> None:
    configs = (Gemma3nTextConfig(num_hidden_layers=3, intermediate_size=sizes) for sizes in ([7, 99, 8], [99, 99, 99]))
    first, second = (activation_bytes(config, 9, 9, 2) for config in configs)
    assert first == second


def wide_llama(folder: Path, tokenizer: Any, width: int, layers: int) -> Path:
    """Save a model with MLPs of this ``width``, small in everything else."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def limited(when: str, more: int, *arguments: str | Path) -> tuple[Result, str]:
    """Run ``lora`` in a process that may allocate at most ``more`` further bytes from the point ``when`` on. Return its
    result, and its stderr as one line."""
    (ended,) = fork_lora(arguments, first=LIMIT.format(more=more) + when)
    return ended, " ".join(ended.stderr.split())


def test_a_run_out_of_memory_tells_what_would_help_and_keeps_its_checkpoints(
    write_recipe: Any, tmp_path: Path, tokenizer: Any
) -> None:
    base = wide_llama(tmp_path / "wide", tokenizer, 24_000, 4)
    run = Run(tmp_path / "run")
    recipe = write_recipe(
        {
            "model.name_or_path": base,
            "data": {"train_on": "all"},
            "training": {"save_steps": 1, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1},
        }
    )
    ended, told = limited(AT_STEP_2, 100_000_000, "train", recipe)
    assert ended.exit_code == 3, told
    assert re.search(r"out of memory: [\d.]+ [GM]B more were asked for; cpu has [\d.]+ GB, of which", told), told
    ways = re.findall(r"^ {6}(\S+=\S+(?: \S+=\S+)?) \(saves about ([\d.]+) [MG]B\)$", ended.stderr, re.MULTILINE)
    assert len(ways) == 3
    assert "training.per_device_train_batch_size=6 training.gradient_accumulation_steps=2" in dict(ways)
    saved = [float(amount) for _, amount in ways]
    assert saved == sorted(saved, reverse=True)
    assert run.checkpoints == [1] and told.endswith("the checkpoints are kept")
    assert json.loads((run.folder / "checkpoints/step-00000001/manifest.json").read_text())


@pytest.mark.parametrize("verb", ["eval", "merge", "quantize"])
def test_other_commands_tell_of_a_lack_of_memory(verb: str, tmp_path: Path, tokenizer: Any, qa_file: Path) -> None:
    base = wide_llama(tmp_path / "wide", tokenizer, 200_000, 1)
    model = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=1, target_modules=["up_proj"])).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    arguments: dict[str, list[str | Path]] = {
        "eval": [base, "--data", qa_file],
        "merge": [tmp_path / "adapter", "--out", out],
        "quantize": [base, "--out", out],
    }
    ended, told = limited(ONCE_IMPORTED, 30_000_000, verb, *arguments[verb])
    assert ended.exit_code == 3, told
    number = r"[\d.]+ [GM]B"
    assert re.search(rf"error: out of memory: .*; cpu has {number}, of which {number} were free", told), told
    assert "what helps: " in told and ("lora quantize" in told) == (verb == "eval")
    assert "Traceback" not in told and ended.stdout == ""
    assert not out.exists() and not list(tmp_path.glob(".*"))
