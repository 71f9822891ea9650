"""The bench's own work in processes of its own, so that what measures holds no model and no CUDA context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.processes import ROOT, run, tail

PLACE = ROOT / ".bench"
MODELS = PLACE / "models"


def helper(module: str, told: dict[str, Any], folder: Path, env: dict[str, str], result: str) -> dict[str, Any]:
    """What one of the bench's own processes found out."""
    job = folder / f"{module}-job.json"
    job.write_text(json.dumps(told), encoding="utf-8")
    return run_helper(module, job, env, folder / result)


def prepared(
    shape: str, folder: Path, env: dict[str, str], max_length: int, rows: int, heldout_rows: int, models: Path = MODELS
) -> dict[str, Any]:
    """The model of this shape, kept for the next time, and so many rows: where they are, and what they hold."""
    told = {"shape": shape, "models": str(models), "folder": str(folder), "max_length": max_length}
    return helper("prepare", told | {"rows": rows, "heldout_rows": heldout_rows}, folder, env, "rows.json")


def run_helper(module: str, job: Path, env: dict[str, str], result: Path) -> dict[str, Any]:
    """Runs ``module`` on ``job`` and reads what it wrote."""
    log = job.with_suffix(".log")
    if run(["-m", f"bench.{module}", str(job)], env, log).exit_code:
        raise SystemExit(f"bench.{module} failed:\n{tail(log)}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
