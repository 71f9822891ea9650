"""The frozen output layer and the loss behind it as one, in chunks: full logits never exist.

The layer is set aside in the forward pass by a hook, which takes its input and passes none on, so that every
architecture's own way up to it stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import pad

from lora_cli.model.gate import HAS_LIGER
from lora_cli.model.shapes import rounded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PRODUCT = {"cpu": (2**25, 256), "cuda": (2**28, 2**16)}
"""Bytes and rows of logits at a time, at most, but for the rounding of rows: few make slow products."""
CACHED = 2**20
"""Bytes of float32 logits that a processor makes exponentials of at a time: what stays in its cache."""


@dataclass(frozen=True)
class Head:
    """A frozen linear output layer: logits are z = scale * (h W^T + bias), or cap * tanh(z / cap) with a cap."""

    module: nn.Linear
    scale: float
    cap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) to (n, vocabulary), float32."""
        return _bounded(self.module(hidden).float(), self.scale, self.cap)

    def summed_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood (float32 scalar) of ``targets`` (n,) after ``hidden`` (n, width)."""
        weight, bias = self.module.weight, self.module.bias
        if hidden.is_cuda and bias is None and HAS_LIGER:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            scaled = (hidden * self.scale).to(weight.dtype)
            # Liger's own choice of chunks gives the logits the memory of the hidden states: few rows for few tokens.
            budget = max(1, PRODUCT["cuda"][0] // scaled.nbytes)
            fused: torch.Tensor = liger_fused_linear_cross_entropy(
                scaled, weight, targets, reduction="sum", softcap=self.cap, chunk_mem_const=budget
            )
            return fused
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        with torch.autocast(hidden.device.type, enabled=False):
            wants_gradient = hidden.requires_grad and torch.is_grad_enabled()
            loss = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden, weight, bias, targets, self.scale, self.cap, wants_gradient
            )
        assert isinstance(loss, torch.Tensor)
        return loss

    @contextmanager
    def set_aside(self, use: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Within, a forward pass hands this layer's input to ``use`` and gives no logits.

        It does so inside the pass: of weights that are sharded the whole is there no longer.
        """

        def take(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            use(inputs[0])
            return (inputs[0][:, :0], *inputs[1:])

        hook = self.module.register_forward_pre_hook(take)
        try:
            yield
        finally:
            hook.remove()


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(z_i)[t_i] over rows i, with the logits z that ``Head`` gives and W frozen.

    The gradient of h, (softmax(z) - onehot(t)) * dz/dh, is made chunk by chunk in the forward pass, while the chunk's
    logits are there, as in Liger (arXiv:2410.10989, section 3.2); the exponentials are made once for both.
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
        weight = weight.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        rows, few = _rows_at_a_time(weight)
        logits = hidden.new_empty(rows, len(weight))
        for start in range(0, len(hidden), rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            last = pad(part, (0, 0, 0, rounded(len(part)) - len(part)))
            torch.mm(last, weight.T, out=logits[: len(last)])
            chunk = logits[: len(part)]
            highest, normalizer = total.new_empty(2, len(part), 1)
            if bias is not None:
                chunk += bias
            picked = _bounded(chunk.gather(1, wanted).to(exact), scale, cap)
            for each, target, most, divisor in zip(
                *(whole.split(few) for whole in (chunk, wanted, highest, normalizer)), strict=True
            ):
                z = _bounded(each.to(exact), scale, cap)
                slope = None if cap is None else (1 - (z / cap).square_())
                torch.amax(z, 1, keepdim=True, out=most)
                exponentials = z.sub_(most).exp_()
                torch.sum(exponentials, 1, keepdim=True, out=divisor)
                if slope is not None:
                    exponentials.div_(divisor)
                    exponentials.scatter_(1, target, -1.0, reduce="add").mul_(slope)
                each.copy_(exponentials)
            total += (normalizer.log() + highest - picked).sum()
            if gradient is None:
                continue
            by_hidden = torch.mm(logits[: len(last)], weight)[: len(part)]
            if cap is None:  # softmax(z) W - W[t], divided after the product, where there is less to divide
                by_hidden.div_(normalizer).sub_(weight[wanted[:, 0]])
            torch.mul(by_hidden, scale, out=gradient[start : start + rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None, None


def _rows_at_a_time(weight: torch.Tensor) -> tuple[int, int]:
    """Rows of logits in one product, and of these in one go of exponentials, for a head's ``weight``."""
    vocabulary, on_cpu = len(weight), weight.device.type == "cpu"
    size, most = PRODUCT["cpu" if on_cpu else "cuda"]
    rows = rounded(min(most, max(64, size // (weight.itemsize * vocabulary))))
    return rows, max(1, CACHED // (4 * vocabulary)) if on_cpu else rows


def _bounded(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """The logits as the architecture bounds them; may be in place."""
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def frozen_head(model: PreTrainedModel | PeftModel) -> Head | None:
    """The model's output layer, when it is a frozen linear one whose logits are as the configuration says.

    Gemma caps its logits, Granite divides and Cohere multiplies them. The result is held to the model's own logits,
    so that an architecture that does anything else there keeps its own way: None.
    """
    config, module = model.config.get_text_config(), model.get_output_embeddings()
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return None
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    head = Head(module, scale, getattr(config, "final_logit_softcapping", None))
    ids = (torch.arange(8, device=module.weight.device) * 7919 + 3)[None] % config.vocab_size
    device, dtype = module.weight.device.type, module.weight.dtype
    taken: list[torch.Tensor] = []
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        wanted = model(input_ids=ids, use_cache=False).logits[0].float()
        with head.set_aside(taken.append):
            model(input_ids=ids, use_cache=False)
        found = head.logits(taken[0][0]).float() if taken else wanted[:0]
    if found.shape != wanted.shape:
        return None
    error = float((found - wanted).norm() / wanted.norm())
    return head if error < (1e-4 if dtype == torch.float32 else 0.02) else None
