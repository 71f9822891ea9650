"""A command stopped by a signal leaves no files. The next command removes those that a killed command left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import done
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

SLOWLY = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import lora_cli.weights.files.stream as stream
from lora_cli.cli.app import main
add = stream._Shard.add
def slow(*given):
    add(*given)
    end = time.monotonic() + {seconds}
    while time.monotonic() < end and not os.path.exists({go!r}):
        time.sleep(0.01)
stream._Shard.add = slow
sys.exit(main(sys.argv[1:]))
"""
"""A command that waits for the file ``go`` after each tensor it writes, but not longer than these seconds."""


@contextmanager
def slowly(out: Path, *arguments: str | Path, go: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Run ``lora`` with SLOWLY, and yield the process once it has begun to write to a draft of ``out``."""
    script = SLOWLY.format(go=str(go), seconds=seconds)
    command = [sys.executable, "-c", script, *map(str, arguments), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + 120
            while not list(out.parent.glob(".out.*/.model*")):
                if process.poll() is not None or time.monotonic() > end:
                    process.kill()
                    pytest.fail(process.communicate()[1])
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def stopped(number: int, out: Path, *arguments: str | Path) -> tuple[int, str]:
    """The exit code and stderr of ``lora``, which gets the signal ``number`` once it has begun to write."""
    with slowly(out, *arguments, go=out / "never", seconds=0.5) as process:
        process.send_signal(number)
        return process.wait(60), process.communicate()[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_a_signal_leaves_nothing(number: int, code: int, verb: str, adapter: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    ended, told = stopped(number, place / "out", verb, adapter)
    assert (ended, told.splitlines()[-1]) == (code, "stopped")
    assert list(place.iterdir()) == []


def test_what_a_killed_run_left_goes_with_the_next(adapter: Path, tmp_path: Path, lora: Any) -> None:
    place = tmp_path / "place"
    others = {".out.settings", ".out.draft-notes", ".other.abcdefgh.draft"}
    for name in others:
        (place / name).mkdir(parents=True)
    ended, _ = stopped(signal.SIGKILL, place / "out", "merge", adapter)
    (draft,) = {path.name for path in place.iterdir()} - others
    assert ended == -signal.SIGKILL
    done(lora("merge", adapter, "--out", place / "out", "--no-verify"))
    assert {path.name for path in place.iterdir()} == {"out", *others}, draft


def test_a_draft_that_is_being_written_stays(adapter: Path, tmp_path: Path, lora: Any) -> None:
    """Two commands write to the same folder: the first to finish succeeds, and the other reports an error."""
    place = tmp_path / "place"
    place.mkdir()
    with slowly(place / "out", "merge", adapter, "--no-verify", go=tmp_path / "go", seconds=60) as slow:
        (draft,) = place.glob(".out.*")
        done(lora("merge", adapter, "--out", place / "out", "--no-verify"))
        assert draft.is_dir()
        (tmp_path / "go").touch()
        _, told = slow.communicate()
    assert slow.returncode == 3 and "/out: another command made this folder in the meantime\n    it is left" in told
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize(("cause", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (ValueError(), 1)])
def test_a_signal_that_hits_an_import_is_no_bug(
    cause: BaseException, code: int, write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pybind11 raises such an ImportError when a signal arrives while matplotlib is imported."""

    def interrupted(_: Path) -> None:
        raise ImportError("initialization\x07 failed") from cause

    monkeypatch.setattr("lora_cli.study.report.write_report", interrupted)
    result = lora("train", write_recipe({"training.max_steps": 1}))
    assert result.exit_code == code
    assert (r"bug in lora: ImportError: initialization\x07 failed" in result.stderr) is (code == 1)
    assert result.stderr.splitlines()[-1] == "stopped" or code == 1


def test_a_signal_while_lora_is_imported_ends_it_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lora_cli.__main__ import run\n"
        "run()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


def test_process_1_of_a_container_is_stopped_before_it_trains(write_recipe: Any, tmp_path: Path) -> None:
    contained = ["unshare", "--user", "--map-root-user", "--fork", "--pid"]
    if not shutil.which("unshare") or subprocess.run([*contained, "true"], capture_output=True).returncode:
        pytest.skip("no new namespaces here")
    script = (
        "import os, signal\n"
        "from lora_cli.cli.app import main\n"
        "from lora_cli.recipe import load\n"
        "assert os.getpid() == 1\n"
        "load.load_recipe = lambda *_: os.kill(1, signal.SIGTERM)\n"
        f"raise SystemExit(main(['train', {str(write_recipe())!r}]))\n"
    )
    ended = subprocess.run([*contained, sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (143, "stopped\n")


@pytest.mark.parametrize("arguments", [["explain"], ["explain", "--schema"], ["train", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_ends_a_command_as_sigpipe_does(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as of: lora explain | true
    command = [sys.executable, "-m", "lora_cli", *arguments]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_written_is_told(unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        arguments = [sys.executable, "-m", "lora_cli", "explain", "adapter.r"]
        ended = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, env=environment, text=True, timeout=60)
    assert ended.returncode == 3
    assert "stdout: the result could not be printed: No space left on device" in ended.stderr
