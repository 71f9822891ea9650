"""The chip, package versions, and the speed of matmuls with a model's shapes; ``python -m bench.machine job.json``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from bench.processes import gpu_number

PACKAGES = (
    "lora-cli",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "trl",
    "liger-kernel",
)
BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")
ROUNDS = 5


def versions() -> dict[str, str]:
    """The versions of Python and of the installed PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(threads: int) -> dict[str, Any]:
    """Describe the machine. ``load`` is the last minute's load average, including other processes."""
    return {
        "chip": _chip(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }


def gpu_name() -> str:
    """The GPU's name and total memory, from nvidia-smi."""
    command = ["nvidia-smi", f"--id={gpu_number()}", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _chip() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main(job: str) -> None:
    """Write ceiling.json: whether the chip has bfloat16 units, and the model's ``ceiling`` in each dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = json.loads(Path(job).read_text(encoding="utf-8"))
    gpu = torch.cuda.is_available()
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = gpu or any(capabilities.get(unit) for unit in BF16_UNITS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments["model"]))
    layers: dict[tuple[int, int], int] = {}
    for module in model.modules():  # linear layers and GPT-2's Conv1D, including a tied head
        if type(module).__name__ in ("Linear", "Conv1D"):
            wide, out = sorted(module.weight.shape)
            layers[wide, out] = layers.get((wide, out), 0) + 1
    dtypes = ["float32", "bfloat16"] if has_bf16 else ["float32"]
    ceilings = {
        name: ceiling(layers, arguments["tokens"], getattr(torch, name), "cuda" if gpu else "cpu") for name in dtypes
    }
    parameters = sum(wide * out * count for (wide, out), count in layers.items())
    found = {
        "bf16_units": has_bf16,
        "matmul_parameters": parameters,
        "flop_per_token": 4 * parameters,
        "ceilings": ceilings,
    }
    (Path(arguments["folder"]) / "ceiling.json").write_text(json.dumps(found), encoding="utf-8")


def ceiling(layers: dict[tuple[int, int], int], tokens: int, dtype: Any, device: str) -> dict[str, float]:
    """Time each layer's forward and input-gradient matmuls on a step's tokens: the least that LoRA has to compute.

    ``tokens_per_second`` is the rate if nothing else took time. Each direction takes 2 FLOP per weight and token: 4N.
    """
    import torch

    seconds = flop = 0.0
    for (wide, out), count in layers.items():
        x, weight = (torch.randn(shape, dtype=dtype, device=device) for shape in ((tokens, wide), (wide, out)))
        y = x @ weight
        times = []
        for _ in range(ROUNDS):
            _wait(device)
            start = time.perf_counter()
            x @ weight
            y @ weight.T
            _wait(device)
            times.append(time.perf_counter() - start)
        seconds += min(times) * count
        flop += 4 * wide * out * tokens * count
    return {"tflops": flop / seconds / 1e12, "tokens_per_second": tokens / seconds}


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
