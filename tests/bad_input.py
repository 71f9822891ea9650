"""The classes and the decorator that define cases of wrong input; ``tests/test_bad_input.py`` runs the cases."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Arguments = list[str | Path]
ROW = {"question": "Why?", "answer": " Because."}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@dataclass
class World:
    """The folder of a case: a case writes the files that it needs there, then returns the command's arguments."""

    root: Path
    gpt2: Path
    llama: Path
    write_recipe: Callable[..., Path]
    trained: Callable[[], Path]

    def file(self, name: str, content: str | bytes) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> str:
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def model(self, kind: str = "gpt2", name: str = "model") -> Path:
        """Copy a tiny model, to be damaged."""
        shutil.copytree(getattr(self, kind), self.root / name)
        return Path(name)

    def run(self) -> Path:
        """Copy a finished run and its base, to be damaged: run/ and base/."""
        home = self.trained()
        for part in ("base", "run"):
            shutil.copytree(home / part, self.root / part)
        for path in self.root.glob("run/**/*"):
            if path.suffix in (".json", ".yaml"):
                path.write_text(path.read_text().replace(str(home), str(self.root)))
        return Path("run")

    def train(self, changes: dict[str, Any] | None = None, *arguments: str, data: str | None = None) -> Arguments:
        changes = dict(changes or {})
        if data is not None:
            changes["data.train"] = data
        changes.setdefault("model.name_or_path", self.gpt2)
        return ["train", self.write_recipe(changes), *arguments]

    def edit_json(self, path: str | Path, **changes: Any) -> None:
        file = self.root / path
        content = json.loads(file.read_text())
        for key, value in changes.items():
            content.pop(key, None)
            if value is not ...:
                content[key] = value
        file.write_text(json.dumps(content))

    def tensors(self, path: str | Path, change: Callable[[dict[str, Any]], None]) -> None:
        """Rewrite a safetensors file with its tensors as modified by ``change``."""
        from safetensors.torch import load_file, save_file

        tensors = load_file(self.root / path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.root / path, {"format": "pt"})

    def truncate(self, path: str | Path, keep: float = 0.5) -> None:
        os.truncate(self.root / path, int((self.root / path).stat().st_size * keep))


@dataclass(frozen=True)
class Case:
    """A wrong input. ``arguments`` sets it up and returns the command line; stderr must contain each of ``says``."""

    name: str
    arguments: Callable[[World], Arguments]
    says: tuple[str, ...]
    loads: bool = False


def case(*says: str, loads: bool = False) -> Callable[[Callable[[World], Arguments]], Case]:
    """Turn a function into a case with its name. With ``loads``, weights may be loaded before the fault is found."""

    def make(arguments: Callable[[World], Arguments]) -> Case:
        return Case(arguments.__name__, arguments, says, loads)

    return make
