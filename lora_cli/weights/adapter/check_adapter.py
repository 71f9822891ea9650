"""Check from safetensors headers and shapes that an adapter fits its base, before the base's weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_cli.errors import Fault, UserError, grouped_error
from lora_cli.model.targets import EMBEDDINGS, Target, module_leaf
from lora_cli.weights.adapter.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    config_faults,
    is_named,
    layer_and_part,
    named_layers,
    pattern_value,
    read_adapter_config,
    unsupported_variant,
)
from lora_cli.weights.files.check_model import has_identical_layers, stored_layers
from lora_cli.weights.files.shards import is_finite, read_headers, read_tensor, stored_name

OTHER_TENSORS = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters")
"""Configuration keys of adapters that hold more than LoRA's own tensors."""
MISFIT = "the adapter does not fit its base: it belongs to another base, or one of its files is damaged"
BASIC_KEYS = {
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "alpha_pattern", "lora_dropout", "target_modules", "use_rslora", "fan_in_fan_out"),
    *("init_lora_weights", "megatron_core", "qalora_group_size"),
}
"""An adapter that sets only these keys holds just the A and B matrices that ``target_modules`` and ``r`` imply."""
BASIC_VALUES = {"task_type": "CAUSAL_LM", "rank_pattern": {}, "loftq_config": {}}
"""Values of further keys that mean as little, as PEFT writes them; other empty ones, PEFT may refuse."""
UNSET: tuple[Any, ...] = (None, False, "none", [], {})
Halves = dict[str, dict[str, tuple[int, ...]]]
"""The shapes of A (r, in) and B (out, r) by layer."""


def check_adapter(folder: Path, base: Path | None, other_kinds: bool = False) -> bool:
    """Raises UserError, naming each tensor, when a LoRA adapter's tensors are missing or do not fit the base's layers.
    Returns True when the check had to build the base's model, which is slow, and all tensors fit that model.

    PEFT silently loads an adapter that does not fit, and the result is the plain base. Without ``base``, only the
    adapter's own files are checked. Adapters of other kinds than LoRA are refused unless ``other_kinds`` is set, and
    then checked only for NaN and infinity.
    """
    config = read_adapter_config(folder)
    if config["peft_type"] != "LORA":
        if not other_kinds:
            what = f"adapters of kind {config['peft_type']} are not supported here"
            raise UserError(what, str(folder), "only LoRA adapters are (peft_type: LORA)")
        _check_finite(folder)
        return False
    faults = list(config_faults(config, str(folder / ADAPTER_CONFIG)))
    if faults:
        raise UserError(faults)
    halves, names = adapted_layers(folder), read_headers([folder / ADAPTER_WEIGHTS])
    if strange := [name for name in names if ".lora_" in name and not name.startswith(PEFT_PREFIX)]:
        what = f"tensor {strange[0]} does not have PEFT's name for it, so PEFT would silently ignore it"
        raise UserError(what, str(folder), f"save it with PEFT's save_pretrained: its names begin with {PEFT_PREFIX}")
    faults = [
        Fault(f"tensor {name}.lora_{kind}.weight is missing", str(folder))
        for name, found in halves.items()
        for kind in sorted({"A", "B"} - set(found))
    ]
    model_takes_them = False
    if base is not None and not faults:  # each layer has both A and B
        faults, model_takes_them = _misfits_of_base(folder, base, config, halves)
    faults += _unexpected(config, folder, halves)
    if not any(".lora_" in name for name in names):
        faults.append(Fault("the adapter holds no LoRA tensors", str(folder)))
    if faults:
        raise grouped_error(faults, _misfit_hint(config))
    _check_finite(folder)
    return model_takes_them


def check_in_model(folder: Path, base: Path, other_kinds: bool) -> None:
    """Run ``check_adapter``, and check in the base's model itself unless headers prove that nothing is missing."""
    if check_adapter(folder, base, other_kinds):
        return
    config = read_adapter_config(folder)
    is_plain = config["peft_type"] == "LORA" and _is_provably_complete(folder, base)
    if not is_plain and (faults := _faults_in_model(folder, base)):
        raise grouped_error(faults, _misfit_hint(config))


def _misfit_hint(config: Mapping[str, Any]) -> str:
    """Return why the adapter probably does not fit: it was trained for another task or is of an unsupported kind; else
    MISFIT."""
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        return f"the adapter was trained for another task than generating text (task_type: {config['task_type']})"
    return unsupported_variant(config, ("use_bdlora", "monteclora_config")) or MISFIT


def _faults_in_model(folder: Path, base: Path) -> list[Fault]:
    """Run ``adapter_faults``, which is slow because it builds the base's model. Raises the same errors."""
    from lora_cli.weights.adapter.expected_tensors import adapter_faults  # imports torch and PEFT

    return adapter_faults(folder, base)


def _unexpected(config: Mapping[str, Any], folder: Path, halves: Halves) -> Iterator[Fault]:
    """Yield tensors that contradict the adapter's configuration. PEFT silently ignores or fills in such tensors."""
    place = str(folder)
    if not config.get("target_parameters"):  # one tensor holds r for each expert
        for name, shapes in halves.items():
            rank = pattern_value(config.get("rank_pattern"), name, config["r"])
            if "A" in shapes and shapes["A"][0] != rank:
                yield Fault(f"tensor {name}.lora_A has rank {shapes['A'][0]}, {ADAPTER_CONFIG} says r: {rank}", place)
    for name, shapes in halves.items():
        if shapes.keys() == {"A", "B"} and shapes["A"][0] != shapes["B"][-1]:
            what = f"tensors {name}.lora_A and lora_B have ranks {shapes['A'][0]} and {shapes['B'][-1]}"
            yield Fault(what, place)
    targets = config.get("target_modules")
    if targets and targets != "all-linear" and not config.get("target_parameters"):
        for name in halves:
            is_end = name.rpartition(".")[2] in EMBEDDINGS  # may be tied to a layer in targets
            if not is_end and not is_named(name, targets):
                yield Fault(f"tensors {name}.lora_A and lora_B are for a layer not in {ADAPTER_CONFIG}", place)
    stored = read_headers([folder / ADAPTER_WEIGHTS])
    if config.get("use_dora"):
        kept = {layer for layer, part in map(layer_and_part, stored) if part.startswith("magnitude_vector")}
        for name in sorted(set(halves) - kept):
            yield Fault(f"tensor {name}.lora_magnitude_vector is missing (use_dora)", place)
    if not any(config.get(key) not in (None, [], "none") for key in OTHER_TENSORS):
        for name in stored:  # PEFT saves the embedding and the head when tokens were added
            if ".lora_" not in name and module_leaf(name.replace(".base_layer.", ".")) not in EMBEDDINGS:
                yield Fault(f"tensor {name} does not belong in a LoRA adapter", place)


def _check_finite(folder: Path) -> None:
    """Raises UserError when the adapter's weights hold NaN or infinity, which the model's outputs would hold too."""
    from lora_cli.system.thread_pool import workers

    stored = read_headers([folder / ADAPTER_WEIGHTS])
    found = workers().map(lambda info: is_finite(read_tensor(info)), stored.values())
    where = str(folder / ADAPTER_WEIGHTS)
    faults = [
        Fault(f"tensor {name} holds NaN or infinity", where)
        for name, fine in zip(stored, found, strict=True)
        if not fine
    ]
    if faults:
        hint = "its training diverged, or the file is damaged: use an earlier checkpoint, or train again"
        raise grouped_error(faults, hint)


def adapted_layers(folder: Path) -> Halves:
    """Return the shapes of a LoRA adapter's A and B by layer, without embeddings."""
    halves: Halves = {}
    for name, info in read_headers([folder / ADAPTER_WEIGHTS]).items():
        layer, part = layer_and_part(name)
        if part in ("A.weight", "B.weight"):
            halves.setdefault(layer, {})[part[0]] = info.shape
    return halves


def check_given_once(adapters: Iterable[Path]) -> None:
    """Raises UserError when two of these paths lead to the same folder."""
    seen: set[Path] = set()
    for folder in adapters:
        if folder.resolve() in seen:
            raise UserError("this adapter is given twice", str(folder))
        seen.add(folder.resolve())


def _misfits_of_base(folder: Path, base: Path, config: dict[str, Any], halves: Halves) -> tuple[list[Fault], bool]:
    """Return what does not fit the layers that the base stores, and whether the built model accepted all of it.

    A checkpoint may store layers under other names than the model's, or more layers than the model uses. Only the model
    itself shows that. Since building it is slow, this is done only where such a difference may explain the faults.
    """
    layers = stored_layers(base)
    if layers is None:
        return [], False
    misfits = list(_misfits(folder, halves, layers))
    missing = [
        Fault(f"tensors {name}.lora_A and lora_B are missing", str(folder))
        for name in named_layers(config, layers)
        if not any(adapted == name or adapted.endswith(f".{name}") for adapted in halves)
    ]
    faults = misfits + missing
    may_fit = not misfits or {_in_a_layer(name) for name in halves} & {_in_a_layer(name) for name in layers}
    if faults and may_fit and not _faults_in_model(folder, base):
        return [], True
    return faults, False


def _in_a_layer(name: str) -> str:
    """Return a module's name from its layer's number on, which does not depend on the names of its parents."""
    return re.sub(r"^.*?\.(?=\d+\.)", "", name)


def _misfits(folder: Path, halves: Halves, layers: dict[str, Target]) -> Iterator[Fault]:
    for name, shapes in halves.items():
        stored = stored_name(name, layers)
        if stored is None:
            if name.rpartition(".")[2] not in EMBEDDINGS:
                what = f"tensors {name}.lora_A and lora_B are for a layer that the base does not have"
                yield Fault(what, str(folder))
            continue
        found = (shapes["A"][-1], shapes["B"][0])
        wide = (layers[stored].in_features, layers[stored].out_features)
        if found not in (wide, wide[::-1]):
            if wide[1] == found[0] or wide[0] == found[1]:  # a Conv1D (GPT-2), stored as (in, out)
                wide = wide[::-1]
            what = f"tensors {name}.lora_A and lora_B are for a layer of {found[0]} -> {found[1]}, the base's is "
            yield Fault(f"{what}{wide[0]} -> {wide[1]}", str(folder))


def _is_provably_complete(folder: Path, base: Path) -> bool:
    """Whether headers alone prove that a base and a LoRA adapter hold all tensors that their configurations imply.

    This needs an adapter with only ``BASIC_KEYS`` and a list of layers, and a base whose layers are all alike. Where it
    is False, the tensors may still be complete.
    """
    config, layers = read_adapter_config(folder), stored_layers(base)
    names = config.get("target_modules")
    others = {
        key
        for key, value in config.items()
        if key not in BASIC_KEYS and value not in (None, False, "none", BASIC_VALUES.get(key))
    }
    if layers is None or others or not isinstance(names, list) or not has_identical_layers(base):
        return False
    rank = config["r"]
    wanted = {
        name: {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
        for name, layer in layers.items()
        if is_named(name, names)
    }
    halves, stored = adapted_layers(folder), read_headers([folder / ADAPTER_WEIGHTS])
    are_met = all(any(is_named(layer, [name]) for layer in wanted) for name in names)
    return are_met and halves == wanted and len(stored) == 2 * len(halves)
