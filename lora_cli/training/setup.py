"""Set up what the loop needs for a prepared run: the adapted model, the optimizer and the order of rows."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import PreTrainedModel

from lora_cli.data.batches import Schedule
from lora_cli.data.sources import sources_of
from lora_cli.display import Display
from lora_cli.errors import RunError
from lora_cli.evaluation.head import frozen_head
from lora_cli.evaluation.loss import evaluating
from lora_cli.evaluation.packing import enable_packing
from lora_cli.model.adapters import adapt, continue_adapter, trainable_parameters
from lora_cli.model.base import load_base, longrope_bounds
from lora_cli.model.device import best_device, dtype_name, resolve_compute_dtype, resolve_dtype
from lora_cli.model.fast_paths.fuse import fuse
from lora_cli.system.memory import keep_freed_memory
from lora_cli.training.distributed.launch_environment import process_count
from lora_cli.training.distributed.sharding import is_sharded, make_accelerator, prepare_model
from lora_cli.training.distributed.zero import is_zero
from lora_cli.training.memory.activations import set_checkpointing
from lora_cli.training.memory.batch_size import resolve_batch_size
from lora_cli.training.memory.streaming import Sources, add_streaming_hooks, detach_weights, needs_streaming
from lora_cli.training.optimizer import check_warmup, make_optimizer
from lora_cli.training.prepare import Prepared
from lora_cli.training.process_agreement import check_agreement
from lora_cli.training.run.same_run import with_resolved_batch
from lora_cli.training.torch_compile import compile_elementwise
from lora_cli.training.trainer import Trainer
from lora_cli.weights.adapter.init_from import start_of
from lora_cli.weights.files.shards import model_headers, stored_dtype
from lora_cli.weights.quantized_cache import cached_name, find_cached, link_cached, write_cached

MAX_KEPT_BYTES = 2**20
"""Bytes of the largest tensor whose memory is kept when it is freed, while layers are streamed."""


def set_up(job: Prepared, display: Display) -> Trainer:
    """Load the base, put the adapter on it, and create what the loop needs.

    Writes nothing but a quantized base into the cache.
    """
    recipe = job.recipe
    dtype = resolve_dtype(recipe.model.dtype, best_device())
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    if process_count() > 1:
        display.note(f"waiting for all {process_count()} processes to connect (to {os.environ['MASTER_ADDR']})")
    accelerator = make_accelerator(recipe.training, dtype)
    check_agreement(job, accelerator, dtype_name(dtype))
    check_padded_steps(job, accelerator.num_processes)
    keep_freed_memory()
    display.note(f"loading {recipe.model.name_or_path}")
    base, sources, kept = load_frozen(job, accelerator, dtype, display)
    fused = recipe.adapter.fused and not is_zero(accelerator)  # ZeRO gathers a weight only when its own layer is called
    if fused:
        fuse(base)
    hooks = add_streaming_hooks(base, sources)
    packing = choose_packing(job, base, display)
    set_seed(recipe.training.seed)  # creating a model may draw random numbers, and quantizing may have created one
    model = put_adapter(job, base, fused)
    for hook in hooks:  # an adapted layer reads its base layer's weights itself
        hook.remove()
    add_streaming_hooks(model, sources)
    with evaluating(model):
        head = frozen_head(model)
    recipe = resolve_batch_size(job, accelerator, model, head, packing, dtype.itemsize, bool(sources), display)
    job = replace(job, recipe=recipe)
    schedule = make_schedule(job, packing, accelerator.num_processes)
    checkpointing = set_checkpointing(job, schedule, accelerator, model, head, dtype, bool(sources), display)
    total = schedule.total_steps(recipe.training.num_train_epochs, recipe.training.max_steps)
    check_warmup(recipe.training, total)
    tokens = job.train.examples.tokens * total / schedule.steps_in(0) / accelerator.num_processes
    compile_elementwise(model, recipe, dtype, accelerator.device, tokens, display)
    optimizer = make_optimizer(recipe.training, [p for _, p in trainable_parameters(model)])
    prepared, optimizer = prepare_model(accelerator, model, optimizer, dtype)
    prepared.train()
    own_seed = (recipe.training.seed + accelerator.process_index) % 2**32
    set_seed(own_seed)  # processes start with the same weights, but have their own dropout
    return Trainer(
        job=job,
        accelerator=accelerator,
        model=prepared,
        trained=trainable_parameters(accelerator.unwrap_model(prepared)),
        head=head,
        optimizer=optimizer,
        schedule=schedule,
        total_steps=total,
        dtype=dtype,
        display=display,
        cached_base=kept,
        offload=checkpointing == "offload",
        streams=bool(sources),
    )


def check_padded_steps(job: Prepared, processes: int) -> None:
    """Raises UserError, before weights are loaded, when the learning rate would be 0 in a run of padded rows: packed,
    the rows take no more steps. Whether they are packed is known once the base is loaded."""
    training = job.recipe.training
    several = training.max_steps is None and training.num_train_epochs > 1
    if several or not training.warmup_steps:
        return
    padded = make_schedule(replace(job, recipe=with_resolved_batch(job.recipe)), False, processes)
    if padded.bounds and training.per_device_train_batch_size == "auto":
        return  # with more rows per batch there may be more steps
    check_warmup(training, padded.total_steps(training.num_train_epochs, training.max_steps))


def choose_packing(job: Prepared, base: PreTrainedModel, display: Display) -> bool:
    """Whether rows are packed end to end: if the recipe says so and the architecture keeps them apart."""
    if not job.recipe.data.packing:
        return False
    packing = enable_packing(base, job.recipe.model.attn_implementation)
    if not packing:
        what = "this architecture does not support packed rows; rows of similar length are padded instead"
        display.note(f"data.packing: {what}", warning=True)
    return packing


def put_adapter(job: Prepared, base: PreTrainedModel, fused: bool) -> PeftModel:
    """Return the base with a new adapter, or with the adapter of ``adapter.init_from``."""
    adapter, targets = job.recipe.adapter, [target.name for target in job.targets]
    start = start_of(adapter)
    if start is None:
        return adapt(base, adapter, targets, fused)
    return continue_adapter(base, start, adapter, targets, fused)


def load_frozen(
    job: Prepared, accelerator: Accelerator, dtype: torch.dtype, display: Display
) -> tuple[PreTrainedModel, Sources, Path | None]:
    """Return the base, the sources of streamed weights, and the folder of the base's quantized copy, if any.

    Raises UserError when the base cannot be streamed as asked, RunError when there is no quantized copy to stream from.
    """
    recipe, sharded = job.recipe, is_sharded(accelerator)
    device = torch.device("cpu") if sharded else accelerator.device  # each process then takes its shards from there
    streams, why = needs_streaming(job, accelerator.num_processes, sharded, device)
    if why:
        display.note(f"training.stream_base: auto -> {str(streams).lower()}: {why}", warning=not streams)
    kept = cached_base(job, accelerator, dtype, display)
    if kept is None:
        folder, quantization = job.base, recipe.quantization
    else:
        folder, quantization = kept, None
    if streams:
        if quantization is not None:
            raise RunError("training.stream_base: a quantized base is streamed from its cached copy, and there is none")
        display.note("training.stream_base: a layer's frozen weights are read whenever it runs")
        keep_freed_memory(largest=MAX_KEPT_BYTES)
        # In the stored dtype, Transformers maps the file without reading it yet.
        stored = stored_dtype(model_headers(folder))
        base = load_base(folder, recipe.model, None, torch.device("cpu"), stored)
        sources = detach_weights(base, folder, device, dtype)
    else:
        base = load_base(folder, recipe.model, quantization, device, dtype, sharded)
        sources = {}
    base.name_or_path = base.config.name_or_path = str(job.base)
    return base, sources, kept


def cached_base(job: Prepared, accelerator: Accelerator, dtype: torch.dtype, display: Display) -> Path | None:
    """Return the folder in the run's cache with the base quantized as the recipe says, created if missing; None to load
    the base unquantized or quantize it while loading.

    One process per machine creates it while the others wait.
    """
    if job.recipe.quantization is None:
        return None
    quantization, cache = job.recipe.quantization, job.folder.cache
    compute_dtype = resolve_compute_dtype(quantization, dtype, accelerator.device)
    name = cached_name(job.base, job.base_digest, quantization, dtype, compute_dtype)
    with accelerator.local_main_process_first():
        found = find_cached(cache, name)
        if found == cache / name or not accelerator.is_local_main_process:
            return found
        try:
            if found is None or not link_cached(found, cache / name):
                display.note(f"quantizing it to {quantization.method}, kept in {cache / name}")
                write_cached(job.base, cache / name, quantization, dtype, compute_dtype)
        except RunError as error:
            message = f"the base in {quantization.method} is not kept for the next run: {error.faults[0].what}"
            display.note(message, warning=True)
            return None
    return cache / name


def make_schedule(job: Prepared, packing: bool, processes: int) -> Schedule:
    """Return the schedule of the rows that each step takes."""
    recipe = job.recipe
    examples = job.train.examples
    return Schedule(
        lengths=examples.lengths,
        supervised=examples.supervised_per_row,
        source=examples.source,
        weights=tuple(source.weight for source in sources_of(recipe.data.train)),
        seed=recipe.training.seed,
        shuffle=recipe.data.shuffle,
        batch_size=recipe.training.batch_size,
        max_length=job.max_length,
        packing=packing,
        accumulation=recipe.training.gradient_accumulation_steps * processes,
        bounds=tuple(longrope_bounds(job.config)),
    )
