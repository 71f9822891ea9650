"""A shape -> a folder with random weights and a tokenizer learned on the rows, as from_pretrained loads it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.shapes import Shape

END, PAD = "<|endoftext|>", "<|pad|>"
STD = 0.02
SHARD = 4 * 2**30  # bytes
TAUGHT = 600  # characters that the tokenizer learns from for each token it may have


def make(shape: Shape, texts: Iterable[str], folder: Path, seed: int) -> None:
    """Write the model into a folder that appears whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    tokenizer = make_tokenizer(texts, shape.config["vocab_size"])
    tokenizer.save_pretrained(making)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(shape.model_type, **shape.config, **ends, dtype=shape.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(making)
    write_weights(model, getattr(torch, shape.dtype), making, seed)
    making.rename(folder)


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``vocabulary`` tokens; it adds nothing to a text, and has tokens to end and to pad."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_first(texts, TAUGHT * vocabulary), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def write_weights(model: torch.nn.Module, dtype: torch.dtype, folder: Path, seed: int) -> None:
    """Weights drawn as Transformers initializes them, shard by shard: ``model`` is on the meta device, and memory holds
    one shard."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(seed)
    tied = model.config.tie_word_embeddings
    shards: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, str] = {}
    used = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, empty in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if empty.ndim > 1:
            weight = torch.empty(empty.shape, dtype=dtype, device=device).normal_(0, STD, generator=draw).cpu()
        else:
            weight = torch.full(empty.shape, float(name.endswith("weight")), dtype=dtype)
        if used and used + weight.nbytes > SHARD:
            flush()
            shards.append({})
            used = 0
        shards[-1][name] = weight
        used += weight.nbytes
    flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
