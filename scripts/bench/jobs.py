"""Run the bench's own work in separate processes, so that the measuring process holds no model or CUDA context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.processes import ROOT, run, tail

BENCH_FOLDER = ROOT / ".bench"
MODELS = BENCH_FOLDER / "models"


def run_job(module: str, arguments: dict[str, Any], folder: Path, env: dict[str, str], result: str) -> dict[str, Any]:
    """Write ``arguments`` to a job file, run ``bench.<module>`` on it, and return what it wrote to ``result``."""
    job = folder / f"{module}-job.json"
    job.write_text(json.dumps(arguments), encoding="utf-8")
    return run_module(module, job, env, folder / result)


def prepare_rows(
    shape: str, folder: Path, env: dict[str, str], max_length: int, rows: int, heldout_rows: int, models: Path = MODELS
) -> dict[str, Any]:
    """Make rows and, if it is not in ``models`` yet, the model of this shape. Return their paths and counts."""
    arguments = {"shape": shape, "models": str(models), "folder": str(folder), "max_length": max_length}
    return run_job("prepare", arguments | {"rows": rows, "heldout_rows": heldout_rows}, folder, env, "rows.json")


def run_module(module: str, job: Path, env: dict[str, str], result: Path) -> dict[str, Any]:
    """Run ``bench.<module>`` on ``job`` and return what it wrote to ``result``. Raises SystemExit when it fails."""
    log = job.with_suffix(".log")
    if run(["-m", f"bench.{module}", str(job)], env, log).exit_code:
        raise SystemExit(f"bench.{module} failed:\n{tail(log)}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
