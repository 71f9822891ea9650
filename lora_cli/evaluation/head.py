"""The frozen output layer and the loss, computed together in chunks: full logits never exist.

In the forward pass, a hook takes the layer's input and passes on an empty one. Every architecture's own code up to the
layer runs unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lora_cli.model.fast_paths.shapes import rounded_size
from lora_cli.model.fast_paths.swiglu import HAS_LIGER
from lora_cli.model.trial import FORWARD_ERRORS, relative_error, trial_ids
from lora_cli.system.memory import is_out_of_memory

ROWS, COLUMNS, LOGITS = 2048, 4096, 2**22
"""On a CPU: the most rows of logits computed at a time, the fewest columns, and the logits when rows are few."""
FINITE_MINUS_INF = -1e30
"""Replaces a bias of -inf: a block in which every token has -inf would have no softmax."""
BYTES_ON_GPU = 2**28
"""Most bytes of logits that a GPU computes at a time, before rows are rounded up; few rows make slow products."""
CACHED = 2**19
"""Logits of which a CPU computes the softmax at a time, in float32: as many as stay in its cache."""
AT_ONCE_ON_GPU = 2**25
"""Logits of which a GPU computes the softmax at a time, in float32."""


@dataclass(frozen=True)
class Head:
    """A frozen linear output layer: logits are z = scale * (h W^T + bias), or cap * tanh(z / cap) with a cap."""

    module: nn.Linear
    scale: float
    cap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits (n, vocabulary), float32, for ``hidden`` (n, width)."""
        return _bounded(self.module(hidden).float(), self.scale, self.cap)

    def summed_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood (float32 scalar) of ``targets`` (n,) given ``hidden`` (n, width)."""
        weight, bias = self.module.weight, self.module.bias
        if hidden.is_cuda and bias is None and HAS_LIGER:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            scaled = (hidden if self.scale == 1 else hidden * self.scale).to(weight.dtype)
            # By default, Liger gives a chunk's logits as much memory as the hidden states: few rows for few tokens.
            budget = max(1, BYTES_ON_GPU // scaled.nbytes)
            fused: torch.Tensor = liger_fused_linear_cross_entropy(
                scaled, weight, targets, reduction="sum", softcap=self.cap, chunk_mem_const=budget
            )
            return fused
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        weight = weight.to(hidden.dtype)
        rows = _rows(weight)
        wants_gradient = hidden.requires_grad and torch.is_grad_enabled()
        with torch.autocast(hidden.device.type, enabled=False):
            losses = [
                LinearCrossEntropy.apply(some, weight, bias, wanted, self.scale, self.cap, wants_gradient)  # type: ignore[no-untyped-call]
                for some, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
            ]
        return torch.stack(losses).sum()

    @contextmanager
    def intercept_input(self, use: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
        """A context in which a forward pass hands this layer's input to ``use`` and returns empty logits. They depend
        on the loss that ``use`` may return, since sharded weights expect the backward pass to start at the logits.

        ``use`` is called during the pass: after it, sharded weights are no longer gathered.
        """
        losses: list[torch.Tensor | None] = []

        def take(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            losses.append(use(inputs[0]))
            return (inputs[0][:, :0].detach(), *inputs[1:])  # with a gradient, autograd would save the layer's weight

        def depend_on_loss(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
            loss = losses.pop()
            return logits if loss is None else logits + loss

        with self.module.register_forward_pre_hook(take), self.module.register_forward_hook(depend_on_loss):
            yield


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(z_i)[t_i] over rows i, for the logits z of ``Head`` with a frozen W.

    The forward pass computes the gradient w.r.t. h, (softmax(z) - onehot(t)) * dz/dh, block by block while the block's
    logits exist, as in Liger (arXiv:2410.10989, section 3.2). Each block of columns has its own softmax; blocks are
    combined by the logarithms of their sums (as in arXiv:1805.02867, section 3).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        cap: float | None,
        wants_gradient: bool,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        rows, columns = len(hidden), _columns(weight, len(hidden))
        lengthened = pad(hidden, (0, 0, 0, rounded_size(rows) - rows))
        memory = hidden.new_empty(len(lengthened) * columns)
        total = hidden.new_full((rows, 1), -torch.inf, dtype=exact)  # log sum exp(z) over the columns so far
        picked = torch.zeros_like(total)
        slopes = total.new_zeros(rows, hidden.shape[1] if wants_gradient else 0)
        for first in range(0, len(weight), columns):
            some = weight[first : first + columns]
            whole = memory[: len(lengthened) * len(some)].view(len(lengthened), len(some))
            logits = torch.mm(lengthened, some.T, out=whole)[:rows]
            if bias is not None:
                logits += bias[first : first + columns]
                logits.clamp_(min=max(FINITE_MINUS_INF, torch.finfo(logits.dtype).min))
            place = targets[:, None] - first
            is_here = (place >= 0) & (place < len(some))
            picked = torch.where(is_here, logits.gather(1, place.clamp(0, len(some) - 1)).to(exact), picked)
            own = _softmax_and_logsumexp(logits, exact, scale, cap)
            total = torch.logaddexp(total, own)
            if wants_gradient:
                slopes.lerp_(torch.mm(whole, some)[:rows].to(exact), own.sub_(total).exp_())
        picked = _bounded(picked, scale, cap)
        if wants_gradient:
            wanted = weight[targets]
            slopes = slopes.sub_(wanted if cap is None else wanted * _slope(picked, cap)).mul_(scale)
            ctx.save_for_backward(slopes.to(hidden.dtype))
        loss: torch.Tensor = (total - picked).sum()
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad.to(slopes.dtype), None, None, None, None, None, None


def _rows(weight: torch.Tensor) -> int:
    """The most rows of logits to compute at a time for a head's ``weight``."""
    vocabulary, width = weight.shape
    if weight.device.type != "cpu":
        return rounded_size(max(64, BYTES_ON_GPU // (weight.itemsize * vocabulary)))
    return rounded_size(min(ROWS, LOGITS // width))


def _columns(weight: torch.Tensor, rows: int) -> int:
    """Columns of the logits to compute at a time for this many rows.

    On a CPU, about as many as its cache holds, but enough that summing the blocks' gradients, each as wide as the
    hidden states, takes little time.
    """
    vocabulary, width = weight.shape
    if weight.device.type != "cpu":
        return vocabulary
    return min(vocabulary, max(COLUMNS, 2 * width, rounded_size(LOGITS // rounded_size(max(1, rows)))))


def _softmax_and_logsumexp(logits: torch.Tensor, exact: torch.dtype, scale: float, cap: float | None) -> torch.Tensor:
    """log sum exp(z) of each row of ``logits`` (rows, n), as (rows, 1) in the ``exact`` dtype.

    Overwrites ``logits`` with softmax(z), times z's slope if there is a cap.
    """
    few = max(1, (CACHED if logits.device.type == "cpu" else AT_ONCE_ON_GPU) // logits.shape[1])
    sums = []
    for each in torch.split(logits, few):
        z = _bounded(each.to(exact), scale, cap)
        shares = z.softmax(1)
        # The largest probability is 1 / sum exp(z - max); torch's logsumexp would compute the exponentials again.
        sums.append(z.amax(1, keepdim=True) - shares.amax(1, keepdim=True).log())
        each.copy_(shares if cap is None else shares.mul_(_slope(z, cap)))
    return torch.cat(sums)


def _slope(z: torch.Tensor, cap: float) -> torch.Tensor:
    """dz/dlogit of a capped z."""
    return 1 - (z / cap).square_()


def _bounded(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """The logits, scaled and capped as the architecture does; without scale and cap, ``logits`` itself."""
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def frozen_head(model: PreTrainedModel | PeftModel) -> Head | None:
    """The model's output layer, if it is an nn.Linear without adapter whose logits follow the configuration; else None.

    Gemma caps its logits, Granite divides and Cohere multiplies them. The result is compared with the model's own
    logits: an architecture that does anything else there gets None. Call it within ``evaluating``.
    """
    config, module = model.config.get_text_config(), model.get_output_embeddings()
    if type(module) is not nn.Linear:
        return None
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    head = Head(module, scale, getattr(config, "final_logit_softcapping", None))
    ids = trial_ids(model, 8)[None]
    taken: list[torch.Tensor] = []
    wanted = model(input_ids=ids, use_cache=False).logits[0].float()
    try:
        with head.intercept_input(taken.append):
            model(input_ids=ids, use_cache=False)
    except FORWARD_ERRORS as error:  # it uses its logits, of which there are none (ProphetNet)
        if is_out_of_memory(error):
            raise
        return None
    found = head.logits(taken[0][0]) if taken else wanted[:0]
    if found.shape != wanted.shape:
        return None
    rounding = 1e-4 if module.weight.dtype == torch.float32 else 0.02
    return head if relative_error(found, wanted) < rounding else None
