"""Before weights are loaded, check that all processes are about to take part in the same run."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_cli import __version__
from lora_cli.data.sources import sources_of
from lora_cli.errors import Fault, UserError
from lora_cli.training.prepare import Prepared
from lora_cli.training.run.same_run import flat_keys

PATH_KEYS = {
    "model.name_or_path",
    "adapter.init_from",
    "data.train",
    "data.validation",
    "training.output_dir",
    "training.deepspeed",
}
"""Keys that hold a path, which may differ between machines; contents are compared instead, but for output_dir."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy")
Account = dict[str, Any]
"""All that determines a run's results, by a name for error messages."""


def check_agreement(job: Prepared, accelerator: Accelerator, dtype: str) -> None:
    """Raises UserError, on all processes, when one would train differently from the first: it names the process, its
    machine and the differences. ``dtype`` is the resolved model.dtype."""
    if accelerator.num_processes == 1:
        return
    accounts: list[tuple[str, Account]] = gather_object([(socket.gethostname(), _run_signature(job, dtype))])
    first_host, wanted = accounts[0]
    hint = "give all processes the same recipe, rows, base and versions"
    faults = [
        Fault(f"{difference} in process 0 on {first_host}", f"process {index} on {host}", hint)
        for index, (host, found) in enumerate(accounts)
        for difference in _differences(found, wanted)
    ]
    if faults:
        raise UserError(faults)


def _differences(found: Account, wanted: Account) -> Iterator[str]:
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            yield f"{name} is {_shown(found.get(name))}, but {_shown(wanted.get(name))}"


def _run_signature(job: Prepared, dtype: str) -> Account:
    """Return what this process is about to train, as JSON values."""
    recipe = job.recipe
    deepspeed = recipe.training.deepspeed
    return {
        **{key: value for key, value in flat_keys(recipe.model_dump(mode="json")).items() if key not in PATH_KEYS},
        "--resume": job.resume,
        "the type computed in": dtype,
        "the base's fingerprint": job.base_digest,
        "the training rows' fingerprint": job.train.examples.fingerprint,
        "the validation rows' fingerprint": job.validation.fingerprint if job.validation else None,
        "the weights of data.train": [source.weight for source in sources_of(recipe.data.train)],
        "DeepSpeed's configuration": json.loads(Path(deepspeed).read_text(encoding="utf-8")) if deepspeed else None,
        "the SHA-256 of adapter.init_from": job.start.get("fingerprint"),
        "the version of lora": __version__,
        **{f"the version of {name}": version(name) for name in PACKAGES},
    }


def _shown(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:16]}..." if is_digest else repr(value)
