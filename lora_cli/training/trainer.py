"""The state of the training loop, which set-up creates and each part of the loop reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel

from lora_cli.data.batches import Schedule
from lora_cli.display import Display
from lora_cli.evaluation.head import Head
from lora_cli.model.fast_paths.frozen_layers import FrozenLayers
from lora_cli.training.cached_states import HiddenStates
from lora_cli.training.distributed.processes import all_reduce_max
from lora_cli.training.interrupt import Interrupt
from lora_cli.training.prepare import Prepared


@dataclass
class Trainer:
    """The state of the training loop; ``trained`` are the trained parameters by name."""

    job: Prepared
    accelerator: Accelerator
    model: torch.nn.Module
    trained: list[tuple[str, torch.nn.Parameter]]
    head: Head | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    total_steps: int
    dtype: torch.dtype
    display: Display
    cached_base: Path | None
    offload: bool
    streams: bool
    hidden_states: HiddenStates | None = None
    interrupt: Interrupt = field(default_factory=Interrupt)

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files; only one does."""
        return bool(self.accelerator.is_main_process)

    def asked_to_stop(self) -> int:
        """Return the signal that asked any process to stop, or 0; every process must call this."""
        return all_reduce_max(self.interrupt.number, self.accelerator)

    @property
    def below(self) -> FrozenLayers | None:
        """The frozen layers whose output is kept."""
        return self.hidden_states.layers if self.hidden_states else None


def unwrap(trainer: Trainer) -> PeftModel:
    """The PEFT model inside what Accelerate prepared."""
    model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    return model
