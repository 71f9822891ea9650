"""Run a command in a fresh process: how long it takes, when it becomes ready, and its peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
POLL_SECONDS = 0.02  # between two looks at ``is_ready`` and the process's memory
CHILDREN_SECONDS = 0.2  # between two measurements of the children's memory


@dataclass(frozen=True)
class ProcessResult:
    """How a process ended. ``ready_seconds`` is the time from the start until ``is_ready``, None if it never was.
    ``own_bytes`` is the peak memory without mapped files, ``device_bytes`` the peak increase of GPU memory (0 without a
    GPU)."""

    exit_code: int
    began: float
    seconds: float
    ready_seconds: float | None
    peak_bytes: int
    own_bytes: int
    device_bytes: int


def environment(threads: int, cache: Path, gpu: bool = False) -> dict[str, str]:
    """This process's environment with ``threads`` threads, one GPU or none, the Hub offline, and the libraries' caches
    under ``cache``."""
    path = os.pathsep.join(filter(None, [str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH")]))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    settings = {name: str(threads) for name in names} | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    settings |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu_number() if gpu else ""}
    folders = {"HF_HOME": "huggingface", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {**os.environ, **settings, **{name: str(cache / folder) for name, folder in folders.items()}}


def gpu_number() -> str:
    """The number of the GPU to measure on, for nvidia-smi and CUDA alike: the first in CUDA_VISIBLE_DEVICES, or 0."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def run(
    arguments: list[str],
    env: Mapping[str, str],
    log: Path,
    is_ready: Callable[[], bool] | None = None,
    gpu: bool = False,
) -> ProcessResult:
    """Run Python with ``arguments``, with stdout and stderr in ``log``.

    Peak memory is the process's peak resident memory (VmHWM in Linux) plus the memory that only its children hold at
    the time. ``own_bytes`` has RssAnon in place of VmHWM.
    """
    with log.open("w", encoding="utf-8") as stream, _DeviceMemory(gpu) as device:
        began, start = time.time(), time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=stream, stderr=subprocess.STDOUT, env=dict(env), cwd=ROOT
        )
        ready, peak, own, children, counted = None, 0, 0, 0, 0.0
        while True:
            exit_code = process.poll()
            now = time.perf_counter()
            if ready is None and is_ready is not None and is_ready():
                ready = now - start
            if exit_code is not None:
                break
            if now - counted > CHILDREN_SECONDS:
                children, counted = _held_by_children(process.pid), now
            peak = max(peak, _memory(process.pid, "VmHWM") + children)
            own = max(own, _memory(process.pid, "RssAnon") + children)
            time.sleep(POLL_SECONDS)
    return ProcessResult(exit_code, began, now - start, ready, peak, own, device.used)


def _held_by_children(pid: int) -> int:
    """Bytes that a process's descendants share with no other process (USS)."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                total += child.memory_full_info().uss
    return total


def _memory(pid: int, kind: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), 0)


class _DeviceMemory:
    """Peak GPU memory in use above what was in use before, read from nvidia-smi ten times a second. This measure is the
    same for every tool: it includes the allocator's cache and the CUDA context."""

    def __init__(self, watch: bool) -> None:
        self.used = 0
        self._watch = watch
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _DeviceMemory:
        if self._watch:
            wanted = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=100"]
            command = ["nvidia-smi", f"--id={gpu_number()}", *wanted]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert self._process.stdout is not None
            before = int(self._process.stdout.readline())
            threading.Thread(target=self._read, args=(self._process.stdout, before), daemon=True).start()
        return self

    def _read(self, stream: IO[str], before: int) -> None:
        for line in stream:
            if line.strip().isdigit():
                self.used = max(self.used, (int(line) - before) * 2**20)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def fresh_folder(parent: Path) -> Path:
    """A new empty folder."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=parent))


def tail(log: Path, lines: int = 15) -> str:
    """The last ``lines`` lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
