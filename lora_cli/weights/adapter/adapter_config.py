"""Read and check ``adapter_config.json``, the configuration of a PEFT adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import Fault, UserError
from lora_cli.model.files import adapter_elsewhere, nearest_folder, read_json
from lora_cli.weights.files.shards import pickled

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
BIASES = ("none", "all", "lora_only")
SOME_LAYERS = ("layers_to_transform", "exclude_modules")
UNMERGEABLE = {
    "alora_invocation_tokens": "is active only after its invocation tokens",
    "layer_replication": "repeats layers of its base",
    "arrow_config": "chooses among adapters for each token",
    "use_qalora": "pools its layers' inputs in groups",
    "use_bdlora": "has block-diagonal factors",
    "monteclora_config": "samples its factors at random",
}
"""Configuration keys of LoRA variants whose update is not a fixed product of two factors, and what each does."""
SETTINGS = tuple(
    f"{name}_config"
    for name in ("arrow", "corda", "eva", "kasa", "loftq", "lora_ga", "megatron", "monteclora", "velora")
)
"""Keys of further settings of LoRA variants, which are objects or null."""
KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base's weights unchanged."""
REPEATABLE_INITS = ("pissa", "olora")
"""Values that change the base's weights; PEFT repeats the change when it loads such an adapter."""
REPEATABLE_ON_CODES = ("olora",)
"""Those of them whose change PEFT also repeats on a quantized base."""
CONVERT = (
    "save it as plain LoRA where it was trained: PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)"
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the adapter's ``adapter_config.json``. Raises UserError when the folder holds no valid adapter or the
    configuration imports code (``megatron_config``), RunError when reading fails, which may be temporary."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        hint = adapter_elsewhere(folder) or "give a run or an adapter folder"
        hint = hint if folder.exists() else nearest_folder(folder)
        raise UserError("no adapter here (no adapter_config.json)", str(folder), hint)
    config = read_json(path)
    if not isinstance(config, dict) or "peft_type" not in config:
        hint = "lora reads adapters in PEFT's layout; convert those of MLX and others first"
        raise UserError("not an adapter's configuration (no peft_type)", str(path), hint)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        what = f"the adapter's weights are missing ({ADAPTER_WEIGHTS})"
        raise UserError(what, str(folder), pickled(folder) or "copy or download the folder again")
    if config.get("megatron_config"):
        raise UserError("the adapter asks for code to be imported (megatron_config)", str(path), "lora does not run it")
    return config


def layer_and_part(tensor: str) -> tuple[str, str]:
    """Split a tensor's name in an adapter into its layer's name in the base and LoRA's part of that layer, such as
    ``A.weight`` or ``magnitude_vector``; empty for a tensor that is not LoRA's."""
    layer, _, part = tensor.removeprefix(PEFT_PREFIX).partition(".lora_")
    return layer, part


def check_mergeable_lora(folder: Path, repeatable: Collection[str] = REPEATABLE_INITS) -> None:
    """Raises UserError when a LoRA adapter's update is not a product that can be added to its base's weights, or when
    ``check_init`` does."""
    config, where = read_adapter_config(folder), str(folder / ADAPTER_CONFIG)
    if config["peft_type"] != "LORA":
        return
    if what := unsupported_variant(config):
        raise UserError(what, where, "use it unmerged, with PEFT")
    check_init(folder, repeatable)


def unsupported_variant(config: Mapping[str, Any], keys: Iterable[str] = UNMERGEABLE) -> str | None:
    """Describe the first of these variants that a LoRA adapter has; None for an adapter without them."""
    key = next((key for key in keys if config.get(key)), None)
    return None if key is None else f"the adapter {UNMERGEABLE[key]} ({key}), which is not supported here"


def check_init(folder: Path, repeatable: Collection[str] = REPEATABLE_INITS) -> None:
    """Raises UserError when a LoRA adapter's initialization changed its base, unless it is one of ``repeatable``."""
    config = read_adapter_config(folder)
    if config["peft_type"] == "LORA" and not keeps_base(config) and _start(config) not in repeatable:
        what = "the adapter belongs to a changed copy of the base it names"
        where, start = str(folder / ADAPTER_CONFIG), config["init_lora_weights"]
        raise UserError(f"{what} (init_lora_weights: {start})", where, CONVERT)


def keeps_base(config: Mapping[str, Any]) -> bool:
    """Whether a LoRA adapter's initialization left its base unchanged."""
    return _start(config) in KEPT_BASE


def _start(config: Mapping[str, Any]) -> Any:
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else start


def config_faults(config: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """Yield a fault for each configuration value that would make PEFT fail or compute NaN or infinity."""
    for key, pattern, is_right, expected in (
        ("r", "rank_pattern", _is_rank, "a whole number of at least 1"),
        ("lora_alpha", "alpha_pattern", _is_number, "a number"),
    ):
        if not is_right(config.get(key)):
            yield Fault(f"{key} is {config.get(key)!r}, expected {expected}", where)
        own = config.get(pattern, {})
        if not isinstance(own, dict):
            yield Fault(f"{pattern} is {own!r}, expected names with {expected} each", where)
            continue
        for name, value in own.items():
            if not is_right(value):
                yield Fault(f"{pattern}: {name} is {value!r}, expected {expected}", where)
            yield from _expression_faults(pattern, name, where)
    for key, value in config.items():
        if key == "lora_dropout" and not (_is_number(value) and 0 <= value <= 1):
            yield Fault(f"{key} is {value!r}, expected a number from 0 to 1", where)
        elif key == "alora_invocation_tokens" and not (value is None or _is_ids(value)):
            yield Fault(f"{key} is {value!r}, expected ids of tokens, or null", where)
        elif key in SETTINGS and not (value is None or isinstance(value, dict)):
            yield Fault(f"{key} is {value!r}, expected settings by name, or null", where)
    if config.get("bias", "none") not in BIASES:
        yield Fault(f"bias is {config['bias']!r}, expected one of {', '.join(BIASES)}", where)
    targets = config.get("target_modules")
    if isinstance(targets, str):
        yield from _expression_faults("target_modules", targets, where)
    elif targets is not None and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        yield Fault(f"target_modules is {targets!r}, expected names or a regular expression", where)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) for each in value)


def _expression_faults(key: str, expression: str, where: str) -> Iterator[Fault]:
    try:
        re.compile(expression)
    except re.error as error:
        yield Fault(f"{key} is not a regular expression: {error}: {expression}", where)


def named_layers(config: dict[str, Any], layers: Iterable[str]) -> list[str]:
    """Return the layers that a ``target_modules`` list selects in PEFT; none where other keys restrict the list."""
    names = config.get("target_modules")
    if not isinstance(names, list) or any(config.get(key) not in (None, []) for key in SOME_LAYERS):
        return []
    return [layer for layer in layers if is_named(layer, names)]


def is_named(layer: str, names: str | list[str]) -> bool:
    """Whether PEFT matches a layer to ``names``, a list of names or a regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def pattern_value(pattern: Mapping[str, Any] | None, layer: str, common: Any) -> Any:
    """Return a layer's own rank or alpha from ``pattern``, or else ``common``. The keys of ``pattern`` are names or
    regular expressions, and match a layer's whole name or its last components."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), common)


def sort_targets(config: LoraConfig) -> None:
    """Name the adapted layers in one order: PEFT keeps them in a set, whose order differs from process to process."""
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules or ())
