"""A lack of memory is recognised, told with its numbers, and loses nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_cli.model.memory import activation_bytes, asked_bytes, is_out_of_memory
from lora_cli.training.out_of_memory import largest_batch

LIMITED = """
import resource, sys
from pathlib import Path
from lora_cli.cli.app import main
from lora_cli.training import loop
take = loop.take_step
def limited(trainer, step, rate):
    if step.number == 2:
        data = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, ((data << 10) + int(sys.argv[1]), resource.RLIM_INFINITY))
    return take(trainer, step, rate)
loop.take_step = limited
sys.exit(main(sys.argv[2:]))
"""


def test_an_allocation_the_processor_refuses_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert asked_bytes(refused.value) == 2**60


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
    assert asked_bytes(error) == asked


def test_the_largest_batch() -> None:
    lengths, supervised = np.array([10, 4, 6]), np.array([2, 3, 1])
    assert largest_batch(lengths, supervised, 2, 16, False) == (20, 10)
    assert largest_batch(lengths, supervised, 2, 5, False) == (10, 10)
    assert largest_batch(lengths, supervised, 8, 16, False) == (30, 18)
    assert largest_batch(lengths, supervised, 1, 16, True) == (16, 6)
    assert largest_batch(lengths, supervised, 8, 16, True) == (20, 6)


def test_activations_kept_by_a_small_llama_are_as_estimated() -> None:
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = adapted(input_ids=torch.zeros((4, 128), dtype=torch.long), use_cache=False, logits_to_keep=1)
    measured = sum(count for address, count in kept.items() if address not in weights)
    assert output.logits.shape[1] == 1
    assert 0.7 < activation_bytes(config, 4 * 128, 0, 4) / measured < 1.3


def test_a_run_out_of_memory_tells_what_would_help_and_keeps_its_checkpoints(
    write_recipe: Any, tmp_path: Path, tokenizer: Any
) -> None:
    base = tmp_path / "wide"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=24_000,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    run = Run(tmp_path / "run")
    recipe = write_recipe(
        {
            "model.name_or_path": base,
            "data": {"train_on": "all"},
            "training": {"save_steps": 1, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1},
        }
    )
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    done = subprocess.run(
        [sys.executable, script, str(100_000_000), "train", recipe],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    told = " ".join(done.stderr.split())
    assert done.returncode == 3, told
    assert re.search(r"out of memory: [\d.]+ [GM]B more were asked for; cpu has [\d.]+ GB, of which", told), told
    ways = re.findall(r"(\S+=\S+(?: \S+=\S+)?) \(saves about ([\d.]+) [MG]B\)", told)
    assert len(ways) == 3
    assert "training.per_device_train_batch_size=6 training.gradient_accumulation_steps=2" in dict(ways)
    saved = [float(amount) for _, amount in ways]
    assert saved == sorted(saved, reverse=True)
    assert run.checkpoints == [1]
    assert json.loads((run.folder / "checkpoints/step-00000001/manifest.json").read_text())
