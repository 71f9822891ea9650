"""Replace a frozen base's norms, gated MLPs and attention modules by those that keep less for the backward pass.

The new modules have the same names and weights. The results are the same, except that in 16 bits some are rounded at
another point.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_cli.model.fast_paths.formula import Formula
from lora_cli.model.fast_paths.gated_mlp import PROJECTIONS, GatedMLP
from lora_cli.model.fast_paths.rms_norm import RMS_NORM, FrozenRMSNorm, RMSNormFunction
from lora_cli.model.fast_paths.rotary import fused_replacement, rotary_dim
from lora_cli.model.fast_paths.swiglu import SWIGLU, SwiGLU
from lora_cli.model.trial import FORWARD_ERRORS


def fuse(model: PreTrainedModel) -> None:
    """Replace, in place, those norms, MLPs and attention modules of a frozen base whose own forward pass gives the same
    results as the modules of ``rms_norm``, ``gated_mlp`` and ``rotary``."""
    width = None if model.config._attn_implementation == "eager" else rotary_dim(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and _is_norm(module):
            model.set_submodule(name, FrozenRMSNorm(cast("nn.Parameter", module.weight), _eps(module)))
        elif {each for each, _ in module.named_children()} >= set(PROJECTIONS) and _is_gated(module):
            model.set_submodule(name, GatedMLP(*(module.get_submodule(each) for each in PROJECTIONS)))
        elif width is not None and (attention := fused_replacement(module, width)) is not None:
            model.set_submodule(name, attention)


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
