"""The run's folder: its files, whether a run may use it, and its metrics."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lora_cli.errors import Fault, RunError, UserError, writing
from lora_cli.recipe.load import dump_recipe, load_recipe, with_changes
from lora_cli.recipe.schema import Positive, Recipe, Rows
from lora_cli.system.disk import sync
from lora_cli.system.folders import check_writable, clear_drafts, entries, mark_for_removal
from lora_cli.training.distributed.launch_environment import process_count
from lora_cli.training.run.lock import FolderLock, check_unlocked, locked
from lora_cli.training.run.same_run import MAY_CHANGE_TOGETHER, changed_keys, check_same_keys

RESTORE = "restore it from a copy, or remove the run's folder and start again"


class _Data(BaseModel):
    validation: dict[str, Any] = {}


class _Record(BaseModel, strict=True):
    """The values in run.json that are read again; there are others."""

    started: str = ""
    versions: dict[str, Any] = {}
    dtype: str = ""
    steps: Positive = 1
    processes: Positive = 1
    per_device_train_batch_size: Rows = 1
    gradient_accumulation_steps: Rows = 1
    base: dict[str, Any] = {}
    init_from: dict[str, Any] = {}
    data: _Data = _Data()
    cache_frozen: dict[str, Any] = {}


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
        self._held: FolderLock | None = None
        self._checked: tuple[int, int] | None = None

    @property
    def holds_run(self) -> bool:
        """Whether run.json is a run's; any folder may hold a recipe.yaml. Raises OSError when it cannot be read now."""
        try:
            return {"started", "versions", "steps"} <= set(self.read_info())
        except UserError:
            return False

    @property
    def is_begun(self) -> bool:
        """Whether there is a run to continue: its recipe is the last file that ``begin`` writes."""
        return self.holds_run and self.recipe.is_file()

    @property
    def _has_lost_its_recipe(self) -> bool:
        """Whether a run's weights are here without its recipe, and not because ``begin`` was killed."""
        return self.holds_run and not self.recipe.exists() and self._has_weights and not _draft(self.recipe).exists()

    @property
    def _has_weights(self) -> bool:
        """Whether there is an adapter or a checkpoint. Raises OSError when the folder cannot be listed."""
        return self.adapter.exists() or any(path.name.startswith("step-") for path in entries(self.checkpoints))

    def check(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        """Raises UserError when the requested run cannot use this folder; writes nothing."""
        self._checked = self._stamp()
        if self.root.is_file():
            raise UserError("training.output_dir is a file", str(self.root), "choose another folder")
        check_writable(self.root)
        start = recipe.adapter.init_from
        if start is not None and Path(start).resolve().is_relative_to(self.root.resolve()):
            hint = "copy that adapter elsewhere, or choose another training.output_dir"
            raise UserError("adapter.init_from is inside training.output_dir", start, hint)
        self._check_run(recipe, resume, overwrite)
        self._check_files(resume)
        check_unlocked(self.root)

    def _check_run(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        """Raises UserError when the run that the folder holds, or the lack of one, does not allow the requested run."""
        if resume and self.info.exists():
            self.read_info()
            self.read_metrics()
        if self.is_begun and resume:
            began_on = int(self.read_info().get("processes", 1))
            check_same_keys(self.read_recipe(), began_on, recipe, process_count(), str(self.recipe))
        elif self._has_lost_its_recipe and resume:
            hint = "restore it from a copy, or replace the run with --overwrite"
            raise UserError("--resume: the run's recipe.yaml is missing", str(self.recipe), hint)
        elif self.holds_run and not resume and not overwrite:
            hint = "--resume continues it, --overwrite replaces it; or choose another training.output_dir"
            raise UserError("the folder already holds a run", str(self.root), hint)
        elif not self.root.is_dir() and resume:
            raise UserError("there is no run to resume", str(self.root), "start one without --resume")
        elif not self.holds_run and self.root.is_dir():
            # What a run may leave behind when it is killed before its folder held one.
            leftovers = {_draft(self.recipe), _draft(self.info)} | ({self.cache} if self.cache.is_dir() else set())
            if not set(self.root.iterdir()) <= leftovers:
                raise UserError("the folder is not empty and holds no run", str(self.root), "choose another folder")

    def _check_files(self, resume: bool) -> None:
        """Raises UserError when a file or folder that the run would write or replace is not one that it may."""
        replaced = (self.adapter, *self.checkpoints.glob("step-????????"))
        for path in (self.checkpoints, *replaced):
            if path.exists() and not path.is_dir():
                raise UserError("a file is in the place of a folder of the run", str(path), "move it elsewhere")
            check_writable(path)
        continued = (*replaced, self.metrics, self.log) if resume else ()  # --overwrite removes them, links too
        for path in (_draft(self.recipe), _draft(self.info), *continued):
            if path.is_symlink():
                what = "a symbolic link, and what it leads to would be replaced or added to"
                raise UserError(what, str(path), "remove it, or put the folder or file itself in its place")
        for path in (self.metrics, self.log) if resume else ():
            if path.exists() and not os.access(path, os.W_OK):
                raise UserError("no permission to write", str(path), "choose another training.output_dir")

    @contextmanager
    def hold(self) -> Iterator[FolderLock]:
        """Hold the folder's lock while the block runs; only the process that holds it writes.

        Raises UserError while another run holds it, or when one has used the folder since ``check``, which is then out
        of date.
        """
        with locked(self.root) as held:
            self._held = held
            if self._stamp() != self._checked:
                hint = "start again: --resume continues it, --overwrite replaces it"
                raise UserError("another run has used this folder meanwhile", str(self.root), hint)
            yield held

    def _stamp(self) -> tuple[int, int] | None:
        """Return inode and modification time (ns) of run.json; None if it is missing."""
        try:
            found = self.info.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def check_held(self) -> None:
        """Raises RunError when this is no longer the folder that this process holds; only that process writes."""
        if self._held is not None:
            self._held.check()

    def check_same_content(self, base: str, start: str | None, data: str, validation: str | None) -> None:
        """Raises UserError when the fingerprints of base, starting adapter or rows differ from those the run began
        with."""
        before = self.read_info()
        known = before.get("data") or {}
        faults = [
            Fault(f"--resume: {what} changed since the run began", str(self.root), "restore it, or begin a new run")
            for what, record, new in (
                ("the base model's weights or config.json have", before.get("base"), base),
                ("the adapter of init_from has", before.get("init_from"), start),
                ("the training rows have", known, data),
                ("the validation rows have", known.get("validation"), validation),
            )
            if record and new and record.get("fingerprint") != new
        ]
        if faults:
            raise UserError(faults)

    def check_same_dtype(self, dtype: str) -> None:
        """Raises UserError when the run did not begin in ``dtype``, which model.dtype resolves to here."""
        began = self.read_info().get("dtype", dtype)
        if began != dtype:
            what = f"--resume: the run began in {began}, but would continue in {dtype}"
            raise UserError(what, str(self.root), f"set model.dtype={began} to continue as it began")

    def begin(self, recipe: Recipe, info: Mapping[str, Any], overwrite: bool) -> None:
        """Prepare the folder for a new run; with ``overwrite``, replace the run that it holds.

        If this is killed, ``--resume`` never mixes the two: it continues the former run, still complete, or begins the
        new one, which a draft of the missing recipe marks. Raises RunError if the folder holds a run's weights and
        neither ``overwrite`` nor such a draft allows their removal.
        """
        was_killed = _draft(self.recipe).exists() and not self.recipe.exists()
        self._clear_drafts()
        if not overwrite and not was_killed and self._has_weights:
            hint = "--resume continues it, --overwrite replaces it"
            raise RunError("the folder already holds a run's weights; nothing was removed", str(self.root), hint)
        _draft(self.recipe).touch()
        self.recipe.unlink(missing_ok=True)
        self.write_info(info)  # from here on the folder holds a run, which may be replaced
        for path in (self.adapter, self.checkpoints):
            if path.exists():
                mark_for_removal(path)
        clear_drafts(self.root)
        for path in (self.metrics, self.log, self.report):
            path.unlink(missing_ok=True)
        self.checkpoints.mkdir()
        self.write_recipe(recipe)

    def continue_run(self, recipe: Recipe, info: Mapping[str, Any]) -> list[str]:
        """Continue the folder's run. Returns messages about the changes to its recipe."""
        changes = changed_keys(self.read_recipe(), recipe)
        self._clear_drafts()
        self.write_info(info)
        self.write_recipe(recipe)
        return list(changes.values())

    def _clear_drafts(self) -> None:
        """Remove what a killed process was writing."""
        for folder in (self.root, self.checkpoints):
            clear_drafts(folder)
        drafts = {_draft(path) for path in (self.info, self.metrics, self.report)}
        for draft in drafts | ({_draft(self.recipe)} if self.recipe.exists() else set()):
            draft.unlink(missing_ok=True)

    def read_recipe(self) -> Recipe:
        """Return the run's recipe: recipe.yaml with the batch sizes of run.json, which is written together with the
        number of processes. The two files may differ when ``continue_run`` was killed between writing them."""
        info = self.read_info()
        batches = {key: info.get(key.removeprefix("training."), 0) for key in MAY_CHANGE_TOGETHER}
        return with_changes(load_recipe(self.recipe), {key: number for key, number in batches.items() if number > 0})

    def write_recipe(self, recipe: Recipe) -> None:
        write_atomic(self.recipe, dump_recipe(recipe))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl. Raises RunError when it cannot be written."""
        self.check_held()
        text = json.dumps(line, allow_nan=False) + "\n"
        with writing(self.metrics, len(text)), self.metrics.open("a", encoding="utf-8") as file:
            file.write(text)

    def sync_metrics(self) -> None:
        """Make the lines written so far, and the file's name, survive a crash of the machine."""
        if self.metrics.exists():
            sync(self.metrics)
            sync(self.root)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return every complete line of metrics.jsonl; a process killed while writing leaves an incomplete one.

        Raises UserError for a line that is not a run's.
        """
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_bytes().split(b"\n")[:-1]
        while lines and b"\0" in lines[-1]:  # a loss of power may leave these
            lines.pop()
        return [_metrics_line(line, f"{self.metrics}:{number}") for number, line in enumerate(lines, 1)]

    def cut_metrics(self, step: int, evaluated_step: int) -> None:
        """Remove the training and evaluation lines after these steps: a resumed run measures them again."""
        last = {"train": step, "validation": evaluated_step}
        kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= last[line["split"]]]
        write_atomic(self.metrics, "".join(kept))

    def read_info(self) -> dict[str, Any]:
        """Return run.json. Raises UserError when it is missing or damaged, and OSError for a read error, which may be
        temporary: to take the run for missing would start it over."""
        try:
            info: Any = json.loads(self.info.read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError) as error:
            raise UserError(f"not readable: {error}", str(self.info), RESTORE) from error
        try:
            _Record.model_validate(info)
        except ValidationError as error:
            keys = ", ".join(".".join(map(str, each["loc"])) for each in error.errors())
            what = f"not a run's record{keys and f': wrong value of {keys}'}"
            raise UserError(what, str(self.info), RESTORE) from error
        return dict(info)

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Replace run.json. Raises RunError when it cannot be written."""
        self.check_held()
        write_atomic(self.info, json.dumps(info, indent=2, allow_nan=False) + "\n")


def _metrics_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        read: Any = json.loads(line)
    except (ValueError, RecursionError):
        read = None
    match read:  # checks only what is read again
        case {"step": int(), "split": "train", "loss": float() | None as loss, "learning_rate": float() as rate}:
            numbers = [loss or 0.0, rate]
        case {"step": int(), "split": "validation", "loss": float() as loss}:
            numbers = [loss]
        case _:
            numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError("not a metrics line", where, "remove that line")
    return dict(read)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content atomically: a reader sees the old content or the new, never a part.

    Raises RunError when it cannot be written.
    """
    with writing(path, len(text.encode())):
        _draft(path).write_text(text, encoding="utf-8")
        sync(_draft(path))
        _draft(path).replace(path)
        sync(path.parent)


def newest_finished() -> Path:
    """Return the run under runs/ that finished last; unreadable ones are skipped.

    Raises UserError when there is none.
    """
    finished = []
    for info in Path("runs").glob("*/run.json"):
        with suppress(UserError, OSError):
            when = RunFolder(info.parent).read_info().get("finished")
            if isinstance(when, str):
                finished.append((when, info.parent))
    if not finished:
        raise UserError("no finished run under runs/", hint="give a run, an adapter or a model")
    return max(finished)[1]


def unfinished(target: Path, adapter: Path | None) -> str | None:
    """Return a warning for an unfinished run with an ``adapter`` from before it was resumed; None for all else.

    Raises UserError when the run has no adapter yet.
    """
    run = RunFolder(target)
    if not run.holds_run or run.read_info().get("finished"):
        return None
    go_on = f"lora train {run.recipe} --resume"
    if adapter is None:
        raise UserError("this run has not finished and has no adapter yet", str(target), f"{go_on} continues it")
    return f"{target}: this run has not finished; its adapter is from before it was resumed ({go_on} continues it)"
