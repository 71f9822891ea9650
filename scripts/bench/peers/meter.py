"""Count what a Transformers trainer does, at the model's input and at the end of each step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from bench.work import Report, Work


class Meter(TrainerCallback):
    """Counts the model's inputs and times the ends of steps with a hook and a callback, so that no trainer changes."""

    def __init__(self) -> None:
        self.counts: list[torch.Tensor] = []  # per forward pass: real tokens, supervised tokens, rows
        self.passes: list[int] = []  # forward passes so far, at the end of each step
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.first_step_at = 0.0

    def watch(self, model: torch.nn.Module) -> None:
        """Count each batch that goes into ``model``."""
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, __: Any, batch: dict[str, Any]) -> None:
        ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
        laid_end_to_end = mask is None and positions is not None
        tokens = torch.tensor(ids.numel()) if mask is None else mask.sum()
        rows = (positions == 0).sum() if laid_end_to_end else torch.tensor(len(ids))
        self.counts.append(
            torch.stack([part.to(ids.device) for part in (tokens, (batch["labels"] != -100).sum(), rows)])
        )

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.first_step_at = self.first_step_at or time.time()
        self.ends.append(time.perf_counter())
        self.passes.append(len(self.counts))

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def report(self, work: Work, model: torch.nn.Module, adapter: Path, settings: dict[str, Any]) -> Report:
        """The report of the training."""
        counts = torch.stack(self.counts).cpu()
        tokens, supervised, rows = counts.sum(dim=0).tolist()
        after = counts[self.passes[work.warmup_steps - 1] :, 0].sum().item()
        return Report(
            steps=len(self.ends),
            rows=rows,
            tokens=tokens,
            supervised_tokens=supervised,
            trainable_parameters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            losses=self.losses,
            tokens_per_second=after / (self.ends[-1] - self.ends[work.warmup_steps - 1]),
            first_step_at=self.first_step_at,
            adapter=str(adapter),
            settings=settings,
        )


def common_arguments(work: Work, folder: Path, packing: bool) -> dict[str, Any]:
    """The settings that the work fixes, as TrainingArguments. Rows keep the file's order. Only packed rows are
    shuffled by the library, since TRL sorts them by length."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": work.packed_batch_size if packing else work.batch_size,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "train_sampling_strategy": "random" if packing else "sequential",
        "seed": work.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),  # without it, bf16 is rejected on a CPU
        "disable_tqdm": True,
    }


def settings_of(arguments: TrainingArguments, model: torch.nn.Module) -> dict[str, Any]:
    """The settings in effect, including the library's defaults."""
    names = ("bf16", "gradient_checkpointing", "optim", "use_liger_kernel", "packing", "padding_free")
    found = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    attention = model.get_base_model().config._attn_implementation
    return {name: getattr(value, "value", value) for name, value in found.items()} | {
        "weights": sorted(dtypes),
        "attention": attention,
    }
