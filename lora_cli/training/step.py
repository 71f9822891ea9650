"""One optimizer step, which is skipped when its loss or gradient is not finite."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from lora_cli.data.batches import Step
from lora_cli.evaluation.loss import summed_loss
from lora_cli.training import hidden_states
from lora_cli.training.distributed.processes import own_share
from lora_cli.training.distributed.sharding import backward, clip_gradient, is_sharded
from lora_cli.training.distributed.zero import is_zero
from lora_cli.training.memory.offload import to_device, to_host
from lora_cli.training.trainer import Trainer


def take_step(trainer: Trainer, step: Step, learning_rate: float) -> torch.Tensor:
    """Take one optimizer step. Returns its loss, the mean over all its supervised tokens, and the norm of its gradient:
    (2,) float64, on the device, so that the next step can be queued before this one has finished.

    When one of them is not finite, weights and optimizer state are unchanged.

    Each micro-batch's summed loss is divided by the whole step's supervised tokens before the backward pass, so that
    the gradient does not depend on how rows are split into micro-batches and processes. It is multiplied by the number
    of processes, by which DistributedDataParallel and fully_shard divide it afterwards.
    """
    accelerator, optimizer, training = trainer.accelerator, trainer.optimizer, trainer.job.recipe.training
    for parameter_group in optimizer.param_groups:
        parameter_group["lr"] = learning_rate
    total = torch.zeros((), device=accelerator.device)
    micro_batches = own_share(step.micro_batches, accelerator)
    for index, (rows, weight) in enumerate(micro_batches):
        batch = hidden_states.batch_of(trainer, "train", rows).to(accelerator.device)
        last = index == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(trainer.model):
            with saved_tensors_hooks(to_host, to_device) if trainer.offload else nullcontext():
                nll = weight * summed_loss(trainer.model, batch, trainer.head, trainer.below)
            backward(accelerator, optimizer, nll * accelerator.num_processes / step.supervised, last)
        total += nll.detach()
    weights = [parameter for _, parameter in trainer.trained]
    norm = clip_gradient(accelerator, optimizer, weights, training.max_grad_norm or float("inf"))
    outcome = torch.stack([accelerator.reduce(total).double() / step.supervised, norm.double()])
    step_if_finite(accelerator, optimizer, outcome)
    optimizer.zero_grad()
    return outcome


def step_if_finite(accelerator: Accelerator, optimizer: Optimizer, outcome: torch.Tensor) -> None:
    """Take the optimizer's step if all of ``outcome`` is finite; otherwise weights and state are unchanged."""
    is_finite = outcome.isfinite().all()
    if skips_on_device(accelerator, optimizer):
        optimizer.optimizer.found_inf = is_finite.logical_not().float()  # type: ignore[attr-defined]
    elif not is_finite:
        if accelerator.scaler is None:
            return
        optimizer.zero_grad()  # float16's gradient scaler must see every step
    optimizer.step()


def skips_on_device(accelerator: Accelerator, optimizer: Optimizer) -> bool:
    """Whether the optimizer can skip a step by a flag on the device, without synchronizing with the host.

    torch's fused optimizers can, since gradient scalers use this flag; over shards, it must be sharded as well.
    """
    if accelerator.scaler is not None or is_zero(accelerator) or is_sharded(accelerator):
        return False
    return bool(optimizer.optimizer.defaults.get("fused"))  # type: ignore[attr-defined]


def waits_each_step(trainer: Trainer) -> bool:
    """Whether each step's result is read before the next step begins: when processes have to agree, the host decides
    whether to take the step, or offloaded activations in host memory must be freed for the next one."""
    accelerator = trainer.accelerator
    return accelerator.num_processes > 1 or trainer.offload or not skips_on_device(accelerator, trainer.optimizer)
