"""RMS norms and gated MLPs, each as one autograd function that keeps about as much as its inputs for the backward pass.

They replace Transformers' own modules, with the same names and weights. The results are the same, except that in 16
bits some are rounded at another point.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lora_cli.model.fast_paths.fused_lora import Fused, apply_layers
from lora_cli.model.fast_paths.norm_inputs import normed
from lora_cli.model.fast_paths.rotary import fused_replacement, rotary_dim
from lora_cli.model.fast_paths.swiglu import SWIGLU, Formula, SwiGLU, flatten_detached
from lora_cli.model.trial import FORWARD_ERRORS

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def rms_norm_and_inverse(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y = w x / sqrt(mean(x^2) + eps) (RMSNorm, arXiv:1910.07467, equation 4) and the inverse root, (n, 1).

    x (n, width), w (width). Computed in float32 and rounded to x's dtype before the product with w, as in Llama.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    own = None if wide is x else wide  # may be overwritten
    return torch.mul(wide, inverse, out=own).to(x.dtype) * weight, inverse


def rms_norm_backward(x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss w.r.t. ``rms_norm_and_inverse``'s x, from ``grad`` w.r.t. its y.

    Uses layer norm's kernel with a mean of 0. The kernel subtracts inverse * mean(w grad), the gradient through layer
    norm's mean; this term is added back.
    """
    dtype = torch.promote_types(x.dtype, grad.dtype)
    g, w = grad.to(dtype), weight.to(inverse.dtype)
    centred: torch.Tensor = torch.ops.aten.native_layer_norm_backward(
        g, x.to(dtype), w.shape, torch.zeros_like(inverse), inverse, w, None, (True, False, False)
    )[0]
    means = (g @ weight.to(dtype)).unsqueeze(-1).mul(inverse).div_(len(weight))
    return (centred + means.to(dtype)).to(x.dtype)


RMS_NORM = Formula(rms_norm_and_inverse, rms_norm_backward)


class RMSNormFunction(torch.autograd.Function):
    """y of ``rms_norm_and_inverse`` for x (…, width) and a frozen w: (n, width), no view, which can be modified in
    place."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, formula: Formula = RMS_NORM
    ) -> torch.Tensor:
        y, inverse = formula.forward(flatten_detached(x), weight.detach(), eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.formula = formula
        return cast("torch.Tensor", y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad_x = ctx.formula.backward(flatten_detached(x), weight.detach(), inverse, grad.detach())
        return grad_x.reshape(x.shape), None, None, None


class FrozenRMSNorm(nn.Module):
    """An RMS norm with a frozen weight."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.formula = RMS_NORM

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if x.is_cuda and x.dtype == self.weight.dtype:
                return normed(x, self.weight, self.eps)  # one kernel each way
            y = RMSNormFunction.apply(x, self.weight, self.eps, self.formula)  # type: ignore[no-untyped-call]
            return cast("torch.Tensor", y).view(x.shape)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with the layers of the module that it replaces.

    More than ``chunk_tokens`` tokens, if set, are computed in parts; the backward pass recomputes each part.
    """

    chunk_tokens: int | None = None

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.formula = SWIGLU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if self.chunk_tokens is not None and len(rows) > self.chunk_tokens:
            # Call the module itself, so that its hooks, which may load and free weights, run for each part.
            parts = (checkpoint(self, part, use_reentrant=False) for part in torch.split(rows, self.chunk_tokens))
            return torch.cat(list(parts)).view(x.shape)
        gate, up = apply_layers((self.gate_proj, self.up_proj), x)
        if gate.is_cuda and isinstance(self.down_proj, Fused):  # a CPU takes too long to compute the product twice
            return cast("torch.Tensor", self.down_proj(up, gate=gate))
        with torch.autocast(gate.device.type, enabled=False):  # only the compiler would act on it here
            product = SwiGLU.apply(gate, up, self.formula).view(up.shape)  # type: ignore[no-untyped-call]
        del gate, up
        return cast("torch.Tensor", self.down_proj(product))


def fuse(model: PreTrainedModel) -> None:
    """Replace, in place, those norms, MLPs and attention modules of a frozen base whose own forward pass gives the same
    results as the modules here and in ``rotary``."""
    width = None if model.config._attn_implementation == "eager" else rotary_dim(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and _is_norm(module):
            model.set_submodule(name, FrozenRMSNorm(cast("nn.Parameter", module.weight), _eps(module)))
        elif {each for each, _ in module.named_children()} >= set(PROJECTIONS) and _is_gated(module):
            model.set_submodule(name, GatedMLP(*(module.get_submodule(each) for each in PROJECTIONS)))
        elif width is not None and (attention := fused_replacement(module, width)) is not None:
            model.set_submodule(name, attention)


def chunk_mlps(model: nn.Module, chunk_tokens: int) -> None:
    """Make the gated MLPs that ``fuse`` has inserted compute ``chunk_tokens`` tokens at a time. On long rows, an MLP's
    activations take several times the memory of the rest of its layer."""
    for module in model.modules():
        if isinstance(module, GatedMLP):
            module.chunk_tokens = chunk_tokens


def elementwise_values_per_token(model: nn.Module) -> int:
    """How many values per token go through the norms and gates of ``fuse``; a norm over each head counts one head."""
    norms = (each.weight.numel() for each in model.modules() if isinstance(each, FrozenRMSNorm))
    gates = (cast("int", each.gate_proj.out_features) for each in model.modules() if isinstance(each, GatedMLP))
    return sum(norms) + sum(gates)


def compile_formulas(model: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Compile each formula of the model's norms and gates to one loop, for inputs of ``dtype``. Results differ only in
    rounding. Raises the compiler's errors, and then leaves the model unchanged.

    The compiler's files, which include pickles, go into ``folder`` and are not needed later. Inputs that the compiled
    loops do not serve, such as a single vector, are computed as before.
    """
    from accelerate.utils import patch_environment

    options: dict[str, Any] = {
        "cpp_cache_precompile_headers": False,  # 150 MB, and no faster for so few formulas
        "cpp.vec_isa_ok": True,  # else it test-compiles for the vector units, with all of ATen's headers: 7 s
    }
    with patch_environment(TORCHDYNAMO_DISABLE="0", TORCHINDUCTOR_CACHE_DIR=str(folder)):  # the CLI disables it
        torch.compiler.set_stance("default")
        compiled = {
            formula: Formula(
                *(torch.compile(each, dynamic=True, options=options) for each in (formula.forward, formula.backward))
            )
            for formula in (RMS_NORM, SWIGLU)
        }
        x, y = (torch.ones(64, 256, dtype=dtype, requires_grad=True) for _ in range(2))
        results = (
            RMSNormFunction.apply(x, torch.ones(256, dtype=dtype), 1e-6, compiled[RMS_NORM]),  # type: ignore[no-untyped-call]
            SwiGLU.apply(x, y, compiled[SWIGLU]),  # type: ignore[no-untyped-call]
        )
        for result in results:  # each function is compiled when it is first called
            result.backward(torch.ones_like(result))
    torch.compiler.set_stance("eager_on_recompile")
    for module in model.modules():
        if isinstance(module, FrozenRMSNorm | GatedMLP):
            module.formula = compiled[module.formula]


def _eps(norm: nn.Module) -> float:
    names = ("variance_epsilon", "eps")
    return next((float(found) for name in names if isinstance(found := getattr(norm, name, None), float)), 0.0)


def _is_norm(module: nn.Module) -> bool:
    """Whether the module's forward pass equals that of ``FrozenRMSNorm``. The input is so small that eps matters, and
    the weight has many values, so that a different use of either shows."""
    weight, eps = torch.linspace(-1, 2, 16), _eps(module)
    stand_in = SimpleNamespace(weight=weight, variance_epsilon=eps, eps=eps)
    x = 1e-3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    wanted = RMSNormFunction.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return {each for each, _ in module.named_parameters()} == {"weight"} and _agrees(module, stand_in, x, wanted)


def _is_gated(module: nn.Module) -> bool:
    """Whether the module's forward pass equals that of ``GatedMLP``, tested with layers that multiply by 2, 3 and 5."""
    layers = dict(zip(PROJECTIONS, (lambda x: 2 * x, lambda x: 3 * x, lambda x: 5 * x), strict=True))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    stand_in = SimpleNamespace(act_fn=getattr(module, "act_fn", None), **layers)
    return _agrees(module, stand_in, x, 5 * SwiGLU.apply(2 * x, 3 * x))  # type: ignore[no-untyped-call]


def _agrees(module: nn.Module, stand_in: SimpleNamespace, x: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the forward pass of the module's class, with ``stand_in`` as ``self``, returns ``wanted``."""
    try:
        found = type(module).forward(cast("Any", stand_in), x)
    except FORWARD_ERRORS:
        return False
    return isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5)
