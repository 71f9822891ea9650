"""Make a model folder for from_pretrained from a shape: random weights, and a tokenizer trained on the rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bench.shapes import Shape

END, PAD = "<|endoftext|>", "<|pad|>"
STD = 0.02
SHARD = 4 * 2**30  # bytes
NF4 = BitsAndBytesConfig(  # QLoRA's settings, as in TRL's documentation
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
TOKENIZER_CHARACTERS = 600  # characters of text to train the tokenizer on, per token of its vocabulary


def make(shape: Shape, texts: Iterable[str], folder: Path, seed: int) -> None:
    """Write model and tokenizer to ``folder``, which appears only when complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    tokenizer = make_tokenizer(texts, shape.config["vocab_size"])
    tokenizer.save_pretrained(draft)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(shape.model_type, **shape.config, **ends, dtype=shape.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    if shape.nf4:
        config.quantization_config = NF4.to_dict()
    config.save_pretrained(draft)
    write_weights(model, getattr(torch, shape.dtype), draft, seed, shape.nf4)
    draft.rename(folder)


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``vocabulary`` tokens: END ends a text, PAD pads. Encoding adds no special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_first(texts, TOKENIZER_CHARACTERS * vocabulary), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def write_weights(model: PreTrainedModel, dtype: torch.dtype, folder: Path, seed: int, nf4: bool) -> None:
    """Write random weights shard by shard, drawn as most models in Transformers are initialized. ``model`` is on the
    meta device, and memory holds only one shard."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, str] = {}
    used = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, tensor in drawn_weights(model, dtype, seed, nf4):
        if used and used + tensor.nbytes > SHARD:
            flush()
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def drawn_weights(
    model: PreTrainedModel, dtype: torch.dtype, seed: int, nf4: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every stored tensor with its name: for a quantized layer, its codes and bitsandbytes' quantization state."""
    from bitsandbytes.functional import quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(seed)
    head = model.get_output_embeddings()
    linear = {name for name, each in model.named_modules() if type(each) is torch.nn.Linear and each is not head}
    for name, empty in model.state_dict().items():
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if empty.ndim < 2:
            yield name, torch.full(empty.shape, float(name.endswith("weight")), dtype=dtype)
            continue
        weight = torch.empty(empty.shape, dtype=dtype, device=device).normal_(0, STD, generator=draw)
        if nf4 and name.removesuffix(".weight") in linear:
            weight, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            for key, tensor in state.as_dict(packed=True).items():
                yield f"{name}.{key}", tensor.cpu()
        yield name, weight.cpu()
