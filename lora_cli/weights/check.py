"""Do these files belong to this model? Answered from safetensors headers and shapes, before any weight is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import Fault, UserError, mend
from lora_cli.model.files import read_config, stored_quantization
from lora_cli.model.targets import Target
from lora_cli.recipe.schema import Adapter
from lora_cli.weights.shards import DEPTHS, is_finite, pickled, read_headers, read_tensor, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
OTHER_TENSORS = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters")
"""Keys of an adapter's configuration that say it holds more than LoRA's own tensors."""
BIASES = ("none", "all", "lora_only")
SOME_LAYERS = ("layers_to_transform", "exclude_modules")
SHOWN = 5
"""How many faults of one adapter are told."""
EMBEDDINGS = ("wte", "wpe", "embed_tokens", "embed_positions", "embed_in", "word_embeddings", "lm_head", "embed_out")
ENDS = {"model.embed_tokens.weight", "model.norm.weight"}
"""What most models store beside their layers, and a head where it is not tied."""
NO_SUM = {
    "alora_invocation_tokens": "is at work behind its invocation tokens alone",
    "layer_replication": "runs its base's layers several times over",
    "arrow_config": "chooses among adapters for each token",
    "use_qalora": "adds up its layers' inputs in groups",
    "use_bdlora": "has factors in blocks",
    "monteclora_config": "draws its factors at random",
}
"""Keys of a LoRA adapter's configuration by which its update is no product of two factors, or none at all."""
KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that begin with the base as it is."""
MADE_AGAIN = ("pissa", "olora")
"""Those that begin with another, which PEFT makes again when it loads such an adapter."""
CONVERT = (
    "save it as plain LoRA where it was trained: PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)"
)
PLAIN_KEYS = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "alpha_pattern", "lora_dropout", "target_modules", "use_rslora", "fan_in_fan_out"),
    *("init_lora_weights", "megatron_core", "qalora_group_size"),
}
"""Keys of an adapter's configuration beside which no other says which tensors it has."""
UNSET: tuple[Any, ...] = (None, False, "none", [], {})


def check_weights(folder: Path, bare: PreTrainedModel) -> None:
    """Raises UserError when the folder's files are damaged, or tensors are not of the shape the configuration says.

    Names that Transformers converts while loading are not judged here; loading reports what is missing.
    """
    tensors = read_headers(weight_files(folder))
    if stored_quantization(folder):
        return
    expected = {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()}
    faults = []
    for name, info in tensors.items():
        wanted = expected.get(name) or expected.get(f"{bare.base_model_prefix}.{name}")
        if wanted is not None and wanted != info.shape:
            what = f"tensor {name} has shape {list(info.shape)}, the configuration says {list(wanted)}"
            faults.append(Fault(what, str(info.file), "config.json and the weights are of different models"))
    if faults:
        raise UserError(faults[:5])


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's ``adapter_config.json``. Raises UserError when the folder holds no readable adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError("no adapter here (no adapter_config.json)", str(folder), "give a run or an adapter folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not readable: {error}", str(path), mend(path)) from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError("not an adapter's configuration (no peft_type)", str(path))
    if not (folder / ADAPTER_WEIGHTS).is_file():
        what = f"the adapter's weights are missing ({ADAPTER_WEIGHTS})"
        raise UserError(what, str(folder), pickled(folder) or "copy or download the folder again")
    if config.get("megatron_config"):
        raise UserError("the adapter asks for code to be imported (megatron_config)", str(path), "lora does not run it")
    return config


def stored_layers(folder: Path) -> dict[str, Target] | None:
    """The linear layers that a checkpoint's tensors speak of, by the names they are stored under.

    None where the tensors' names or shapes are not the model's: quantized weights, and experts that Transformers joins
    while loading. Which of its two widths is which is not known of a layer of GPT-2's kind.
    """
    if stored_quantization(folder) or any("experts" in key for key in read_config(folder)):
        return None
    layers = {}
    for name, info in read_headers(weight_files(folder)).items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and len(info.shape) == 2 and layer.rpartition(".")[2] not in EMBEDDINGS:
            layers[layer] = Target(layer, info.shape[1], info.shape[0])
    return layers


def check_adapter(folder: Path, base: Path | None, other_kinds: bool = False) -> None:
    """Raises UserError, by tensor, when a LoRA adapter's tensors do not fit the base's layers or are missing.

    PEFT loads such an adapter without a word and the result is the bare base. Without a ``base`` what the adapter's own
    files tell is checked alone. Of ``other_kinds``, refused if they are not expected, only the numbers are looked at.
    """
    config = read_adapter_config(folder)
    if config["peft_type"] != "LORA" and other_kinds:
        return _check_finite(folder)
    if config["peft_type"] != "LORA":
        raise UserError(
            f"adapters of kind {config['peft_type']} are not handled",
            str(folder),
            "LoRA adapters are (peft_type: LORA)",
        )
    faults = list(_config_faults(config, str(folder / ADAPTER_CONFIG)))
    if faults:
        raise UserError(faults)
    halves = adapted_layers(folder)
    faults = [
        Fault(f"tensor {name}.lora_{kind}.weight is missing", str(folder))
        for name, found in halves.items()
        for kind in sorted({"A", "B"} - set(found))
    ]
    layers = stored_layers(base) if base is not None else None
    if layers is not None:
        faults += _misfits(folder, halves, layers)
        faults += [
            Fault(f"tensors {name}.lora_A and lora_B are missing", str(folder))
            for name in _named(config, layers)
            if not any(adapted == name or adapted.endswith(f".{name}") for adapted in halves)
        ]
    faults += _unexpected(config, folder, halves)
    if not any(".lora_" in name for name in read_headers([folder / ADAPTER_WEIGHTS])):
        faults.append(Fault("the adapter holds no LoRA tensors", str(folder)))
    if faults:
        raise misfit(faults)
    _check_finite(folder)


def misfit(faults: Sequence[Fault]) -> UserError:
    """What to raise when these are wrong with an adapter's tensors."""
    more = f"{len(faults) - SHOWN} more like these: " if len(faults) > SHOWN else ""
    hint = f"{more}the adapter does not fit its base: it belongs to another, or its file is damaged"
    *first, last = faults[:SHOWN]
    return UserError([*first, replace(last, hint=hint)])


def check_foldable(folder: Path) -> None:
    """Raises UserError when a LoRA adapter's tensors are not what is to be added to its base's weights, or are for
    another base than the one it names."""
    config, where = read_adapter_config(folder), str(folder / ADAPTER_CONFIG)
    if config["peft_type"] != "LORA":
        return
    for key, told in NO_SUM.items():
        if config.get(key):
            what = f"the adapter {told} ({key}), which is not folded into weights here"
            raise UserError(what, where, "load it beside its base with PEFT")
    start = _start(config)
    if start not in (*KEPT_BASE, *MADE_AGAIN):
        what = f"the adapter is to be added to another base than the one it names (init_lora_weights: {start})"
        raise UserError(what, where, CONVERT)


def is_relative(config: Mapping[str, Any]) -> bool:
    """Whether a LoRA adapter is to be added to a base that PEFT first takes the adapter's first values out of."""
    return _start(config) in MADE_AGAIN


def _start(config: Mapping[str, Any]) -> Any:
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else start


def _config_faults(config: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """Values in an adapter's configuration that PEFT would fail of, or compute no numbers with."""
    for key, pattern, is_right, expected in (
        ("r", "rank_pattern", _is_rank, "a whole number from 1"),
        ("lora_alpha", "alpha_pattern", _is_number, "a number"),
    ):
        if not is_right(config.get(key)):
            yield Fault(f"{key} is {config.get(key)!r}, expected {expected}", where)
        own = config.get(pattern) or {}
        if not isinstance(own, dict):
            yield Fault(f"{pattern} is {own!r}, expected names with {expected} each", where)
            continue
        for name, value in own.items():
            if not is_right(value):
                yield Fault(f"{pattern}: {name} is {value!r}, expected {expected}", where)
            yield from _expression_faults(pattern, name, where)
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


def _expression_faults(key: str, expression: str, where: str) -> Iterator[Fault]:
    try:
        re.compile(expression)
    except re.error as error:
        yield Fault(f"{key} is no regular expression: {error}: {expression}", where)


def _unexpected(
    config: Mapping[str, Any], folder: Path, halves: dict[str, dict[str, tuple[int, ...]]]
) -> Iterator[Fault]:
    """Tensors that are not what the adapter's configuration says, which PEFT passes over or makes up in silence."""
    place = str(folder)
    if not config.get("target_parameters"):  # experts have r each
        for name, shapes in halves.items():
            rank = own_value(config.get("rank_pattern"), name, config["r"])
            if "A" in shapes and shapes["A"][0] != rank:
                yield Fault(f"tensor {name}.lora_A has rank {shapes['A'][0]}, {ADAPTER_CONFIG} says r: {rank}", place)
    for name, shapes in halves.items():
        if shapes.keys() == {"A", "B"} and shapes["A"][0] != shapes["B"][-1]:
            what = f"tensors {name}.lora_A and lora_B have ranks {shapes['A'][0]} and {shapes['B'][-1]}"
            yield Fault(what, place)
    targets = config.get("target_modules")
    if targets and targets != "all-linear" and not config.get("target_parameters"):
        for name in halves:
            is_end = name.rpartition(".")[2] in EMBEDDINGS  # which may be there for being tied to one that is named
            if not is_end and not is_named(name, targets):
                yield Fault(f"tensors {name}.lora_A and lora_B are for no layer that {ADAPTER_CONFIG} names", place)
    stored = read_headers([folder / ADAPTER_WEIGHTS])
    if config.get("use_dora"):
        kept = {name.removeprefix(PEFT_PREFIX).partition(".lora_magnitude_vector")[0] for name in stored}
        plain = {name.removeprefix(PEFT_PREFIX) for name in stored}
        for name in sorted(set(halves) - (kept - plain)):
            yield Fault(f"tensor {name}.lora_magnitude_vector is missing (use_dora)", place)
    if not any(config.get(key) not in (None, [], "none") for key in OTHER_TENSORS):
        for name in stored:
            layer = name.replace(".base_layer.", ".").split(".")[-2]
            if ".lora_" not in name and layer not in EMBEDDINGS:  # kept by PEFT when words were added
                yield Fault(f"tensor {name} is none of a LoRA adapter's", place)


def _check_finite(folder: Path) -> None:
    """Raises UserError when the adapter's weights are no numbers: all that the model says would be none."""
    from lora_cli.weights.pieces import workers

    stored = read_headers([folder / ADAPTER_WEIGHTS])
    found = workers().map(lambda name: is_finite(read_tensor(stored[name], name)), stored)
    where = str(folder / ADAPTER_WEIGHTS)
    faults = [
        Fault(f"tensor {name} holds NaN or infinity", where)
        for name, fine in zip(stored, found, strict=True)
        if not fine
    ]
    if faults:
        hint = "the training that made it diverged, or the file is damaged: take an earlier checkpoint, or train again"
        raise UserError([*faults[: SHOWN - 1], replace(faults[-1], hint=hint)])


def check_mergeable(base: Path) -> None:
    """Raises UserError when the base is stored quantized: a sum with its codes is no weight."""
    stored = stored_quantization(base)
    if stored is not None:
        hint = (
            "use this adapter unmerged, or train on the unquantized model with quantization.method set: that one is "
            "merged into the weights it saw"
        )
        raise UserError(f"the base is stored quantized ({stored}), and nothing can be merged into it", str(base), hint)


def adapted_layers(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The layers a LoRA adapter's tensors are for, each with the shapes of its A (r, in) and B (out, r)."""
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in read_headers([folder / ADAPTER_WEIGHTS]).items():
        layer, _, part = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if part in ("A.weight", "B.weight"):
            halves.setdefault(layer, {})[part[0]] = info.shape
    return halves


def _misfits(folder: Path, halves: dict[str, dict[str, tuple[int, ...]]], layers: dict[str, Target]) -> Iterator[Fault]:
    for name, shapes in halves.items():
        # Checkpoints may leave out the name of the model's body: h.0.attn for transformer.h.0.attn.
        layer = layers.get(name) or layers.get(name.partition(".")[2])
        if layer is None:
            if name.rpartition(".")[2] not in EMBEDDINGS:
                yield Fault(
                    f"tensors {name}.lora_A and lora_B are for a layer that the base does not have", str(folder)
                )
            continue
        if len(shapes) < 2:
            continue
        found = (shapes["A"][-1], shapes["B"][0])
        wide = (layer.in_features, layer.out_features)
        if found not in (wide, wide[::-1]):
            if wide[1] == found[0] or wide[0] == found[1]:  # a layer of GPT-2's kind, stored the other way round
                wide = wide[::-1]
            what = f"tensors {name}.lora_A and lora_B are for a layer of {found[0]} -> {found[1]}, the base's is "
            yield Fault(f"{what}{wide[0]} -> {wide[1]}", str(folder))


def _named(config: dict[str, Any], layers: Iterable[str]) -> list[str]:
    """The layers that an adapter's configuration names by a list, as PEFT reads it."""
    names = config.get("target_modules")
    if not isinstance(names, list) or any(config.get(key) not in (None, []) for key in SOME_LAYERS):
        return []
    return [layer for layer in layers if is_named(layer, names)]


def is_named(layer: str, names: str | list[str]) -> bool:
    """Whether a layer is one of those named by a list or a regular expression, as PEFT reads it."""
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def own_value(pattern: Mapping[str, Any] | None, layer: str, common: Any) -> Any:
    """A layer's own rank or alpha by a pattern, whose keys are the ends of names, or regular expressions for them; else
    the one they have in common."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), common)


def is_plainly_whole(folder: Path, base: Path) -> bool:
    """Whether it is plain, without a look at the base's modules, that the base's and a LoRA adapter's tensors are all
    that their configurations speak of; others need not be wrong.

    The adapter is one with a list of layers alone, the base one whose layers are all alike.
    """
    config, layers = read_adapter_config(folder), stored_layers(base)
    names = config.get("target_modules")
    others = {key for key, value in config.items() if key not in PLAIN_KEYS and value not in UNSET}
    if layers is None or others or not isinstance(names, list) or not _is_uniform(base):
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


def _is_uniform(base: Path) -> bool:
    """Whether each of a model's layers has every tensor that another has, and what most models store beside them is
    all there is."""
    config = read_config(base)
    depth = next((config[key] for key in DEPTHS if isinstance(config.get(key), int)), 0)
    layers: dict[tuple[str, str], set[int]] = {}
    outside = set()
    for name in read_headers(weight_files(base)):
        found = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
        if found:
            layers.setdefault((found[1], found[3]), set()).add(int(found[2]))
        else:
            outside.add(name)
    is_tied = config.get("tie_word_embeddings") is True
    has_ends = outside == {*ENDS, "lm_head.weight"} or (is_tied and outside == ENDS)
    return has_ends and all(found == set(range(depth)) for found in layers.values())


def check_start(folder: Path, adapter: Adapter, targets: Iterable[str]) -> None:
    """Raises UserError where the adapter that training is to start from is of another shape than the recipe says."""
    config = read_adapter_config(folder)
    hint = "give the recipe the adapter's own value"
    faults = []
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        stored, asked = config.get(key), getattr(adapter, key)
        if stored is not None and stored != asked:
            what = f"adapter.{key}: {asked} in the recipe, but {stored} in the adapter of init_from"
            faults.append(Fault(what, str(folder), hint))
    stored_names, asked_names = set(adapted_layers(folder)), set(targets)
    if stored_names != asked_names:
        what = (
            f"adapter.target_modules: the recipe adapts {len(asked_names)} layers, "
            f"the adapter of init_from {len(stored_names)} (named {config.get('target_modules')})"
        )
        faults.append(Fault(what, str(folder), hint))
    if faults:
        raise UserError(faults)
