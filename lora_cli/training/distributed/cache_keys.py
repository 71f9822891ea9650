"""A machine's first process announces its published rows to the others before the process group begins."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lora_cli.training.distributed.launch_environment import is_first_here, process_count, process_index

STORE_TIMEOUT = timedelta(days=7)
"""Tokenizing may take long; when the first process fails, the launcher ends the others."""


def publish_keys(keys: Collection[str]) -> Store | None:
    """Send this machine's other processes the keys of the published rows. Keep the returned store until the process
    group has begun."""
    if process_count() == 1 or not is_first_here():
        return None
    store = _store()
    store.set(_machine(), ",".join(keys))
    return store


def wait_for_keys() -> Collection[str]:
    """Wait for the keys that ``publish_keys`` sent on this machine, and return them."""
    store = _store()
    while not store.check([_machine()]):  # no signal could end a blocking `get`
        time.sleep(0.1)
    return store.get(_machine()).decode().split(",")


def _store() -> Store:
    """Connect to the run's key-value store, where its processes meet. The launcher hosts it, or else process 0."""
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own = process_index() == 0 and not is_launchers
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore(
        "lora", TCPStore(host, port, None, own, STORE_TIMEOUT, wait_for_workers=False, multi_tenant=True)
    )


def _machine() -> str:
    return os.environ.get("GROUP_RANK") or socket.gethostname()
