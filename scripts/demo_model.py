"""Make the demo's base model: a byte-level tokenizer and a tiny GPT-2, pretrained only on the general text."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from lora_cli.system.folders import atomic_folder

ROOT = Path(__file__).resolve().parent.parent
END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 2048
POSITIONS = 256
STEPS = 220
WARMUP = 20
ROWS, LENGTH = 16, 128
LEARNING_RATE = 3e-3
THREADS = 2  # fixed for reproducibility: the rounding of sums depends on the number of threads


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on ``texts``. END is its bos, eos and unk token, PAD its padding token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, pad_token=PAD, model_max_length=POSITIONS
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained GPT-2 with four layers."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def pretrain(model: GPT2LMHeadModel, stream: torch.Tensor, steps: int) -> float:
    """Train ``steps`` steps of next-token prediction on windows of ``stream``. Return the last 20 steps' mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        done = max(0.0, (step - WARMUP) / max(1, steps - WARMUP))
        return min((step + 1) / WARMUP, 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(stream) - LENGTH - 1, (ROWS,))
        windows = torch.stack([stream[start : start + LENGTH + 1] for start in starts.tolist()])
        logits = model(input_ids=windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-20:]
    return sum(last) / len(last)


def write(data: Path, folder: Path, seed: int, steps: int) -> float:
    """Write tokenizer and pretrained model to ``folder``, which appears only when complete. Return the final loss."""
    general = (data / "general.txt").read_text(encoding="utf-8").strip().split("\n\n")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    tokenizer = make_tokenizer([*general, *questions])
    stream = [token for ids in tokenizer(general)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]

    torch.manual_seed(seed)
    model = make_model(tokenizer)
    loss = pretrain(model, torch.tensor(stream), steps)

    with atomic_folder(folder) as making:
        model.save_pretrained(making)
        tokenizer.save_pretrained(making)
        (making / "model.safetensors").chmod(0o644)
    return loss


def main() -> None:
    """Make the model unless its folder exists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / ".demo" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / ".demo" / "base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"{arguments.out} is there already")
        return
    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    start = time.perf_counter()
    loss = write(arguments.data, arguments.out, arguments.seed, arguments.steps)
    print(f"{arguments.steps} steps in {time.perf_counter() - start:.0f} s, loss {loss:.2f}: {arguments.out}")


if __name__ == "__main__":
    main()
