"""An adapter folded into its base and the sum quantized, in one pass: no merged model is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_cli.recipe.schema import Quantization
from lora_cli.weights.folders import draft_folder
from lora_cli.weights.merge import common_quantization, find_sums, merge, seen_dtype
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

    Only where one of the two needs a model in memory, a merged model lies beside ``out`` meanwhile; ``tell`` is told
    beforehand when it is the merge. Raises UserError as both do.
    """
    headers = read_headers(weight_files(origin.base))
    sums = find_sums([origin], headers, common_quantization([origin]), seen_dtype(origin, headers), None)
    if sums is None or not is_streamed(origin.base):
        check_layers(origin.base, quantization, skip)  # which merging may take long to come to
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(out.absolute()) as place:
            merged = place / "merged"
            merge([origin], merged, tell=tell)
            return quantize(stored_model(merged), out, quantization, skip, max_shard, check)
    read, words, untied = sums.read, sums.changes.words, bool(sums.changes.untied)
    source = StoredModel(origin.base, sums.headers, lambda name: read(name).tensor, origin.folder, words, untied)
    return quantize(source, out, quantization, skip, max_shard, check)
