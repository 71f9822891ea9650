"""Merge an adapter into its base and quantize the sum in one pass, without writing the merged model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_cli.recipe.schema import Quantization
from lora_cli.weights.folders import draft_folder
from lora_cli.weights.merge import common_quantization, merge, merged_tensors, training_dtype
from lora_cli.weights.provenance import AdapterOrigin
from lora_cli.weights.quantize import Quantized, is_streamed, quantize
from lora_cli.weights.quantized_layers import check_layers
from lora_cli.weights.shards import MAX_SHARD, read_headers, weight_files
from lora_cli.weights.stored_model import StoredModel, stored_model


def quantize_merged(
    origin: AdapterOrigin,
    out: Path,
    quantization: Quantization,
    skip: Sequence[str] = (),
    max_shard: int = MAX_SHARD,
    tell: Callable[[str], object] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Quantized:
    """Write what ``merge`` and then ``quantize``, with its ``check``, would write.

    Only if one of the two needs the model in memory, the merged model is stored beside ``out`` for a while. ``tell`` is
    called first if the merge needs it. Raises UserError as both do.
    """
    headers = read_headers(weight_files(origin.base))
    tensors = merged_tensors([origin], headers, common_quantization([origin]), training_dtype(origin, headers), None)
    if tensors is None or not is_streamed(origin.base):
        check_layers(origin.base, quantization, skip)  # before a merge that may take long
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(out.absolute()) as place:
            merged = place / "merged"
            merge([origin], merged, tell=tell)
            return quantize(stored_model(merged), out, quantization, skip, max_shard, check)
    read, vocab_size, untied = tensors.read, tensors.changes.vocab_size, bool(tensors.changes.untied)
    source = StoredModel(
        origin.base, tensors.headers, lambda name: read(name).tensor, origin.folder, vocab_size, untied
    )
    return quantize(source, out, quantization, skip, max_shard, check)
