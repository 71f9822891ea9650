"""Compute every adapter's loss on the held-out rows in the same way, one row at a time with Transformers and PEFT;
``python -m bench.heldout job.json``."""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.work import read_job, read_rows

BASE = "base"


def main(job: str) -> None:
    """Write losses.json: mean negative log-likelihood of the supervised tokens for the base and each adapter."""
    work, folder, adapters = read_job(job)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    rows = []
    for row in read_rows(work.heldout):
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        rows.append((len(prompt), torch.tensor([*whole, tokenizer.eos_token_id][: work.max_length])))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if work.nf4 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype, device_map=device).eval()
    losses = {BASE: loss(base, rows, device)}
    model = None
    for name, path in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
        model.set_adapter(name)
        losses[name] = loss(model.eval(), rows, device)
        if len(model.peft_config) > 1:
            model.delete_adapter(next(iter(model.peft_config)))
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


@torch.no_grad()
def loss(model: torch.nn.Module, rows: list[tuple[int, torch.Tensor]], device: str) -> float:
    """Mean negative log-likelihood over the supervised tokens of all rows, not a mean of the rows' means."""
    total, count = 0.0, 0
    for prompt, ids in rows:
        ids = ids.to(device)
        wanted = ids[prompt:]
        logits = model(input_ids=ids[None]).logits[0, prompt - 1 : -1].float()
        total += float(cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    return total / count


if __name__ == "__main__":
    main(sys.argv[1])
