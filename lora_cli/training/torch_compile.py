"""``training.torch_compile``: whether torch's compiler can run here, and saves more time than it takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from lora_cli.display import Display
from lora_cli.errors import UserError, first_line
from lora_cli.model.device import best_device
from lora_cli.recipe.schema import Recipe
from lora_cli.system.folders import draft_folder

SAVED = 1.2e-9
"""Seconds of one thread that compiling saves per element of a formula, forward and backward: measured on a Xeon with
AVX512 (37 ms in 16 bits, 28 ms in float32, in a step with 29 million elements)."""
COST = 20
"""Approximate seconds that compiling takes: 12 on that Xeon."""


def compile_elementwise(
    model: torch.nn.Module, recipe: Recipe, dtype: torch.dtype, device: torch.device, tokens: float, display: Display
) -> None:
    """Compile the formulas of norms and gates if the recipe says so or, for auto, if this saves twice its cost in a run
    in which this process handles ``tokens`` tokens.

    For CPUs: a GPU has its own kernels for them. If compiling fails, the run continues without it.
    """
    from lora_cli.model.fast_paths.fuse import compile_formulas, elementwise_values_per_token  # imports PEFT

    wanted = recipe.training.torch_compile
    numbers = tokens * elementwise_values_per_token(model) if device.type == "cpu" else 0
    saved = SAVED * numbers / torch.get_num_threads()
    if wanted is False or (wanted == "auto" and saved < 2 * COST):
        return
    setting = f"training.torch_compile: {str(wanted).lower()}"
    if not saved:
        why = "there are no fused RMS norms or SiLU gates" if device.type == "cpu" else "it is for CPUs"
        display.note(f"{setting} -> false: {why}", warning=True)
        return
    saves = f"saves about {saved:.0f} s of this run"
    if not has_compiler():
        display.note(f"{setting} -> false: there is no C++ compiler; one {saves}", warning=True)
        return
    display.note(f"{setting}: compiling norms and gates, which {saves}")
    try:
        with draft_folder(Path(tempfile.gettempdir(), "lora-compiles")) as folder:
            compile_formulas(model, dtype, folder)
    except Exception as error:  # of any kind: the run continues without it
        display.note(f"{setting} -> false: it failed: {first_line(error)}", warning=True)


def check_compiler(recipe: Recipe) -> None:
    """Raises UserError when the recipe requires compiling on a CPU and there is no compiler."""
    if recipe.training.torch_compile is True and best_device().type == "cpu" and not has_compiler():
        what = "training.torch_compile: needs a C++ compiler, and there is none"
        raise UserError(what, hint="install g++, or name another one in the environment's CXX; or leave it at auto")


def has_compiler() -> bool:
    """Whether the C++ compiler that torch calls is installed."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
