"""The project's from-scratch reference: LoRA, its training and the quantizers in plain torch, from the papers.

Nothing here uses PEFT, bitsandbytes, Transformers or ``lora_cli``. ``test_reference.py`` compares it with those
libraries; other tests compare ``lora`` with it. Each row goes through the model alone: no padding, no packing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

Row = tuple[Sequence[int], Sequence[int]]
"""A row's token ids and its labels: the id for supervised tokens, -100 for others (not shifted)."""

IGNORED = -100


def rows_of(file: Path, tokenizer: Any, max_length: int) -> list[Row]:
    """Read a file's question-answer rows. A token is supervised if the text up to its end reaches into the answer.

    Rows are cut to ``max_length`` tokens; rows without a supervised token are left out.
    """
    rows = []
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        ids = tokenizer(record["question"] + record["answer"]).input_ids
        reach = [len(tokenizer.decode(ids[: at + 1])) for at in range(len(ids))]
        labels = [id if end > len(record["question"]) else IGNORED for id, end in zip(ids, reach, strict=True)]
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        if any(label >= 0 for label in labels[:max_length]):
            rows.append((ids[:max_length], labels[:max_length]))
    return rows


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update (LoRA, arXiv:2106.09685, eq. 3).

    h = W x + b + s B A x, with A (r, in), B (out, r) and s = alpha / r, or alpha / sqrt(r) for rsLoRA
    (arXiv:2312.03732, theorem 3.2). B starts at 0, so that training starts from the base.

    DoRA (arXiv:2402.09353, eq. 5): W' = m (W + s B A) / ||W + s B A||, with the norm of each output's row (a column in
    the paper, which writes W as (out, in) applied from the left). m starts at ||W||. The backward pass treats the norm
    as a constant (section 4.3).

    ``base`` is nn.Linear, or GPT-2's Conv1D, which stores W transposed: (in, out).
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, rslora: bool = False, dora: bool = False) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear) and type(base).__name__ != "Conv1D":
            raise TypeError(f"neither nn.Linear nor Conv1D: {type(base).__name__}")
        self.base = base.requires_grad_(False)
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        out_features, in_features = self.weight.shape
        self.A = nn.Parameter(torch.empty(r, in_features, dtype=self.weight.dtype))
        self.B = nn.Parameter(torch.zeros(out_features, r, dtype=self.weight.dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.m = nn.Parameter(self.weight.norm(dim=1)) if dora else None
        self._rescaled_by: Tensor | None = None  # DoRA's m / norm at the time of the merge
        self.merged = False

    @property
    def weight(self) -> Tensor:
        """W as (out, in), however it is stored. It is a view: writing to it changes the base."""
        stored: Tensor = self.base.weight.data
        return stored if isinstance(self.base, nn.Linear) else stored.T

    def delta(self) -> Tensor:
        """s B A, (out, in)."""
        return self.scaling * self.B @ self.A

    def forward(self, x: Tensor) -> Tensor:
        bias = self.base.bias
        if self.merged:
            return linear(x, self.weight, bias)
        if self.m is None:
            return linear(x, self.weight, bias) + self.scaling * (x @ self.A.T) @ self.B.T
        directed = self.weight + self.delta()
        norm = directed.norm(dim=1).detach()
        return linear(x, (self.m / norm)[:, None] * directed, bias)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base's weight in place."""
        if self.merged:
            raise RuntimeError("merged already")
        self.weight.add_(self.delta())
        if self.m is not None:
            self._rescaled_by = self.m / self.weight.norm(dim=1)
            self.weight.mul_(self._rescaled_by[:, None])
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the update again in place, which restores the weight up to rounding."""
        if not self.merged:
            raise RuntimeError("not merged")
        if self._rescaled_by is not None:
            self.weight.div_(self._rescaled_by[:, None])
        self.weight.sub_(self.delta())
        self.merged = False


def inject(
    model: nn.Module, names: Iterable[str], r: int, alpha: float, rslora: bool = False, dora: bool = False
) -> dict[str, LoRALinear]:
    """Freeze ``model`` and replace each module with one of these exact names by a LoRALinear."""
    model.requires_grad_(False)
    layers = {}
    for name in names:
        layers[name] = LoRALinear(model.get_submodule(name), r, alpha, rslora, dora)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


def adapter_tensors(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """The adapter's tensors (copies) under the names of PEFT's adapter_model.safetensors."""
    return {key: parameter.detach().clone() for key, parameter in _under_peft_names(layers).items()}


@torch.no_grad()
def load_adapter_tensors(layers: Mapping[str, LoRALinear], tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of an adapter_model.safetensors. Raises KeyError if some are missing or unknown."""
    parameters = _under_peft_names(layers)
    if parameters.keys() != tensors.keys():
        raise KeyError(sorted(parameters.keys() ^ tensors.keys()))
    for key, parameter in parameters.items():
        if parameter.shape != tensors[key].shape:
            raise ValueError(f"{key}: {tuple(tensors[key].shape)}, expected {tuple(parameter.shape)}")
        parameter.copy_(tensors[key])


def _under_peft_names(layers: Mapping[str, LoRALinear]) -> dict[str, nn.Parameter]:
    named = {}
    for name, layer in layers.items():
        named[f"base_model.model.{name}.lora_A.weight"] = layer.A
        named[f"base_model.model.{name}.lora_B.weight"] = layer.B
        if layer.m is not None:
            named[f"base_model.model.{name}.lora_magnitude_vector"] = layer.m
    return named


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Summed negative log-likelihood (nats) of a row's supervised tokens, and their number.

    ``logits`` (tokens, vocabulary), ``labels`` (tokens,): position t predicts label t + 1, so the first label is never
    counted.
    """
    predictions, wanted = logits[:-1], labels[1:]
    supervised = wanted != IGNORED
    log_probabilities = torch.log_softmax(predictions[supervised], dim=-1)
    return -log_probabilities.gather(1, wanted[supervised][:, None]).sum(), int(supervised.sum())


def row_loss(model: nn.Module, row: Row) -> tuple[Tensor, int]:
    """``token_loss`` of one row, computed in a batch of one."""
    ids, labels = (torch.as_tensor(values, dtype=torch.long) for values in row)
    return token_loss(model(input_ids=ids[None]).logits[0], labels)


@torch.no_grad()
def perplexity_row_by_row(model: nn.Module, rows: Iterable[Row]) -> float:
    """exp of the mean negative log-likelihood of all supervised tokens."""
    losses, counts = zip(*((float(nll), count) for nll, count in (row_loss(model, row) for row in rows)), strict=True)
    return math.exp(math.fsum(losses) / sum(counts))


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2; the moments of arXiv:1412.6980)."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters, self.betas, self.eps, self.weight_decay = parameters, betas, eps, weight_decay
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]
        self.t = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Update the parameters in place."""
        self.t += 1
        beta1, beta2 = self.betas
        for parameter, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            m_hat = m / (1 - beta1**self.t)
            v_hat = v / (1 - beta2**self.t)
            decayed = parameter - learning_rate * self.weight_decay * parameter
            parameter.copy_(decayed - learning_rate * m_hat / (v_hat.sqrt() + self.eps))


def clip(gradients: Sequence[Tensor], max_norm: float | None) -> tuple[list[Tensor], float]:
    """Scale the gradients so that their joint norm is at most ``max_norm``. Return them and the norm before.

    The 1e-6 in the divisor is torch's.
    """
    norm = math.sqrt(math.fsum(float((g.double() ** 2).sum()) for g in gradients))
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    return [g * factor for g in gradients], norm


def constant(t: int, total: int, warmup: int) -> float:
    """Fraction of the peak learning rate at step index t = 0, 1, …: up from 0 over ``warmup`` steps, then 1."""
    return t / warmup if t < warmup else 1.0


def linear_decay(t: int, total: int, warmup: int) -> float:
    """Up from 0 over ``warmup`` steps, then linearly down to 0 at ``total``."""
    return t / warmup if t < warmup else max(0.0, (total - t) / max(1, total - warmup))


def cosine(t: int, total: int, warmup: int) -> float:
    """Up from 0 over ``warmup`` steps, then down along half a cosine to 0 at ``total``."""
    return t / warmup if t < warmup else (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup))) / 2


@dataclass(frozen=True)
class StepResult:
    """The expected values of a step's line in metrics.jsonl. ``grad_norm`` is the norm before clipping."""

    loss: float
    tokens: int
    learning_rate: float
    grad_norm: float


def train_reference(
    model: nn.Module,
    steps: Iterable[Sequence[Row]],
    lr_at: Callable[[int], float],
    *,
    max_grad_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> list[StepResult]:
    """Train the parameters that require a gradient, in place. ``steps`` holds all rows of each optimizer step.

    A step's loss is the mean negative log-likelihood of its supervised tokens. ``lr_at`` returns the learning rate
    itself, not a fraction, at step index 0, 1, ….
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, betas, eps, weight_decay)
    results = []
    for t, rows in enumerate(steps):
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        summed, tokens = 0.0, 0
        for row in rows:
            nll, count = row_loss(model, row)
            for total, gradient in zip(gradients, torch.autograd.grad(nll, parameters), strict=True):
                total += gradient
            summed, tokens = summed + float(nll.detach()), tokens + count
        clipped, norm = clip([gradient / tokens for gradient in gradients], max_grad_norm)
        optimizer.step(clipped, lr_at(t))
        results.append(StepResult(summed / tokens, tokens, lr_at(t), norm))
    return results


# fmt: off
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on
"""NormalFloat's 16 levels by code, as printed in QLoRA (arXiv:2305.14314, appendix E)."""

FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
"""bitsandbytes' 4-bit float by code: a sign bit, two exponent bits, one mantissa bit. Codes 0 and 8 both mean 0."""


def nf4_quantiles() -> Tensor:
    """NF4's levels from their definition (QLoRA, section 3 and eq. 4), in float64.

    They are quantiles of N(0, 1), evenly spaced in probability: 8 levels above 0, 7 below, and 0 itself. Each side ends
    at the mean of 1 - 1/32 and 1 - 1/30. All are divided by the largest.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2

    def side(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(0.5, outermost, count + 1, dtype=torch.float64)[1:])

    above, below = side(8), -side(7).flip(0)
    return torch.cat([below, torch.zeros(1, dtype=torch.float64), above]) / above[-1]


def nf4_codes(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a weight to NF4. Return the codes (elements, uint8) and each block's absmax (blocks, float32)."""
    return _four_bit_codes(weight, NF4, blocksize)


def fp4_codes(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Like ``nf4_codes``, in FP4."""
    return _four_bit_codes(weight, FP4, blocksize)


def nf4_dequantize(codes: Tensor, absmax: Tensor, shape: Sequence[int], blocksize: int = 64) -> Tensor:
    """Dequantize NF4 codes to float32."""
    return _four_bit_dequantize(codes, absmax, NF4, blocksize).reshape(*shape)


def fp4_dequantize(codes: Tensor, absmax: Tensor, shape: Sequence[int], blocksize: int = 64) -> Tensor:
    """Dequantize FP4 codes to float32."""
    return _four_bit_dequantize(codes, absmax, FP4, blocksize).reshape(*shape)


def _four_bit_codes(weight: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise absmax quantization (QLoRA, eq. 1): the level nearest to w / absmax, and the lower one for a tie.

    Blocks are consecutive values in storage order; the last may be short. A block of zeros has absmax 0.
    """
    flat = weight.detach().float().flatten()
    blocks = pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * torch.where(absmax > 0, 1 / absmax, 0)[:, None]  # the kernels multiply, which rounds differently
    ascending, code = levels.unique(return_inverse=True)
    code_of = torch.empty(len(ascending), dtype=torch.uint8)
    code_of[code.flip(0)] = torch.arange(len(levels) - 1, -1, -1, dtype=torch.uint8)  # equal levels: the first code
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    nearest = (scaled[..., None] > midpoints).sum(dim=-1)
    return code_of[nearest].flatten()[: len(flat)], absmax


def _four_bit_dequantize(codes: Tensor, absmax: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    return levels[codes.long()] * absmax.repeat_interleave(blocksize)[: len(codes)]


def unpack_4bit(packed: Tensor) -> Tensor:
    """Unpack the codes from bytes of two codes each; the high four bits are the first."""
    flat = packed.flatten().view(torch.uint8)
    return torch.stack([flat >> 4, flat & 15], dim=1).flatten()


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise absmax quantization (LLM.int8(), arXiv:2208.07339, section 2.1): codes in ±127, each row's absmax."""
    values = weight.detach().float()
    absmax = values.abs().amax(dim=1)
    scale = torch.where(absmax > 0, 127 / absmax, 0)
    return torch.round(values * scale[:, None]).to(torch.int8), absmax


def int8_dequantize(codes: Tensor, absmax: Tensor) -> Tensor:
    """Dequantize INT8 codes to float32."""
    return codes.float() * (absmax / 127)[:, None]


def first_fit(sizes: Sequence[int], budget: int, most_open: int) -> list[list[int]]:
    """Pack rows (by index) into batches first-fit. Return the batches in the order in which they close.

    A row goes into the oldest open batch with room for it. A batch closes when not even the smallest row fits, or when
    it is the oldest of ``most_open`` and another must be opened. At the end, the rest close, oldest first.
    """
    batches: list[list[int]] = []  # in the order in which they are opened
    closed: list[int] = []

    def room(number: int) -> int:
        return budget - sum(sizes[row] for row in batches[number])

    for row, size in enumerate(sizes):
        still_open = [number for number in range(len(batches)) if number not in closed]
        fitting = [number for number in still_open if room(number) >= size]
        if not fitting:
            closed += still_open[: len(still_open) + 1 - most_open] if len(still_open) >= most_open else []
            fitting = [len(batches)]
            batches.append([])
        batches[fitting[0]].append(row)
        if room(fitting[0]) < min(sizes):
            closed.append(fitting[0])
    return [batches[number] for number in [*closed, *(n for n in range(len(batches)) if n not in closed)]]


def next_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Pack rows (by index) into batches in order; a row that does not fit opens the next batch."""
    batches: list[list[int]] = [[]]
    for row, size in enumerate(sizes):
        if sum(sizes[other] for other in batches[-1]) + size > budget:
            batches.append([])
        batches[-1].append(row)
    return [batch for batch in batches if batch]


def distance(found: Tensor, wanted: Tensor) -> float:
    """The relative error |found - wanted| / |wanted|."""
    return float((found - wanted).norm() / wanted.norm())
