"""``per_device_train_batch_size: auto``: it finds a size that fits, keeps a step's rows, and trains like that size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from conftest import Run, done, fork_lora
from test_memory import ONCE_IMPORTED, limited, wide_llama

from lora_cli.recipe.load import load_recipe
from lora_cli.training.distributed.sharding import free_for_activations
from lora_cli.training.memory.batch_size import divisors, longest_batch
from lora_cli.training.memory.estimate import activation_bytes
from lora_cli.training.prepare import prepare

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def auto(rows: int, **others: Any) -> dict[str, Any]:
    return {"training": {BATCH[0]: "auto", BATCH[1]: rows, **others}}


def numbers(record: dict[str, Any]) -> list[Any]:
    return [record[key] for key in BATCH]


@pytest.mark.parametrize("packing", [True, False])
def test_what_fits_as_a_whole_is_one_batch(packing: bool, train: Callable[..., Run], tmp_path: Path, lora: Any) -> None:
    changes = {"data.packing": packing, "adapter.lora_dropout": 0.1}
    wanted = train({"training": {BATCH[0]: 6, BATCH[1]: 1}} | changes)
    found = train(auto(6) | changes)
    assert found.losses == wanted.losses
    assert found.adapter_bytes == wanted.adapter_bytes
    recipe = found.folder / "recipe.yaml"
    assert numbers(yaml.safe_load(recipe.read_text())["training"]) == numbers(found.info) == [6, 1]

    done(lora("train", recipe, f"training.output_dir={tmp_path / 'repeated'}"))
    assert Run(tmp_path / "repeated").adapter_bytes == wanted.adapter_bytes


def test_what_does_not_fit_is_divided_and_the_step_keeps_its_rows(
    write_recipe: Any, tmp_path: Path, tokenizer: Any, lora: Any
) -> None:
    base = wide_llama(tmp_path / "wide", tokenizer, 24_000, 4)
    common = {"model.name_or_path": base, "data": {"train_on": "all"}}
    run = Run(tmp_path / "found")
    recipe = write_recipe(auto(12, max_steps=2, output_dir=run.folder) | common)
    ended, told = limited(ONCE_IMPORTED, 600_000_000, "train", recipe)
    assert ended.exit_code == 0, told
    size, accumulation = numbers(run.info)
    assert 1 < size < 12 and size * accumulation == 12
    assert f"per_device_train_batch_size: auto -> {size}, gradient_accumulation_steps: {accumulation}" in told

    written = Run(tmp_path / "written")
    by_hand = {BATCH[0]: size, BATCH[1]: accumulation, "max_steps": 2, "output_dir": written.folder}
    done(lora("train", write_recipe({"training": by_hand} | common)))
    assert written.losses == run.losses
    assert written.adapter_bytes == run.adapter_bytes

    tight = Run(tmp_path / "tight")
    recipe = write_recipe(auto(12, max_steps=1, output_dir=tight.folder) | common)
    _, told = limited(ONCE_IMPORTED, 180_000_000, "train", recipe)
    assert "continuing with 1, although even that may not fit" in told


def test_a_resumed_run_keeps_the_numbers_it_began_with(train: Callable[..., Run], write_recipe: Any, lora: Any) -> None:
    by_hand = {BATCH[0]: 3, BATCH[1]: 2}
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    whole, run = (train({"training": by_hand | constant | {"max_steps": steps}}) for steps in (5, 3))
    other = write_recipe(auto(7, output_dir=run.folder, max_steps=5, **constant))
    refused = lora("train", other, "--resume")
    assert refused.exit_code == 2 and "gradient_accumulation_steps was 2 and is now 7" in refused.stderr
    asked = {"output_dir": run.folder, "max_steps": 5, "gradient_checkpointing": True}
    result = done(lora("train", write_recipe(auto(6, **asked, **constant)), "--resume"))
    assert "auto ->" not in " ".join(result.stderr.split())
    assert numbers(run.info) == [3, 2]
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["training"]["gradient_checkpointing"] is True
    assert run.losses == whole.losses
    assert run.adapter_bytes == whole.adapter_bytes


def test_two_processes_take_the_same_numbers(write_recipe: Any, tmp_path: Path, lora: Any) -> None:
    shared, alone = Run(tmp_path / "shared"), Run(tmp_path / "alone")
    recipe = write_recipe(auto(3, output_dir=shared.folder))
    first, second = map(done, fork_lora(["train", recipe], ["train", recipe]))
    assert (first.stderr.count("auto -> 3"), second.stderr) == (1, "")
    assert numbers(shared.info) == [3, 1]
    done(lora("train", write_recipe({"training": {BATCH[0]: 3, BATCH[1]: 2, "output_dir": alone.folder}})))
    assert shared.losses == pytest.approx(alone.losses, rel=1e-5)

    on_one = ("train", write_recipe(auto(3, output_dir=shared.folder)), "--resume", "training.max_steps=5")
    refused = lora(*on_one)
    assert refused.exit_code == 2
    hint = [f"training.{BATCH[0]}=3", f"training.{BATCH[1]}=2"]
    assert f"{' '.join(hint)} keeps it" in " ".join(refused.stderr.split())
    done(lora(*on_one, *hint))
    assert numbers(shared.info) == [3, 2]
    assert shared.column("step") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("whole_logits", "fits"), [(False, False), (True, True)])
def test_activations_are_recomputed_where_nothing_else_fits(
    whole_logits: bool, fits: bool, write_recipe: Any, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a head that ``frozen_head`` does not support, the full logits are counted."""
    if whole_logits:
        monkeypatch.setattr("lora_cli.training.setup.frozen_head", lambda _: None)
    recipe = write_recipe(auto(1, max_steps=1) | {"data": {"packing": False, "train_on": "all"}})
    job = prepare(load_recipe(recipe), resume=False, overwrite=False)
    longest = int(job.train.examples.lengths.max())
    plain = activation_bytes(job.config, longest, longest - 1, 4, whole_logits=whole_logits)
    monkeypatch.setattr(
        "lora_cli.training.distributed.sharding.free_bytes", lambda *_: int((plain + (1 if fits else -1)) / 0.8)
    )
    told = " ".join(done(lora("train", recipe)).stderr.split())
    assert "auto -> 1, gradient_accumulation_steps: 1, " in told and ("activations recomputed" in told) is not fits
    training = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]
    assert training["gradient_checkpointing"] == (not fits)


def test_the_process_with_the_least_room_decides(write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another process found 2.
    monkeypatch.setattr("lora_cli.training.memory.batch_size.all_reduce_max", lambda own, _: max(own, -2))
    told = done(lora("train", write_recipe(auto(6, max_steps=1)))).stderr
    assert "auto -> 2, gradient_accumulation_steps: 3, a step of 6 rows" in " ".join(told.split())


def test_a_streamed_base_is_estimated_recomputed(write_recipe: Any, lora: Any) -> None:
    told = done(lora("train", write_recipe(auto(3, max_steps=1, stream_base=True)))).stderr
    assert "auto -> 3, gradient_accumulation_steps: 1, activations recomputed" in " ".join(told.split())


def test_processes_share_a_processors_memory(write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.training.distributed.sharding.free_bytes", lambda *_: 8_000_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    recipe = write_recipe(auto(3, max_steps=1))
    assert "80% of 8.0 GB free" in " ".join(done(lora("train", recipe)).stderr.split()), "one process, in spite of it"
    monkeypatch.setattr("lora_cli.training.memory.batch_size.local_process_count", lambda: 2)
    assert "80% of 4.0 GB free" in " ".join(done(lora("train", recipe, "--overwrite")).stderr.split())


@pytest.mark.parametrize(
    ("device", "kind", "free"),
    [
        ("cuda", DistributedType.FSDP, 1000 - 4 * 8 * 8 // 2),
        ("cuda", DistributedType.MULTI_GPU, 1000),
        ("cpu", DistributedType.FSDP, 1000),
    ],
)
def test_room_is_left_for_a_gpus_part_of_a_base_in_host_memory(
    device: str, kind: DistributedType, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.training.distributed.sharding.free_bytes", lambda _: 1000)
    accelerator: Any = SimpleNamespace(device=torch.device(device), distributed_type=kind, num_processes=2)
    assert free_for_activations(accelerator, torch.nn.Linear(8, 8, bias=False)) == free


def test_the_fullest_batch() -> None:
    import numpy as np

    assert divisors(12) == [12, 6, 4, 3, 2, 1]
    lengths, supervised = np.array([3, 9, 5, 9, 9, 1]), np.array([3, 2, 5, 8, 4, 1])
    assert longest_batch(lengths, supervised, 4, 9, packing=False).tolist() == [3, 4, 1, 2]
    assert longest_batch(lengths, supervised, 2, 9, packing=True).tolist() == [3, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a trial needs a GPU")
def test_on_a_gpu_the_largest_batch_that_runs_is_found_by_trial(
    write_recipe: Any, tmp_path: Path, tokenizer: Any, lora: Any
) -> None:
    common = {"model.name_or_path": wide_llama(tmp_path / "wide", tokenizer, 24_000, 4), "data": {"train_on": "all"}}
    common["model.dtype"] = "float32"
    run, written = Run(tmp_path / "found"), Run(tmp_path / "written")
    torch.cuda.set_per_process_memory_fraction(0.6e9 / torch.cuda.mem_get_info()[1])
    try:
        result = done(lora("train", write_recipe(auto(12, max_steps=2, output_dir=run.folder) | common)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    size, accumulation = numbers(run.info)
    assert 1 <= size < 12 and size * accumulation == 12
    assert "the largest that ran" in result.stderr
    by_hand = {BATCH[0]: size, BATCH[1]: accumulation, "max_steps": 2, "output_dir": written.folder}
    done(lora("train", write_recipe({"training": by_hand} | common)))
    assert written.losses == pytest.approx(run.losses, rel=1e-5)
