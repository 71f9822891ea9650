"""What a machine's first process tells the others before the run's process group begins: the rows it has published."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lora_cli.training.launched import is_first_here, process_count, process_index

PATIENCE = timedelta(days=7)
"""To tokenize takes what it takes; the launcher ends the others when the first one fails."""


def announce(keys: Collection[str]) -> Store | None:
    """Tell this machine's other processes under which keys its rows are published; what is returned is to be kept until
    the process group has begun."""
    if process_count() == 1 or not is_first_here():
        return None
    store = _store()
    store.set(_machine(), ",".join(keys))
    return store


def announced() -> Collection[str]:
    """What ``announce`` told here, waited for."""
    return _store().get(_machine()).decode().split(",")


def _store() -> Store:
    """The run's key-value store, where its processes will meet: the launcher's, or else the first process's own."""
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own = process_index() == 0 and not is_launchers
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore("lora", TCPStore(host, port, None, own, PATIENCE, wait_for_workers=False, multi_tenant=True))


def _machine() -> str:
    return os.environ.get("GROUP_RANK") or socket.gethostname()
