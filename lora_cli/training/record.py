"""What is reported about a run: on the display before its first step, in run.json, and with its adapter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lora_cli.data.audit import ends_without_stop
from lora_cli.data.sources import sources_of, valid_rows
from lora_cli.display import Display, peak_memory
from lora_cli.errors import Fault, first_few, format_range, pluralize
from lora_cli.evaluation.loss import Score
from lora_cli.model.base import save_tokenizer
from lora_cli.model.device import dtype_name, resolve_compute_dtype
from lora_cli.model.files import stop_ids
from lora_cli.model.targets import describe, narrower
from lora_cli.recipe.schema import Recipe
from lora_cli.training.distributed.processes import shape_of
from lora_cli.training.prepare import Prepared
from lora_cli.training.run.checkpoint import Progress
from lora_cli.training.trainer import Trainer, unwrap
from lora_cli.weights.adapter.adapter_config import layer_and_part, sort_targets
from lora_cli.weights.adapter.catalogue import VARIANTS
from lora_cli.weights.adapter.provenance import PROVENANCE, base_record, now, versions

SCORES = {"base": "base", "start": "with the adapter of init_from", "validation": "with adapter"}
"""The scores that a run's result may have, in the order in which they are shown, each with its label."""


def report_setup(trainer: Trainer) -> None:
    """Report what will be trained and on which rows, before the first step."""
    job, display = trainer.job, trainer.display
    trainable, total = count_parameters(trainer)
    rows = describe(job.targets, _parameters_per_layer(trainer))
    display.table("adapted layers", ["module", "layers", "in -> out", "parameters"], rows)
    if narrow := narrower(job.targets, job.recipe.adapter.r):
        subject = f"adapter.r: {job.recipe.adapter.r} is more than the width of {pluralize(len(narrow), 'layer')}"
        display.note(f"{subject}, such as {narrow[0].name} ({narrow[0].width}), whose updates cannot have that rank")
    display.note(f"trainable: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    examples = job.train.examples
    display.note(
        f"training rows: {len(examples):,} with {int(examples.supervised_per_row.sum()):,} supervised of "
        f"{examples.tokens:,} tokens, read as {examples.format}; {pluralize(trainer.total_steps, 'step')}"
    )
    if job.read_from:
        display.note(f"tokenized rows read from {job.read_from}")
    if job.max_length < job.recipe.data.max_length:
        display.note(f"data.max_length: {job.recipe.data.max_length} -> {job.max_length}, the model's maximum length")
    quantization = job.recipe.quantization
    if quantization is not None and quantization.method != "int8":
        computes = resolve_compute_dtype(quantization, trainer.dtype, trainer.accelerator.device)
        used = dtype_name(computes)
        if used != quantization.compute_dtype:
            display.note(f"quantization.compute_dtype: {quantization.compute_dtype} -> {used}, faster here")
    report_rows(job, display)


def count_parameters(trainer: Trainer) -> tuple[int, int]:
    """Count trained and all parameters; the base's on ``bare``, since sharded codes do not show their number."""
    trained = sum(shape_of(weight).numel() for _, weight in trainer.trained)
    return trained, trained + sum(weight.numel() for weight in trainer.job.bare.parameters())


def _parameters_per_layer(trainer: Trainer) -> Counter[str]:
    """Count each adapted layer's trained parameters, by module name."""
    counts: Counter[str] = Counter()
    for name, weight in trainer.trained:
        counts[layer_and_part(name)[0]] += shape_of(weight).numel()
    return counts


def report_rows(job: Prepared, display: Display) -> None:
    """Report what was found in the rows."""
    counts, report = job.train, job.report
    fewest, most = report.bos_per_row
    bos = str(fewest) if fewest == most else f"{fewest} to {most}"
    display.note(
        f"of {len(counts.examples):,} training rows {report.ends_supervised:,} have their end supervised; "
        f"{bos} BOS per row"
    )
    plain = sorted({"alpaca", "prompt_completion"}.intersection(counts.examples.formats))
    if job.tokenizer.chat_template and plain:
        what = f"{' and '.join(plain)} rows do not go through the model's chat template"
        display.note(f"{what}; data.format: chat renders them with it")
    if counts.truncated:
        subject = pluralize(counts.truncated, "was", "were")
        display.note(f"of {pluralize(counts.rows, 'row')} {subject} cut to {job.max_length} tokens")
    if counts.dropped:
        subject = pluralize(counts.dropped, "row was dropped", "rows were dropped")
        display.note(f"{subject}, with nothing left to learn", warning=True)
    if report.duplicates:
        subject = pluralize(report.duplicates, "training row repeats", "training rows repeat")
        display.note(f"{subject} an earlier one")
    if report.validation_in_train:
        subject = pluralize(report.validation_in_train, "validation row is", "validation rows are")
        display.note(f"{subject} in the training rows too: their loss measures what was memorized", warning=True)
    if report.ends_masked:
        subject = f"in {pluralize(report.ends_masked, 'whole row')} the end of the last answer"
        display.note(f"{subject} is not supervised: the model does not learn to stop there", warning=True)
    for token, number in ends_without_stop(job.tokenizer, counts.examples.formats, stop_ids(job.base)):
        what = f"answers end in '{token}', where generation does not stop"
        hint = f"add its id, {number}, to eos_token_id in the model's generation_config.json"
        display.note(f"{what}: {hint}", warning=True)
    if report.empty_answers:
        subject = pluralize(report.empty_answers, "training row has", "training rows have")
        display.note(f"{subject} an empty answer: the model learns to answer nothing", warning=True)
    if report.bos_removed:
        subject = pluralize(
            report.bos_removed, "row begins with a BOS of its own", "rows begin with a BOS of their own"
        )
        display.note(f"{subject}: the one that the tokenizer adds was left out", warning=True)
    if report.bos_doubled:
        subject = pluralize(report.bos_doubled, "row begins", "rows begin")
        display.note(f"{subject} with two BOS: the text or the chat template writes one too many", warning=True)
    if report.forged.rows:
        display.note(_forged_rows(job), warning=True)
    if job.unused_columns:
        display.note(str(Fault(f"columns not used: {first_few(job.unused_columns, 5)}")))
    for note in report.template_notes:
        display.note(note)


def _forged_rows(job: Prepared) -> str:
    forged = job.report.forged
    row = next(islice(valid_rows(sources_of(job.recipe.data.train)), forged.first, None), None)
    where = "" if row is None else f" (first: {row.where})"
    subject = pluralize(forged.rows, "row has", "rows have")
    effect = "it becomes the special token with which the chat template begins or ends a turn"
    return f"{subject} '{forged.token}' or the like in the text of a turn{where}: {effect}"


def run_record(trainer: Trainer) -> dict[str, Any]:
    """Return run.json's content before the first step."""
    recipe, job = trainer.job.recipe, trainer.job
    examples = job.train.examples
    device = trainer.accelerator.device
    data = {
        "format": examples.format,
        "rows": len(examples),
        "tokens": examples.tokens,
        "supervised_tokens": int(examples.supervised_per_row.sum()),
        "truncated": job.train.truncated,
        "dropped": job.train.dropped,
        "fingerprint": examples.fingerprint,
        "max_length": job.max_length,
        "packed": trainer.schedule.packing,
        **asdict(job.report),
    }
    if job.validation is not None:
        data["validation"] = {"rows": len(job.validation), "fingerprint": job.validation.fingerprint}
    return {
        "started": now(),
        "finished": None,
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": trainer.accelerator.num_processes,
        "per_device_train_batch_size": recipe.training.batch_size,
        "gradient_accumulation_steps": recipe.training.gradient_accumulation_steps,
        "dtype": dtype_name(trainer.dtype),
        "seed": recipe.training.seed,
        "base": base_record(recipe.model.name_or_path, job.folder.adapter, job.base_digest),
        "init_from": job.start,
        "data": data,
        "cache_frozen": dict(trainer.hidden_states.places) if trainer.hidden_states else {},
        "steps": trainer.total_steps,
    }


def result_record(
    trainer: Trainer, progress: Progress, adapter_step: int, resumed_step: int, seconds: float
) -> dict[str, Any]:
    """Return the result of a run. ``loss`` is the last logged one (None when its line was lost), ``start`` the score
    with the adapter of ``init_from`` (None without one), ``validation`` the score of the adapter, whose weights are
    those of ``adapter_step``. ``seconds`` is the time of this process, which took the steps after ``resumed_step``."""
    trainable, total = count_parameters(trainer)
    lines = [line for line in trainer.job.folder.read_metrics() if line["split"] == "train"]
    is_lost = progress.logged_step is not None and (not lines or lines[-1]["step"] < progress.logged_step)
    measured = [line["loss"] for line in lines if line["loss"] is not None]
    validation_loss = progress.best_loss if adapter_step == progress.best_step else progress.validation_loss
    return {
        "steps": progress.step,
        "resumed_step": resumed_step,
        "adapter_step": adapter_step,
        "skipped_steps": progress.skipped_steps,
        "loss": measured[-1] if measured and not is_lost else None,
        "base": _score(progress.base_loss, progress.validation_tokens),
        "start": _score(progress.start_loss, progress.validation_tokens),
        "validation": _score(validation_loss, progress.validation_tokens),
        "best": {"step": progress.best_step, "loss": progress.best_loss},
        "trainable_parameters": trainable,
        "total_parameters": total,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }


def _score(loss: float | None, tokens: int) -> dict[str, float] | None:
    if loss is None:
        return None
    score = Score(loss, tokens)
    return {"loss": loss, "perplexity": score.perplexity, "tokens": tokens}


def write_adapter(trainer: Trainer, folder: Path, weights: Mapping[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Write the adapter into ``folder`` in PEFT's layout, with tokenizer, chat template, provenance and model card.

    ``weights`` are the complete trained tensors by name; the model itself may hold only this process's shards. ``info``
    is run.json's content.
    """
    model, recipe = unwrap(trainer), trainer.job.recipe
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = info["base"]["name_or_path"]
    sort_targets(config)
    model.save_pretrained(str(folder), True, state_dict=dict(weights), save_embedding_layers=False)
    save_tokenizer(trainer.job.tokenizer, folder)
    kept = {key: info[key] for key in ("versions", "dtype", "base", "init_from", "data", "finished", "result")}
    provenance = kept | {"recipe": recipe.model_dump(mode="json")}
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(recipe, config, info), encoding="utf-8")


def labelled_scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the validation scores in a run's result, in the order in which they are shown, by label."""
    return {label: result[key] for key, label in SCORES.items() if result[key]}


def model_card(recipe: Recipe, config: LoraConfig, info: dict[str, Any]) -> str:
    """Return the adapter's README.md: its settings, its training data and its validation scores. ``config`` is PEFT's,
    which may have other ranks for some layers than the recipe, if training began with another adapter."""
    base, data, result = info["base"], info["data"], info["result"]
    quantized = f", trained on the base in {recipe.quantization.method}" if recipe.quantization else ""
    ranks = (config.r, *(config.rank_pattern or {}).values())
    alphas = (config.lora_alpha, *(config.alpha_pattern or {}).values())
    kind = f"Rank {format_range(ranks)}, alpha {format_range(alphas)}"
    kind += "".join(f", {name}" for key, name in VARIANTS.items() if getattr(config, key))
    peak = recipe.training.learning_rate
    start = best = ""
    if recipe.adapter.init_from is not None:
        digest = info["init_from"]["fingerprint"][:16]
        name = Path(recipe.adapter.init_from).name  # a path may name the user
        start = f" Training began with the adapter `{name}` (SHA-256 `{digest}`)."
    if result["adapter_step"] != result["steps"]:
        best = f" The weights are those of step {result['adapter_step']:,}, which had the lowest validation loss."
    is_local = base["relative_path"] is not None  # the hub refuses a card with a path, which may also name the user
    of_base = "" if is_local else f"base_model: {json.dumps(base['name_or_path'])}\n"
    paragraphs = [
        f"---\nlibrary_name: peft\npipeline_tag: text-generation\n{of_base}tags: [lora, peft]\n---",
        f"# LoRA adapter for {Path(base['name_or_path']).name}",
        f"{kind}{quantized}; {result['trainable_parameters']:,} trained parameters, "
        f"{pluralize(result['steps'], 'step')} at a peak learning rate of {peak:g}.",
        f"Base fingerprint: `{base['fingerprint'][:16]}`. Training data: {pluralize(data['rows'], 'row')} "
        f"({data['supervised_tokens']:,} supervised tokens).{start}{best}",
    ]
    if result["validation"]:
        scores = labelled_scores(result)
        rows = (f"| {label} | {score['loss']:.4f} | {score['perplexity']:.2f} |" for label, score in scores.items())
        paragraphs.append("\n".join(("| validation | loss | perplexity |", "|---|---|---|", *rows)))
    load = "model = AutoPeftModelForCausalLM.from_pretrained(path_of_this_folder)"
    paragraphs.append(f"```python\nfrom peft import AutoPeftModelForCausalLM\n{load}\n```\n")
    return "\n\n".join(paragraphs)
