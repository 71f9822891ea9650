"""Check a DeepSpeed configuration, which may only set sharding and communication. DeepSpeed's monitors, profilers,
checkpoints and caches would write to any path in the file, and its numerics would differ from the recipe's."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_cli.errors import Fault, nearest_hint
from lora_cli.recipe.schema import Recipe

IGNORED_KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16", "optimizer", "scheduler", "zero_allow_untested_optimizer"),
}
"""Keys that are accepted, as in configurations made for other programs, but ignored: the recipe decides."""
SHARDING_KEYS = {
    *("zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown"),
}
OFFLOADS = {"offload_param", "offload_optimizer"}
ZERO = OFFLOADS | {
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "sub_group_size", "round_robin_gradients"),
    *("ignore_unused_parameters", "memory_efficient_linear", "zero_hpz_partition_size", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters"),
    *("stage3_max_reuse_distance", "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params"),
    *("stage3_gather_16bit_weights_on_model_save",),
}
OFFLOAD = {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "ratio"}
DEVICES = ("none", "cpu")


def deepspeed_faults(recipe: Recipe) -> list[Fault]:
    """Return what is wrong with the configuration that ``training.deepspeed`` names, or why it cannot be used."""
    path = recipe.training.deepspeed
    if path is None:
        return []
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except OSError as error:
        return [Fault(f"training.deepspeed: cannot be read: {error.strerror}", path, "name DeepSpeed's JSON file")]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        hint = 'give a JSON file such as {"zero_optimization": {"stage": 2}}'
        return [Fault(f"training.deepspeed: has no zero_optimization.stage: {error!r}", path, hint)]
    if stage not in (0, 1, 2, 3):
        what = f"training.deepspeed: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3"
        return [Fault(what, path)]
    if faults := config_faults(config, path):
        return faults
    if stage == 3 and recipe.quantization is not None:
        return [Fault("training.deepspeed: stage 3 does not shard a quantized base", path, "use training.fsdp: true")]
    if find_spec("deepspeed") is None:
        hint = "pip install --no-build-isolation deepspeed"
        return [Fault("training.deepspeed: deepspeed is not installed", hint=hint)]
    return []


def config_faults(config: Mapping[str, Any], where: str) -> list[Fault]:
    """Return the faults of a configuration read from ``where``: keys beyond sharding, and unsupported values."""
    zero = config["zero_optimization"]
    faults = [
        *_key_faults("", config, IGNORED_KEYS | SHARDING_KEYS, IGNORED_KEYS | {"zero_optimization"}, where),
        *_key_faults("zero_optimization.", zero, ZERO, OFFLOADS, where),
    ]
    for name in sorted(OFFLOADS & zero.keys()):
        offload, key = zero[name], f"zero_optimization.{name}"
        if not isinstance(offload, dict):
            faults.append(Fault(f"training.deepspeed: {key} is {offload!r}, expected an object", where))
            continue
        faults.extend(_key_faults(f"{key}.", offload, OFFLOAD, ("device",), where))
        if (device := offload.get("device", "none")) not in DEVICES:
            what = f"training.deepspeed: {key}.device is {device!r}, expected {' or '.join(DEVICES)}"
            faults.append(Fault(what, where, "a run writes only to its own folder"))
    return faults


def _key_faults(
    prefix: str, section: Mapping[str, Any], known: Collection[str], objects: Collection[str], where: str
) -> Iterator[Fault]:
    """Yield the faults of a section's keys: those that are not ``known``, and lists and objects but for ``objects``."""
    for key, value in sorted(section.items()):
        if key not in known:
            hint = nearest_hint(key, known) or "remove it: only keys of sharding and communication are supported"
            yield Fault(f"training.deepspeed: {prefix}{key} is not supported", where, hint)
        elif isinstance(value, dict | list) and key not in objects:
            yield Fault(f"training.deepspeed: {prefix}{key} is not a number or a text", where)
