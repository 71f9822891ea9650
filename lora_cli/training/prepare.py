"""Check everything that can be known about a run before weights are loaded; nothing is written.

What imports torch is imported in functions: recipe, folder and rows are checked before that.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.data.faults import data_faults
from lora_cli.data.sources import sources_of
from lora_cli.errors import Fault, UserError
from lora_cli.model.files import (
    check_model_type,
    check_quantizable,
    check_tokenizer,
    has_unsupported_quantization,
    locate,
    read_config,
)
from lora_cli.model.targets import UNQUANTIZABLE_LAYERS, Target, choose_targets, compile_pattern
from lora_cli.recipe.schema import Adapter, Recipe
from lora_cli.training.distributed.launch_environment import check_gpus, is_first_here, process_index
from lora_cli.training.distributed.zero_config import deepspeed_faults
from lora_cli.training.run.run_folder import RunFolder
from lora_cli.training.run.same_run import as_begun
from lora_cli.weights.adapter.check_adapter import check_adapter
from lora_cli.weights.adapter.init_from import check_start, start_of, start_record
from lora_cli.weights.adapter.origin import check_base
from lora_cli.weights.files.check_model import check_directly_read_weights, check_weights, stored_layers
from lora_cli.weights.files.fingerprint import fingerprint
from lora_cli.weights.files.shards import check_complete

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lora_cli.data.audit import Report
    from lora_cli.data.cache import Cached
    from lora_cli.data.examples import Examples, Fitted


FLASH_PACKAGES = ("flash_attn", "flash_attn_interface", "kernels")


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check."""

    recipe: Recipe
    resume: bool  # whether there is a run to continue
    overwrite: bool
    folder: RunFolder
    base: Path
    base_digest: str
    start: dict[str, str]  # the record of the adapter that training starts from
    config: PreTrainedConfig
    bare: PreTrainedModel  # the base without weights, on the meta device
    tokenizer: PreTrainedTokenizerBase
    targets: list[Target]
    max_length: int
    train: Fitted
    validation: Examples | None
    unused_columns: list[str]  # the rows' columns that no format reads
    report: Report
    tokenized: list[Cached]  # the rows that are still to be published
    cache_keys: frozenset[str]
    read_from: Path | None  # the cache with the rows, unless some were tokenized now


def prepare(recipe: Recipe, resume: bool, overwrite: bool) -> Prepared:
    """Check the recipe against folder, data and model. Raises UserError with all faults that a stage finds."""
    folder = RunFolder(recipe.training.output_dir)
    goes_on = resume and folder.is_begun
    if goes_on:
        recipe = as_begun(recipe, folder.read_recipe())
    unused_columns = _check_without_torch(recipe, folder, resume, overwrite)

    from lora_cli.data.examples import check_ids
    from lora_cli.model.base import (
        check_causal,
        check_trainable,
        load_config,
        load_tokenizer,
        max_positions,
        meta_model,
    )

    _check_dtype(recipe, folder if goes_on else None)
    base = _base_with_weights(recipe)
    config = load_config(base)
    check_causal(config)
    check_trainable(config)
    tokenizer = load_tokenizer(base)
    bare = meta_model(config)
    targets = _targets(recipe, base, config, bare)
    digest = fingerprint(base)
    start = start_record(recipe.adapter)

    max_length = min(recipe.data.max_length, max_positions(config) or recipe.data.max_length)
    tokenized = _tokenized(recipe, tokenizer, folder.cache)
    train, validation, report = _examples(recipe, tokenized, max_length, tokenizer)
    for examples in (train.examples, validation):
        if examples is not None:
            check_ids(examples, config.get_text_config().vocab_size, str(base))
    if goes_on:
        held_out = validation.fingerprint if validation is not None else None
        folder.check_same_content(digest, start.get("fingerprint"), train.examples.fingerprint, held_out)
    return Prepared(
        recipe=recipe,
        resume=goes_on,
        overwrite=overwrite,
        folder=folder,
        base=base,
        base_digest=digest,
        start=start,
        config=config,
        bare=bare,
        tokenizer=tokenizer,
        targets=targets,
        max_length=max_length,
        train=train,
        validation=validation,
        unused_columns=unused_columns,
        report=report,
        tokenized=tokenized,
        cache_keys=frozenset(part.key for part in tokenized),
        read_from=_read_from(tokenized, folder.cache),
    )


def _check_without_torch(recipe: Recipe, folder: RunFolder, resume: bool, overwrite: bool) -> list[str]:
    """Run the checks that need no torch. Returns the columns that no format reads. Raises UserError with all faults."""
    faults: list[Fault] = []
    unused_columns: set[str] = set()

    def collect(check: Callable[[], object]) -> None:
        try:
            check()
        except UserError as error:
            faults.extend(error.faults)

    if process_index() == 0:  # only process 0 writes; the others may get here after it has begun
        collect(lambda: folder.check(recipe, resume, overwrite))
    collect(lambda: _check_model(recipe))
    faults += _package_faults(recipe)
    faults += deepspeed_faults(recipe)
    faults += data_faults(recipe.data, unused_columns, every_column=True)
    if faults:
        raise UserError(faults)
    return sorted(unused_columns)


def _package_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield a fault for each package that the recipe needs and that is not installed."""
    attention = recipe.model.attn_implementation
    if attention.startswith("flash") and not _is_installed(*FLASH_PACKAGES):
        hint = f"install one of {', '.join(FLASH_PACKAGES)}, or leave it at auto"
        yield Fault(f"model.attn_implementation: {attention} is not installed", hint=hint)
    for tracker in recipe.training.report_to:
        packages = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
        if not _is_installed(*packages):
            yield Fault(f"training.report_to: {tracker} is not installed", hint=f"pip install {tracker}")


def _is_installed(*packages: str) -> bool:
    """Whether one of these packages is installed."""
    return any(importlib.util.find_spec(name) for name in packages)


def _check_model(recipe: Recipe) -> None:
    base = locate(recipe.model.name_or_path)
    check_model_type(base)
    check_tokenizer(base, chat=recipe.data.format == "chat")
    if recipe.quantization is not None:
        check_quantizable(base)
        kind = str(read_config(base).get("model_type"))
        if layers := UNQUANTIZABLE_LAYERS.get(kind):
            what = f"a model of type {kind} reads {', '.join(layers)}'s weights directly: they cannot be quantized"
            raise UserError(what, "quantization", "remove this section")
    if recipe.training.fsdp and has_unsupported_quantization(base):
        what = "training.fsdp: of quantized bases, only those in bitsandbytes' 4 bits can be sharded"
        raise UserError(what, str(base), "start from the unquantized model, with quantization.method nf4")
    if Path(recipe.model.name_or_path).is_dir():
        _check_weights_without_torch(recipe, base)


def _check_weights_without_torch(recipe: Recipe, base: Path) -> None:
    check_complete(base)
    check_directly_read_weights(base, training=True)
    layers = stored_layers(base)
    if layers is not None:
        _check_target_names(recipe.adapter, layers)
    start = start_of(recipe.adapter)
    if start is not None:
        check_base(start, base)
        check_adapter(start, base)


def _check_target_names(adapter: Adapter, layers: Mapping[str, Target]) -> None:
    """Raises UserError for ``target_modules`` that the stored ``layers`` show to be wrong."""
    wanted = adapter.target_modules
    items = (wanted,) if isinstance(wanted, str) else wanted
    # Stored names may lack the base model's prefix: full names and patterns are checked later, on the model itself.
    if all(re.fullmatch(r"[\w-]+", item) for item in items):
        choose_targets(layers, wanted, adapter.r, adapter.layers_to_transform)
    elif isinstance(wanted, str):
        compile_pattern(wanted, layers)


def _check_dtype(recipe: Recipe, continued: RunFolder | None) -> None:
    """Raises UserError when model.dtype needs another device, or the run to continue began in another dtype."""
    from lora_cli.model.device import best_device, dtype_name, resolve_dtype

    dtype = resolve_dtype(recipe.model.dtype, best_device())
    if continued is not None:
        continued.check_same_dtype(dtype_name(dtype))


def _base_with_weights(recipe: Recipe) -> Path:
    """Return the base's folder, and download the weights if it is on the hub. Raises UserError, before the download,
    for what this machine does not support."""
    import torch

    from lora_cli.training.torch_compile import check_compiler

    check_gpus(torch.cuda.device_count())
    check_compiler(recipe)
    base = locate(recipe.model.name_or_path, weights=True)
    if not Path(recipe.model.name_or_path).is_dir():
        _check_weights_without_torch(recipe, base)
    return base


def _targets(recipe: Recipe, base: Path, config: PreTrainedConfig, bare: PreTrainedModel) -> list[Target]:
    """Return the layers to adapt, found on the ``bare`` model. Raises UserError when this model, the stored weights,
    the recipe and the adapter to start from do not match."""
    import torch

    from lora_cli.model.base import check_attention
    from lora_cli.model.device import best_device
    from lora_cli.model.layers import adaptable_layers, check_checkpointing
    from lora_cli.model.linear4bit import check_dora
    from lora_cli.weights.quantized_layers import check_quantized_layers

    adapter, layers = recipe.adapter, adaptable_layers(bare)
    targets = choose_targets(layers, adapter.target_modules, adapter.r, adapter.layers_to_transform)
    if recipe.quantization is not None:
        check_quantized_layers(base, recipe.quantization)
    if adapter.use_dora and recipe.quantization is not None and recipe.quantization.method != "int8":
        # A sharded base moves to the GPU only after PEFT has computed the norms.
        check_dora(targets, torch.device("cpu") if recipe.training.fsdp else best_device())
    check_weights(base, bare)
    if recipe.training.gradient_checkpointing in (True, "offload"):
        check_checkpointing(bare)
    check_attention(config, recipe.model.attn_implementation, best_device())
    start = start_of(adapter)
    if start is not None:
        check_start(start, adapter, layers, [target.name for target in targets])
    return targets


def _tokenized(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, cache: Path) -> list[Cached]:
    """Return the tokenized training rows and, if they have their own file, the validation rows."""
    from lora_cli.data.cache import tokenize_cached
    from lora_cli.training.distributed.cache_keys import wait_for_keys

    data = recipe.data
    specs = (data.train, data.own_validation)
    published = None if is_first_here() else wait_for_keys
    return [tokenize_cached(data, sources_of(spec), tokenizer, cache, published) for spec in specs if spec is not None]


def _read_from(tokenized: list[Cached], cache: Path) -> Path | None:
    if any(part.fresh and part.neighbour is None for part in tokenized):
        return None
    return next((part.neighbour.parent for part in tokenized if part.neighbour), cache)


def _examples(
    recipe: Recipe, tokenized: list[Cached], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Fitted, Examples | None, Report]:
    from lora_cli.data.audit import audit, check_supervised
    from lora_cli.data.batches import check_drawn, split_validation
    from lora_cli.data.examples import cut_for_evaluation, fit

    data = recipe.data
    rows, *others = (part.tokenized.examples for part in tokenized)
    held_out = others[0] if others else None
    if isinstance(data.validation, float):
        if len(rows) < 2:
            hint = "remove data.validation, or give a separate file"
            raise UserError("a validation share needs at least two rows", str(data.train), hint)
        rows, held_out = split_validation(rows, data.validation, recipe.training.seed)
    train = fit(rows, max_length, "data.train")
    check_supervised(train, data.min_supervised_rows, max_length)
    check_drawn(train.examples.source, sources_of(data.train))
    validation = cut_for_evaluation(held_out, max_length, "data.validation") if held_out else None
    return train, validation, audit(rows, train, held_out, tokenizer, tokenized[0].tokenized)
