"""The run's folder: what is in it, who may make it, and its metrics."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_cli.errors import Fault, UserError
from lora_cli.recipe.load import dump_recipe, load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.training.lock import check_unlocked
from lora_cli.weights.shards import check_writable

MAY_CHANGE = {
    "num_train_epochs",
    "max_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "on_nonfinite",
    "early_stopping_patience",
    "report_to",
    "output_dir",
}
"""Keys of ``training`` that a resumed run may set anew; any other would make it another run."""


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.info = self.root / "run.json"
        self.metrics = self.root / "metrics.jsonl"
        self.log = self.root / "train.log"
        self.checkpoints = self.root / "checkpoints"
        self.adapter = self.root / "adapter"
        self.report = self.root / "report.html"
        self.cache = self.root / "cache"

    @property
    def holds_run(self) -> bool:
        """Whether run.json is a run's: any folder may hold a recipe.yaml."""
        try:
            return {"started", "versions", "steps"} <= set(self.read_info())
        except UserError:
            return False

    def check(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        """Raises UserError when this folder may not take the run that is asked for; writes nothing."""
        if self.root.is_file():
            raise UserError("training.output_dir is a file", str(self.root), "choose another folder")
        start = recipe.adapter.init_from
        if start is not None and Path(start).resolve().is_relative_to(self.root.resolve()):
            hint = "copy that adapter elsewhere, or choose another training.output_dir"
            raise UserError("adapter.init_from lies in the folder that the run would write", start, hint)
        if self.holds_run:
            if resume:
                self._check_same(recipe)
            elif not overwrite:
                hint = "--resume goes on with it, --overwrite replaces it; or choose another training.output_dir"
                raise UserError("the folder already holds a run", str(self.root), hint)
        elif resume:
            raise UserError("there is no run to resume", str(self.root), "leave --resume out to begin one")
        elif self.root.is_dir() and any(path != self.cache or not path.is_dir() for path in self.root.iterdir()):
            raise UserError("the folder is not empty and holds no run", str(self.root), "choose another folder")
        check_writable(self.root)
        check_unlocked(self.root)

    def _check_same(self, recipe: Recipe) -> None:
        before, now = load_recipe(self.recipe).model_dump(), recipe.model_dump()
        changed = [
            (f"{section}.{key}" if isinstance(values, dict) else section, old, new)
            for section, values in now.items()
            for key, old, new in _changes(before[section], values)
            if not (section == "training" and key in MAY_CHANGE)
        ]
        if changed:
            hint = "set it back, or begin a new run in another folder"
            raise UserError(
                Fault(f"--resume: {key} was {old!r} and is now {new!r}", str(self.recipe), hint)
                for key, old, new in changed
            )

    def begin(self, recipe: Recipe, info: Mapping[str, Any]) -> None:
        """Make the folder for a new run, in place of the one it holds."""
        self.write_info(info)  # first: from here on the folder holds a run that can be resumed or replaced
        for path in (self.checkpoints, self.adapter):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.metrics, self.log, self.report):
            path.unlink(missing_ok=True)
        self.write_recipe(recipe)
        self.checkpoints.mkdir(exist_ok=True)

    def go_on(self, recipe: Recipe, info: Mapping[str, Any]) -> None:
        """Take the folder's run up again. Raises UserError when base or rows are not those it began with."""
        before = self.read_info()
        faults = [
            Fault(f"--resume: {what} changed since the run began", str(self.root), "restore it, or begin a new run")
            for what, old, new in (
                ("the base model's weights have", before.get("base"), info["base"]),
                ("the training rows have", before.get("data"), info["data"]),
                ("the validation rows have", before["data"].get("validation"), info["data"].get("validation")),
            )
            if old and new and old["fingerprint"] != new["fingerprint"]
        ]
        if faults:
            raise UserError(faults)
        self.write_info({**info, "started": before["started"]})
        self.write_recipe(recipe)

    def write_recipe(self, recipe: Recipe) -> None:
        write_whole(self.recipe, dump_recipe(recipe))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl; a process killed while writing leaves a part of one."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def cut_metrics(self, step: int) -> None:
        """Leave out what was measured after ``step``: the steps a resumed run will take again."""
        kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        write_whole(self.metrics, "".join(kept))

    def read_info(self) -> dict[str, Any]:
        """run.json. Raises UserError when it is missing or damaged."""
        try:
            info: Any = json.loads(self.info.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"not readable: {error}", str(self.info)) from error
        if not isinstance(info, dict):
            raise UserError("not a run's record", str(self.info))
        return info

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Replace run.json."""
        write_whole(self.info, json.dumps(info, indent=2, allow_nan=False) + "\n")


def _changes(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [(key, before.get(key), value) for key, value in now.items() if before.get(key) != value]
    return [] if before == now else [("", before, now)]


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content at once: a reader sees the old or the new, never a part."""
    draft = path.with_name(f".{path.name}.new")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def newest_finished(root: Path = Path("runs")) -> Path:
    """The run under ``root`` that finished last; what is not readable is passed over.

    Raises UserError when there is none.
    """
    finished = []
    for info in root.glob("*/run.json"):
        with suppress(UserError):
            when = RunFolder(info.parent).read_info().get("finished")
            if isinstance(when, str):
                finished.append((when, info.parent))
    if not finished:
        raise UserError(f"no finished run under {root}/", hint="name a run, an adapter or a model")
    return max(finished)[1]


def unfinished(target: Path, adapter: Path | None) -> str | None:
    """What to say of a run that has not finished, whose ``adapter`` is of an earlier end; None for all else.

    Raises UserError when the run has no adapter yet.
    """
    run = RunFolder(target)
    if not run.holds_run or run.read_info().get("finished"):
        return None
    go_on = f"lora train {run.recipe} --resume"
    if adapter is None:
        raise UserError("this run has not finished and has no adapter yet", str(target), f"{go_on} goes on with it")
    return f"{target}: this run has not finished; its adapter is of an earlier end ({go_on} goes on)"
