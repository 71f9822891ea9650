"""Secrets of the environment are in no file and no output, and no text of the user's becomes markup in a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import done

from lora_cli.errors import UserError
from lora_cli.recipe.load import load_recipe

NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
SECRETS = {name: f"secret-value-of-{number}" for number, name in enumerate(NAMES)}
FOREIGN = "<script>alert(1)<|script>"  # a valid file name


@pytest.mark.parametrize(
    ("change", "exit_code"),
    [("adapter.r=2", 0), ("adapter.r=0", 2), ("model.name_or_path=some/model", 2), ("training.learning_rate=1e30", 3)],
)
def test_secrets_of_the_environment_are_written_nowhere(
    change: str, exit_code: int, write_recipe: Any, lora_process: Any, tmp_path: Path
) -> None:
    recipe = write_recipe({"training.max_steps": 2, "training.report_to": ["tensorboard"], "data.validation": 0.25})
    places = {name: str(tmp_path / name.lower()) for name in ("HF_HOME", "TMPDIR", "XDG_CACHE_HOME")}
    (tmp_path / "tmpdir").mkdir()
    result = lora_process("train", recipe, change, "--debug", env=SECRETS | places, cwd=tmp_path)
    assert result.exit_code == exit_code, result.stderr
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > (10 if exit_code == 0 else 1)
    for content in (*written, result.stdout.encode(), result.stderr.encode()):
        assert not any(secret.encode() in content for secret in SECRETS.values())


SECRET_NAMES = ("MY_PASS", "GITHUB_PAT", "NPM_AUTH", "DB_PWD", "DBPASSWORD", "AWS_CREDENTIALS", "OPENAI_APIKEY", "JWT")
SECRET_NAMES += ("CLIENTSECRET", "my_pass", "PASS_OF_MINE", "SESSION_COOKIE", "HF_TOKEN", "KEY", "PRIVATE_KEY_OF_MINE")
OTHER_NAMES = ("PATH", "PWD", "OLDPWD", "COMPASS", "PATTERN", "AUTHOR", "MONKEY", "KEYBOARD", "MAX_TOKENS", "PASSES")
OTHER_NAMES += ("TOKENIZER", "XAUTHORITY", "DATA_PATH", "PASSENGER_DATA")


@pytest.mark.parametrize("name", SECRET_NAMES + OTHER_NAMES)
def test_a_secrets_name_is_known(name: str, write_recipe: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv(name, "runs/value")
    recipe = write_recipe({"training.output_dir": f"${{{name}}}"})
    if name in OTHER_NAMES:
        assert load_recipe(recipe).training.output_dir == "runs/value"
    else:
        with pytest.raises(UserError, match=f"{name} looks like a secret"):
            load_recipe(recipe)


def test_a_report_takes_names_and_recipe_for_text(
    tiny_gpt2: Path, write_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    base, rows, run = (tmp_path / f"{kind} {FOREIGN}" for kind in ("base", "rows", "run"))
    shutil.copytree(tiny_gpt2, base)
    row = {"text": f"{FOREIGN}</pre>{FOREIGN}"}
    rows.with_suffix(".jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    changes = {
        "model.name_or_path": base,
        "data.train": rows.with_suffix(".jsonl"),
        "data.columns": {"text": "text"},
        "training.output_dir": run,
        "training.max_steps": 1,
    }
    done(lora("train", write_recipe(changes)))
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in report
    assert report.count("&lt;script&gt;alert(1)&lt;|script&gt;") >= 4  # title, heading, base, recipe
