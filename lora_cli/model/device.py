"""The device to compute on, and the dtypes that it computes in."""

from __future__ import annotations

from functools import lru_cache

import torch

from lora_cli.errors import UserError
from lora_cli.recipe.schema import Quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_usable(device: torch.device) -> bool:
    """Whether it is the CPU, or a GPU that this machine has."""
    if device.type != "cuda":
        return device.type == "cpu"
    return (device.index or 0) < torch.cuda.device_count()


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``model.dtype`` as a torch dtype. Raises UserError for float16 off the GPU, where there is no loss scaling."""
    if dtype == "auto":
        return torch.bfloat16 if has_units_for(torch.bfloat16, device) else torch.float32
    if dtype == "float16" and device.type != "cuda":
        raise UserError("model.dtype: float16 trains on a GPU only", hint="use bfloat16 or float32")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as a recipe and config.json have it, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def has_units_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of this type in hardware.

    A CPU without AMX or AVX512 units emulates 16 bits: 7 to 250 times slower than float32, and less exact. GPUs before
    Ampere, such as the T4, have no units for bfloat16.
    """
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    units = ("avx512_bf16", "amx_bf16", "bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16", "fp16")
    return any(torch.cpu.get_capabilities().get(unit) for unit in units)


def resolve_compute_dtype(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``quantization.compute_dtype`` as a torch dtype. On a device without units for it, this is the model's ``dtype``
    or, if it has no units for that either, float32."""
    dtypes = DTYPES[quantization.compute_dtype], dtype
    return next((each for each in dtypes if has_units_for(each, device)), torch.float32)


@lru_cache
def is_from_ampere_on(device: torch.device) -> bool:
    """Whether this GPU is newer than a T4 or a V100, which have no FlashAttention and no units for bfloat16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
