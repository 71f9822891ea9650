"""The C++ compiler that torch's own calls; apart from what it compiles, which is slow to import."""

from __future__ import annotations

import os
import shutil

from lora_cli.errors import UserError
from lora_cli.model.base import best_device
from lora_cli.recipe.schema import Recipe


def check_compiler(recipe: Recipe) -> None:
    """Raises UserError when the recipe wants something compiled, for a processor, and there is no compiler."""
    if recipe.training.torch_compile is True and best_device().type == "cpu" and not has_compiler():
        what = "training.torch_compile: needs a C++ compiler, and there is none"
        raise UserError(what, hint="install g++, or name another one in the environment's CXX; or leave it at auto")


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch's own calls."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
