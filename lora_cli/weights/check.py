"""Do these files belong to this model? Answered from safetensors headers and shapes, before any weight is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import Fault, UserError
from lora_cli.model.files import stored_quantization
from lora_cli.model.targets import linear_layers, widths
from lora_cli.recipe.schema import Adapter
from lora_cli.weights.shards import read_headers, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


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
        raise UserError(f"not readable: {error}", str(path)) from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError("not an adapter's configuration (no peft_type)", str(path))
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"the adapter's weights are missing ({ADAPTER_WEIGHTS})", str(folder))
    return config


def check_adapter(folder: Path, bare: PreTrainedModel) -> None:
    """Raises UserError, by tensor, when a LoRA adapter's tensors do not fit the base's layers or are missing.

    PEFT loads such an adapter without a word and the result is the bare base.
    """
    config = read_adapter_config(folder)
    tensors = read_headers([folder / ADAPTER_WEIGHTS])
    if config["peft_type"] != "LORA":
        raise UserError(f"adapters of kind {config['peft_type']} are not handled", str(folder), "LORA is")
    modules = dict(bare.named_modules())
    faults = []
    halves: dict[str, set[str]] = {}
    for name, info in tensors.items():
        module_name, _, part = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if not part:
            continue
        kind = part.split(".")[0]
        halves.setdefault(module_name, set()).add(kind)
        module = modules.get(module_name)
        wide = None if module is None else widths(module)
        if module is None:
            faults.append(Fault(f"tensor {name} is for a layer that the base does not have", str(info.file)))
        elif wide is not None and kind in ("A", "B"):
            found, wanted = (info.shape[-1], wide[0]) if kind == "A" else (info.shape[0], wide[1])
            if found != wanted:
                what = f"tensor {name} has shape {list(info.shape)}, the base's layer is {wanted} wide there"
                faults.append(Fault(what, str(info.file)))
    for module_name in _targeted(config, bare) - set(halves):
        faults.append(Fault(f"tensors {module_name}.lora_A and lora_B are missing", str(folder)))
    for module_name, kinds in halves.items():
        faults += [
            Fault(f"tensor {module_name}.lora_{kind}.weight is missing", str(folder)) for kind in {"A", "B"} - kinds
        ]
    if not halves:
        faults.append(Fault("the adapter holds no LoRA tensors", str(folder)))
    if faults:
        hint = "the adapter belongs to another base"
        raise UserError([*faults[:5], Fault(f"{len(faults)} tensors do not fit", str(folder), hint)])


def _targeted(config: dict[str, Any], bare: PreTrainedModel) -> set[str]:
    """The linear layers that an adapter's configuration names; none when it names them in a way not followed here."""
    wanted = config.get("target_modules")
    if any(config.get(key) for key in ("layers_to_transform", "exclude_modules", "target_parameters")):
        return set()
    layers = linear_layers(bare)
    if isinstance(wanted, str):
        return {name for name in layers if re.fullmatch(wanted, name)}
    names = wanted if isinstance(wanted, list) else []
    return {name for name in layers if any(name == item or name.endswith(f".{item}") for item in names)}


def check_start(folder: Path, adapter: Adapter, targets: Iterable[str], bare: PreTrainedModel) -> None:
    """Raises UserError where the adapter that training is to start from is of another shape than the recipe says."""
    config = read_adapter_config(folder)
    hint = "give the recipe the adapter's own value"
    faults = []
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        stored, asked = config.get(key), getattr(adapter, key)
        if stored is not None and stored != asked:
            what = f"adapter.{key}: {asked} in the recipe, but {stored} in the adapter of init_from"
            faults.append(Fault(what, str(folder), hint))
    stored_layers, asked_layers = _targeted(config, bare), set(targets)
    if stored_layers and stored_layers != asked_layers:
        what = (
            f"adapter.target_modules: the recipe adapts {len(asked_layers)} layers, "
            f"the adapter of init_from {len(stored_layers)} (named {config['target_modules']})"
        )
        faults.append(Fault(what, str(folder), hint))
    if faults:
        raise UserError(faults)
