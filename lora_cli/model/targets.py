"""The names of an architecture's modules: what ``adapter.target_modules`` selects, and names with a meaning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_cli.errors import Fault, UserError, nearest_hint

FUSED = {"c_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv"}
QUERY_VALUE = {"q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "wq", "wv"} | FUSED
OUTPUT = {"o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo"}
EMBEDDINGS = ("wte", "wpe", "embed_tokens", "embed_positions", "embed_in", "word_embeddings", "lm_head", "embed_out")
"""The last names of embeddings and heads."""
BYPASSED_WEIGHTS = {
    "out_proj": {"bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h", "zamba2"},
    "dt_proj": {"doge", "falcon_mamba", "jamba", "mamba"},
    "correction_coefs": {"gemma3n", "gemma3n_text"},
    "o_a_proj": {"deepseek_v4"},
}
"""Layer names, and the model types that read such a layer's weight past an adapter (by Mamba's kernels or without
them), clip it in training (Gemma 3n), or use it for long rows only (Doge). The adapter would learn nothing, and PEFT
refuses some. DeepSeek-V4's layer multiplies parts of its input separately, PEFT's adapter the whole input."""
UNTRAINED = re.compile(
    r"(.+\.)?(indexer|encoder_attn|crossattention|cross_attn|pooler|image_encoder|visual_projection|image_embed|audio_embed"
    r"|\w+_adapter_list)(\..+)?"
)
"""Matches layers in parts of a model that get no gradient here: the indexer that selects tokens for sparse attention
(DeepSeek-V3.2), attention to an encoder's output (BART's decoder), BigBird's pooler, towers for images and sound inside
a text model (GIT, Phi-4-multimodal), and the adapters of Zamba2's shared layers, of which each layer uses its own."""
COEFFICIENTS = ("correction_coefs", "prediction_coefs")
UNQUANTIZABLE_LAYERS = {"mamba": ("dt_proj",), "gemma3n": COEFFICIENTS, "gemma3n_text": COEFFICIENTS}
"""Model types whose forward pass directly multiplies by a layer's weight or clips it, and these layers. They cannot be
quantized: in 4 or 8 bits, the weight holds codes."""
WORDS = ("minimal", "standard", "attention", "all-linear")


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt: its module name, input width and output width."""

    name: str
    in_features: int
    out_features: int

    @property
    def width(self) -> int:
        """The smaller of the two widths, which is the highest rank that an update can have."""
        return min(self.in_features, self.out_features)


def bypasses_adapter(name: str, model_type: str) -> bool:
    """Whether models of this type read the layer's weight past an adapter, or the layer belongs to a part of the model
    through which no text or no gradient goes."""
    return UNTRAINED.fullmatch(name) is not None or model_type in BYPASSED_WEIGHTS.get(_leaf(name), ())


def choose_targets(
    layers: Mapping[str, Target], wanted: str | tuple[str, ...], r: int, numbers: tuple[int, ...] | None = None
) -> list[Target]:
    """The linear layers that ``adapter.target_modules`` selects, in the model's layers of these ``numbers`` if given.

    Raises UserError for every name that matches nothing, listing what exists, and for a rank above all layers' widths.
    """
    if isinstance(wanted, str):
        names = _by_word(wanted, layers) if wanted in WORDS else _by_pattern(wanted, layers)
    else:
        names = _by_list(wanted, layers)
    if numbers is not None:
        names = _in_layers(numbers, names)
    targets = [layers[name] for name in names]
    if targets and narrower(targets, r) == targets:
        widest = max(target.width for target in targets)
        what = f"adapter.r: {r} is more than the width of any layer to adapt ({widest})"
        raise UserError(what, hint=f"use at most {widest}")
    return targets


def narrower(targets: Iterable[Target], r: int) -> list[Target]:
    """The layers whose updates cannot have rank ``r``, such as Qwen3.5's in_proj_a with 32 outputs."""
    return [target for target in targets if target.width < r]


def _by_word(word: str, layers: Mapping[str, Target]) -> list[str]:
    if word == "all-linear":
        return list(layers)
    attention = [name for name in layers if _is_of_attention(name, layers)]
    wanted = {
        "attention": attention,
        "standard": [name for name in attention if _leaf(name) not in OUTPUT],
        "minimal": [name for name in attention if _leaf(name) in QUERY_VALUE],
    }[word]
    if not wanted:
        hint = f"use all-linear, or a list of names; {_what_exists(layers)}"
        raise UserError(f"adapter.target_modules: {word} matches no layer of this model", hint=hint)
    return wanted


def _is_of_attention(name: str, layers: Mapping[str, Target]) -> bool:
    """By the names of the modules around the layer, or a q_proj beside it: Nemotron-H calls any token mixer a mixer."""
    within = name.rpartition(".")[0]
    return "attn" in within or "attention" in within or f"{within}.q_proj" in layers


def _by_pattern(pattern: str, layers: Iterable[str]) -> list[str]:
    if re.fullmatch(r"[\w.]+", pattern):
        return _by_list((pattern,), layers)
    expression = compile_pattern(pattern, layers)
    names = [name for name in layers if expression.fullmatch(name)]
    if not names:
        way = f"a whole name is, for example, {next(iter(layers))}"
        if re.fullmatch(r"[\w.]+([\s,]+[\w.]+)+", pattern):
            listed = ", ".join(re.findall(r"[\w.]+", pattern))
            way = f"in brackets it is a list: [{listed}]"
        what = f"adapter.target_modules: '{pattern}' matches no whole module name"
        raise UserError(what, hint=f"{way}; {_what_exists(layers)}")
    return names


def compile_pattern(pattern: str, layers: Iterable[str]) -> re.Pattern[str]:
    """Raises UserError, listing the ``layers`` there are, when the pattern is not a regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        what = f"adapter.target_modules: '{pattern}' is not a regular expression: {error}"
        raise UserError(what, hint=_what_exists(layers)) from error


def _by_list(wanted: Iterable[str], layers: Iterable[str]) -> list[str]:
    leaves = {_leaf(name) for name in layers}
    faults = []
    chosen: set[str] = set()
    for item in wanted:
        found = {name for name in layers if name == item or name.endswith(f".{item}")}
        chosen |= found
        if not found:
            near = "write it without brackets;" if item in WORDS else _nearest(item, leaves)
            hint = f"{near} {_what_exists(layers)}" if near else _what_exists(layers)
            what = f"adapter.target_modules: '{item}' names no linear layer of this model that can be adapted"
            faults.append(Fault(what, hint=hint))
    if faults:
        raise UserError(faults)
    return [name for name in layers if name in chosen]


def _nearest(item: str, leaves: Iterable[str]) -> str | None:
    return "did you mean 'all-linear'?" if item == "all" else nearest_hint(item, [*leaves, *WORDS])


def _in_layers(wanted: tuple[int, ...], names: list[str]) -> list[str]:
    """The names in the model's layers of these numbers: the first number in a name is the layer's."""
    found = {name: int(number[1]) for name in names if (number := re.search(r"\.(\d+)\.", name))}
    missing = sorted(set(wanted) - set(found.values()))
    if missing:
        what = f"adapter.layers_to_transform: adapter.target_modules matches nothing in layer {missing[0]}"
        there = (
            f"it matches layers {min(found.values())} to {max(found.values())}"
            if found
            else "its layers have no number"
        )
        raise UserError(what, hint=there)
    return [name for name, number in found.items() if number in wanted]


def module_leaf(tensor: str) -> str:
    """Return the last part of the name of a tensor's module, empty for a name without a module."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _what_exists(layers: Iterable[str]) -> str:
    counts = Counter(_leaf(name) for name in layers)
    return "linear layers here: " + ", ".join(f"{name} (x{count})" for name, count in counts.items())


def describe(targets: Iterable[Target], parameters: Mapping[str, int]) -> list[tuple[str, int, str, int]]:
    """Rows of a table: pattern with the layer numbers left out, number of layers, widths, and the sum of the layers'
    trained ``parameters``, which are given by module name."""
    groups: dict[tuple[str, int, int], list[int]] = {}
    for target in targets:
        pattern = re.sub(r"\.\d+\.", ".*.", target.name)
        groups.setdefault((pattern, target.in_features, target.out_features), []).append(parameters[target.name])
    return [
        (pattern, len(numbers), f"{wide} -> {out}", sum(numbers)) for (pattern, wide, out), numbers in groups.items()
    ]
