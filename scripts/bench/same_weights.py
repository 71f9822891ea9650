"""Whether two model folders hold the same tensors; ``python -m bench.same_weights job.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open


def main(job: str) -> None:
    """Write same.json, the result of ``compare``."""
    arguments = json.loads(Path(job).read_text(encoding="utf-8"))
    same = compare(Path(arguments["found"]), Path(arguments["wanted"]))
    (Path(arguments["folder"]) / "same.json").write_text(json.dumps(same), encoding="utf-8")


def compare(found: Path, wanted: Path) -> dict[str, Any]:
    """Compare all tensors. ``largest`` is the largest |a - b| / |b| (Frobenius norm) and ``of`` the tensor that has it.
    ``faults`` are tensors that one folder lacks, or that differ in dtype or shape."""
    ours, theirs = places(found), places(wanted)
    faults = [f"tensor {name} is in one of them only" for name in sorted(ours.keys() ^ theirs.keys())]
    largest, of = 0.0, "none differs"
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = read(ours[name], name), read(theirs[name], name)
        if one.dtype != other.dtype or one.shape != other.shape:
            faults.append(f"tensor {name} is {one.dtype} {list(one.shape)}, not {other.dtype} {list(other.shape)}")
            continue
        size = float(other.double().norm())
        apart = float((one.double() - other.double()).norm()) / (size or 1.0)
        if apart > largest:
            largest, of = apart, name
    return {"tensors": len(ours), "largest": largest, "of": of, "faults": faults}


def places(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), file)
    return found


def read(file: Path, name: str) -> Any:
    """One tensor."""
    with safe_open(file, framework="pt") as shard:
        return shard.get_tensor(name)


if __name__ == "__main__":
    main(sys.argv[1])
