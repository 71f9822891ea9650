"""Locate, check and read a model's files, in a folder or a hub snapshot, without importing torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_cli.errors import UserError, first_line, is_lfs_pointer, nearest_hint, reading, repair_hint

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
TOKENIZER_FILES = ["tokenizer.json", "*.model", "vocab.*", "tekken.json"]
TOKENIZER_EXTRAS = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "*.tiktoken"]
MODEL_FOLDER = "a model folder holds config.json, a tokenizer and weights in safetensors"


def locate(name_or_path: str, weights: bool = False, revision: str | None = None) -> Path:
    """The folder of a model: the path itself, or a hub id's snapshot at ``revision``, by default the newest. With
    ``weights``, the snapshot includes the safetensors files.

    Raises UserError when neither disk nor hub has the folder, or when it holds no model, or an adapter beside it.
    """
    folder = Path(name_or_path)
    if folder.is_file():
        raise UserError("a file, not a model folder", name_or_path, MODEL_FOLDER)
    if not folder.is_dir():
        folder = _snapshot(name_or_path, weights, revision)
    if not (folder / "config.json").is_file():
        raise UserError("holds no model (no config.json)", name_or_path, _no_model_hint(folder))
    if (folder / "adapter_config.json").is_file():  # which Transformers would load along with the model
        hint = "move the adapter's files to their own folder"
        raise UserError("the folder holds an adapter beside the model (adapter_config.json)", str(folder), hint)
    return folder


def _no_model_hint(folder: Path) -> str:
    """A hint for a folder that holds no model."""
    if (folder / "adapter_config.json").is_file():
        return "this is an adapter: give its base, or merge the two first (lora merge)"
    return adapter_elsewhere(folder) or MODEL_FOLDER


def _snapshot(hub_id: str, weights: bool, revision: str | None) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError("no such model folder, and not a hub id", hub_id, nearest_folder(Path(hub_id))) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set and it is not in the local cache"
        why = offline if is_offline_mode() else first_line(error)
        what = f"no such model folder, and not available from the hub: {why}"
        raise UserError(what, hub_id, nearest_folder(Path(hub_id))) from error


def nearest_folder(folder: Path) -> str:
    """A hint for a folder that does not exist."""
    siblings = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
    return nearest_hint(folder.name, siblings) or f"paths are relative to {Path.cwd()}"


def adapter_elsewhere(folder: Path) -> str | None:
    """A hint for a run's checkpoint, or for a folder that contains adapters, such as a Trainer's; None for another."""
    if folder.parent.name == "checkpoints":
        return f"a checkpoint is for --resume only; give the run ({folder.parent.parent}) or its adapter"
    found = [*folder.glob("*/adapter_config.json")]
    if not found:
        return None
    newest = max(found, key=lambda file: file.stat().st_mtime)
    return f"give the adapter in it: {newest.parent}"


def check_tokenizer(folder: Path, chat: bool = False) -> None:
    """Raises UserError when a model folder has no tokenizer, git-LFS pointers or, for ``chat``, no chat template.

    Without tokenizer files, Transformers would silently create an empty tokenizer.
    """
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError("the folder holds no tokenizer (no tokenizer.json)", str(folder), MODEL_FOLDER)
    for path in sorted(file for pattern in SMALL_FILES for file in folder.glob(pattern)):
        if is_lfs_pointer(path):
            raise UserError("not the file itself", str(path), repair_hint(path))
    config = folder / "tokenizer_config.json"
    with reading(config):
        inside = config.is_file() and b'"chat_template"' in config.read_bytes()
    if chat and not inside and not any((folder / f"chat_template.{kind}").is_file() for kind in ("jinja", "json")):
        hint = (
            "use an instruct model, write a chat_template.jinja into the model's folder, or set another data.format "
            "(template: a layout of your own)"
        )
        raise UserError("the tokenizer has no chat template, which format: chat needs", str(folder), hint)


def tokenizer_folder(base: Path, *adapters: Path | None) -> Path:
    """The folder of the tokenizer: the first adapter that has its own, else the base."""
    return next((adapter for adapter in adapters if adapter and (adapter / "tokenizer_config.json").is_file()), base)


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy a tokenizer's files and its chat templates."""
    for pattern in (*TOKENIZER_FILES, *TOKENIZER_EXTRAS, "chat_template.*", "additional_chat_templates/*.jinja"):
        for file in folder.glob(pattern):
            target = to / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a model's config.json, or another of its JSON files. Raises UserError when it is damaged, and RunError when
    it is missing or reading it fails, which may be temporary."""
    path = folder / name
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError("not a model configuration", str(path), "it must be one JSON object")
    return config


def stop_ids(folder: Path) -> set[int]:
    """The ids of the tokens at which generation stops, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = read_config(folder, name).get("eos_token_id") if (folder / name).is_file() else None
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()


def read_json(path: Path, hint: str | None = None) -> Any:
    """Read a JSON file. Raises UserError, with the ``hint`` if given, when it is damaged, and RunError when it is
    missing or reading it fails, which may be temporary."""
    try:
        with reading(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not readable: {error}", str(path), hint or repair_hint(path)) from error


def check_model_type(folder: Path) -> None:
    """Raises UserError when Transformers has no model of the type that config.json names.

    Reads Transformers' tables as text, which takes milliseconds; importing them takes seconds.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    package = importlib.util.find_spec("transformers")
    folders = package.submodule_search_locations if package is not None else None
    files = [file for each in folders or () for file in Path(each, "models/auto").glob("*.py")]
    tables = [file.read_text(encoding="utf-8") for file in files]
    if not isinstance(kind, str) or (tables and not any(f'"{kind}"' in table for table in tables)):
        raise unknown_type(config, folder)


def unknown_type(config: Mapping[str, Any], folder: Path) -> UserError:
    """The error for a model type that Transformers does not support."""
    own = ", ".join(custom_code(config))
    what = f"model type '{config.get('model_type')}' is unknown to transformers {version('transformers')}"
    needs = f" and needs its own code ({own}), which lora does not run (trust_remote_code)" if own else ""
    hint = "use a model that transformers supports; a newer release of it may do"
    return UserError(what + needs, str(folder / "config.json"), hint)


def custom_code(config: Mapping[str, Any]) -> list[str]:
    """The custom Python files that the ``auto_map`` of a model's or tokenizer's configuration names."""
    auto_map = config.get("auto_map")
    names: list[Any] = []
    for entry in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        names += entry if isinstance(entry, list) else [entry]
    return sorted({f"{str(name).rpartition('.')[0] or name}.py" for name in names if name})


def hub_kernels(config: Any, inside: bool = False) -> Iterator[str]:
    """The hub repositories whose code a configuration asks for, as ``attn_implementation: owner/name``."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from hub_kernels(value, inside or str(key).endswith("_implementation"))
    elif isinstance(config, str) and inside and "/" in config:
        yield config


def stored_quantization(folder: Path) -> str | None:
    """The method by which the weights in a model folder are quantized ('bitsandbytes', 'gptq', …), or None.

    Raises UserError when config.json is not readable.
    """
    section = read_config(folder).get("quantization_config")
    return str(section.get("quant_method", "unknown")) if isinstance(section, dict) else None


def has_unsupported_quantization(folder: Path) -> bool:
    """Whether the weights are stored quantized, but not in bitsandbytes' 4 bits: only these can be sharded or streamed.

    Raises UserError when config.json is not readable.
    """
    stored = stored_quantization(folder)
    in_4_bits = stored == "bitsandbytes" and read_config(folder)["quantization_config"].get("load_in_4bit")
    return stored is not None and not in_4_bits


def check_quantizable(folder: Path) -> None:
    """Raises UserError when the weights are quantized already: Transformers would silently ignore the new method."""
    stored = stored_quantization(folder)
    if stored is not None:
        raise UserError(
            f"the weights are quantized already ({stored}) and cannot be quantized again",
            str(folder),
            "use the model as it is, without quantization, or start from the unquantized one",
        )
