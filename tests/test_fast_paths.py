"""Attention by rows, the loss in chunks and fused LoRA give the results of rows run one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lora_cli.data.batches import Batch, Schedule, collate
from lora_cli.data.examples import Store, end_to_end
from lora_cli.evaluation.compare import compare
from lora_cli.evaluation.head import Head, LinearCrossEntropy, frozen_head
from lora_cli.evaluation.loss import evaluating, evaluation_groups, packed_row_arguments, summed_loss
from lora_cli.evaluation.packing import enable_packing
from lora_cli.model.adapters import adapt
from lora_cli.model.base import longrope_bounds
from lora_cli.model.device import best_device
from lora_cli.model.fast_paths.attention import ROWS, ROWS_ALONE, _fused, attend_by_rows
from lora_cli.model.fast_paths.fuse import fuse
from lora_cli.model.fast_paths.fused_lora import Fused, apply_layers, register
from lora_cli.model.fast_paths.gated_mlp import PROJECTIONS
from lora_cli.model.fast_paths.lora_products import LayerSpec, LoraProducts
from lora_cli.model.fast_paths.rms_norm import norm_inputs_of, normed
from lora_cli.model.fast_paths.row_products import MAX_SAVED_TOKENS, MAX_UNBLOCKED_TOKENS, RowProducts, _layouts
from lora_cli.model.fast_paths.shapes import rounded_size
from lora_cli.model.layers import adaptable_layers, linear_layers
from lora_cli.model.linear4bit import dequantize, patch_4bit_layers
from lora_cli.recipe.schema import Adapter, Quantization
from lora_cli.weights.codes import encode, quantize_dequantize
from tests import reference
from tests.conftest import Run, done

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
ROW_LENGTHS = (9, 5, 11, 2)
LENGTHS = np.array(ROW_LENGTHS)

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str | None, bool]] = {
    "llama": ("Llama", GROUPED, ROWS, True),
    "gpt2": ("GPT2", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, ROWS, True),
    "mistral with a window": ("Mistral", GROUPED | {"sliding_window": 4}, ROWS, True),
    "qwen3": ("Qwen3", GROUPED, ROWS, True),
    "phi3": ("Phi3", GROUPED, ROWS, True),
    "gpt-neox": ("GPTNeoX", SMALL, ROWS, True),
    "phi with a biased head": ("Phi", SMALL, ROWS, True),
    "granite, which divides logits": ("Granite", GROUPED | {"logits_scaling": 3.0}, ROWS, True),
    "cohere, which multiplies logits": ("Cohere", GROUPED | {"logit_scale": 0.25}, ROWS, True),
    "gemma2, which caps scores and logits": (
        "Gemma2",
        GROUPED | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 4},
        "its own",
        True,
    ),
    "gemma3 with a window": (
        "Gemma3Text",
        GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        ROWS,
        True,
    ),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 2}, ROWS, True),
    "gpt-oss, which has sinks": (
        "GptOss",
        GROUPED
        | {"num_local_experts": 2, "num_experts_per_tok": 2}
        | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        ROWS,
        True,
    ),
    "bloom, which counts positions itself": ("Bloom", {**SMALL, "n_layer": 2, "n_head": 4}, None, True),
    "mamba, which has a state": ("Mamba", {**SMALL, "state_size": 4}, None, True),
    "falcon h1, which multiplies logits by a number of its own name": (
        "FalconH1",
        GROUPED | {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 4},
        None,
        False,
    ),
    "prophetnet, whose head computes several streams of logits": (
        "ProphetNet",
        {"vocab_size": 97, "hidden_size": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 2}
        | {"decoder_ffn_dim": 48, "num_encoder_layers": 1, "num_encoder_attention_heads": 2, "encoder_ffn_dim": 48},
        None,
        False,
    ),
}
"""Configuration class, its arguments, the attention of packed rows (None: rows are padded instead), and whether the
loss is computed in chunks."""


def build(name: str, arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # initial weights are so near to zero that differences would not show
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def rows_of(lengths: Sequence[int]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=draw) for length in lengths]


def packed(rows: list[torch.Tensor]) -> Batch:
    """The packed batch of the rows, all tokens but each row's first supervised. It is built without ``collate``."""
    starts = np.cumsum([0, *map(len, rows)])
    ids = torch.cat(rows)
    predict = torch.tensor([at for at in range(len(ids) - 1) if at + 1 not in starts])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return Batch(
        ids[None],
        positions[None],
        None,
        torch.tensor(starts, dtype=torch.int32),
        max(map(len, rows)),
        predict,
        torch.arange(len(predict)),
        ids[predict + 1],
    )


def one_at_a_time(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    """The summed loss of the rows, each run alone, from the model's own forward pass and logits."""
    logits = (model(input_ids=row[None]).logits[0, :-1].float() for row in rows)
    pairs = zip(logits, rows, strict=True)
    losses = (nn.functional.cross_entropy(each, row[1:], reduction="sum") for each, row in pairs)
    return sum(losses, torch.zeros(()))


def learned(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def made_by(result: torch.Tensor) -> Any:
    """The autograd function that computed the tensor of which ``result`` is a view."""
    return result.grad_fn.next_functions[0][0]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_gives_what_its_rows_give_one_at_a_time(kind: str) -> None:
    name, arguments, attention, in_chunks = ARCHITECTURES[kind]
    base = build(name, arguments)
    own = base.config._attn_implementation
    rows = rows_of(ROW_LENGTHS)
    targets = [name for name in adaptable_layers(base) if name.split(".")[-1] not in ("lm_head", "router", "out_proj")]
    model = adapt(base, Adapter(r=3, target_modules="all-linear"), targets, fused=False)
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            nn.init.normal_(weight, std=0.3)
    model.eval()  # some architectures have dropout in training
    expected = one_at_a_time(model, rows)
    wanted = learned(model, expected)

    fuse(base)
    assert enable_packing(model, "auto") is (attention is not None)
    assert base.config._attn_implementation == (ROWS_ALONE if attention == ROWS else own)
    with evaluating(model):
        head = frozen_head(model)
    assert (head is not None) is in_chunks
    with torch.no_grad():  # also rows without boundaries, for which no masks are made from now on
        assert one_at_a_time(model, rows).item() == pytest.approx(expected.item(), rel=1e-5)
    if attention is None:
        return
    found = summed_loss(model, packed(rows), head)
    gradients = learned(model, found)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert gradients.keys() == wanted.keys()
    for weight_name, gradient in wanted.items():
        assert float((gradients[weight_name] - gradient).abs().max()) < 1e-5 * scale, weight_name


@pytest.mark.parametrize(
    ("name", "more", "left_out"),
    [
        ("Qwen2Moe", GROUPED | {"num_experts": 2}, {"shared_expert_gate", "lm_head"}),
        ("Mamba", {**SMALL, "state_size": 4}, {"dt_proj", "out_proj", "lm_head"}),
        (
            "Gemma3nText",
            GROUPED
            | {"intermediate_size": [48] * 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
            | {"num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 2}
            | {"layer_types": ["full_attention"] * 2},
            {"correction_coefs", "lm_head"},
        ),
    ],
)
def test_layers_that_are_not_adapted(name: str, more: dict[str, Any], left_out: set[str]) -> None:
    """A gate with one output is too narrow for a rank. PEFT refuses layers whose weights Mamba's kernels read. Gemma 3n
    reads and clips one weight itself in training."""
    model = build(name, more)
    linear = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {key.rpartition(".")[2] for key in linear - adaptable_layers(model).keys()} == left_out
    unquantized = {key.rpartition(".")[2] for key in linear - linear_layers(model).keys()}
    read_past = {"dt_proj", "out_proj", "correction_coefs"}
    assert unquantized == left_out - read_past, "which say what a model takes in 4 bits"
    adapt(model, Adapter(r=2, target_modules="all-linear"), list(adaptable_layers(model)), fused=True)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Olmo", {"clip_qkv": 0.5}),
        ("Olmoe", {"clip_qkv": 0.5, "num_experts": 2, "num_experts_per_tok": 1}),
        ("Llama4Text", {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}),
    ],
)
def test_a_model_may_write_over_what_fused_layers_give_it(name: str, more: dict[str, Any]) -> None:
    base, rows = build(name, GROUPED | more), rows_of((9, 5))
    targets = [layer for layer in adaptable_layers(base) if "router" not in layer]
    results = []
    for fused in (False, True):
        if fused:
            fuse(base)
        torch.manual_seed(0)
        model = adapt(base, Adapter(r=3), targets, fused=fused)
        for weight in (weight for key, weight in model.named_parameters() if "lora_B" in key):
            nn.init.normal_(weight, std=0.3)
        loss = one_at_a_time(model, rows)
        results.append({"loss": loss.detach(), **learned(model, loss)})
        base = model.unload()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_rows_do_not_see_each_other() -> None:
    """The second row's loss does not depend on the first row."""
    model = build("Llama", GROUPED)
    assert enable_packing(model, "auto")
    first, other, second = rows_of((6, 6, 8))

    def loss(*rows: torch.Tensor) -> float:
        return float(summed_loss(model, packed(list(rows))))

    assert loss(first, second) - loss(first) == pytest.approx(loss(second), rel=1e-5)
    assert loss(other, second) - loss(other) == pytest.approx(loss(second), rel=1e-5)


def test_products_that_round_otherwise_for_another_number_of_tokens_do_not_count_as_mixing() -> None:
    """In 4 bits, a GPU uses another kernel for few tokens than for many. A deep model's results then differ by 6%."""
    model = build("Llama", GROUPED).bfloat16()
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.register_forward_hook(lambda _, __, output: output * (1.5 if output.shape[1] < 12 else 1))
    assert enable_packing(model, "auto")


def test_places_that_are_counted_through_count_as_mixing() -> None:
    """The second row's results are the same behind any row of the first's length, but differ when it is alone."""
    model = build("Llama", GROUPED)
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.register_forward_hook(lambda _, __, output: output + 0.1 * torch.arange(output.shape[1])[:, None])
    assert not enable_packing(model, "auto")


def test_a_little_of_another_row_counts_as_mixing() -> None:
    """It is too little to be told from rounding where the row is alone, but not behind another row."""
    model = build("Llama", GROUPED)
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.register_forward_hook(lambda _, __, output: output + 1e-4 * output[:, :1])
    assert not enable_packing(model, "auto")


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the logits of 37 rows and 31 tokens into chunks of 20 and 17 rows (17 is not a rounded size). Cut each chunk
    into blocks of 12 or 13 tokens, the last of 7 or 5. Take the softmax of a few rows at a time."""
    for name, value in {"ROWS": 20, "COLUMNS": 4, "LOGITS": 20 * 12, "CACHED": 3 * 12}.items():
        monkeypatch.setattr(f"lora_cli.evaluation.head.{name}", value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_words_that_cannot_be_had_take_no_part_in_the_loss(
    scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias is -inf for whole blocks of the vocabulary, the first and the last."""
    small_blocks(monkeypatch)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 6, generator=draw).to(dtype).requires_grad_()
    heads = [nn.Linear(6, words, dtype=dtype).requires_grad_(False) for words in (31, 5)]
    heads[0].bias[:13], heads[0].bias[18:] = -torch.inf, -torch.inf
    heads[1].weight.copy_(heads[0].weight[13:18])
    heads[1].bias.copy_(heads[0].bias[13:18])
    targets = torch.randint(5, (37,), generator=draw)
    found, wanted = (
        (loss := Head(head, scale, None).summed_loss(hidden, targets + first), *torch.autograd.grad(loss, hidden))
        for head, first in zip(heads, (13, 0), strict=True)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5 * scale)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (1e4, None), (1.0, 2.0), (1.7, 1.5)])
def test_the_loss_in_chunks_is_the_plain_one(
    scale: float, cap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(6, 31, bias=bias, dtype=torch.float64).requires_grad_(False)
    targets = torch.randint(31, (37,), generator=draw)

    def by_hand() -> torch.Tensor:
        logits = scale * head(hidden)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return (logits.logsumexp(1) - logits[torch.arange(37), targets]).sum()

    (wanted,) = torch.autograd.grad(3 * by_hand(), hidden)
    loss = Head(head, scale, cap).summed_loss(hidden, targets)
    (found,) = torch.autograd.grad(3 * loss, hidden)
    assert loss.item() == pytest.approx(by_hand().item(), rel=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12 * max(1.0, scale))
    arguments = (head.weight, head.bias, targets, scale, cap, True)
    assert torch.autograd.gradcheck(lambda h: LinearCrossEntropy.apply(h, *arguments), (hidden,))
    with torch.no_grad():
        assert Head(head, scale, cap).summed_loss(hidden, targets).item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_in_16_bits_the_loss_in_chunks_is_as_near_as_its_logits(
    cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 6, generator=draw).bfloat16().requires_grad_()
    head = nn.Linear(6, 31, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    targets = torch.randint(31, (37,), generator=draw)
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ head.weight.double().T
    logits = logits + (logits.detach().bfloat16() - logits.detach())  # rounded like a product in 16 bits
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    wanted = (logits.logsumexp(1) - logits[torch.arange(37), targets]).sum()
    loss = Head(head, 1.0, cap).summed_loss(hidden, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    (slope,), (found,) = torch.autograd.grad(wanted, exact), torch.autograd.grad(loss, hidden)
    assert float((found - slope).norm() / slope.norm()) < 2**-7


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the 40 supervised of 62 positions are multiplied by the head, and only one chunk's logits exist at once."""
    monkeypatch.setattr("lora_cli.evaluation.head.ROWS", 16)
    model = build("Llama", GROUPED)
    assert enable_packing(model, "auto")
    with evaluating(model.eval()):
        head = frozen_head(model)
    batch = packed(rows_of((30, 32)))
    batch = replace(batch, **{name: getattr(batch, name)[:40] for name in ("predict_from", "supervised", "targets")})
    shapes: list[torch.Size] = []
    multiplied = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (97,):
                nonlocal multiplied
                shapes.append(result.shape)
                multiplied += len(result) if function is torch.ops.aten.mm.out else 0
            return result

    with Watch():
        summed_loss(model, batch, head)
    assert multiplied == 40
    transposed_head = torch.Size([32, 97])
    assert max(shape.numel() for shape in shapes if shape != transposed_head) == 16 * 97


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_fused_lora_is_the_formula(device: str, transposed: bool, bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device)

    x, a, b = normal(6, 5).requires_grad_(), normal(2, 5).requires_grad_(), normal(4, 2).requires_grad_()
    weight = normal(5, 4) if transposed else normal(4, 5)
    offset = normal(4) if bias else None

    def fused(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return LoraProducts.apply(x, None, None, (LayerSpec(0.7, transposed, None),), weight, offset, a, b)[0]

    wanted = x @ (weight if transposed else weight.T) + 0.7 * x @ a.T @ b.T + (0 if offset is None else offset)
    torch.testing.assert_close(fused(x, a, b), wanted)
    assert torch.autograd.gradcheck(fused, (x, a, b))


@pytest.mark.parametrize("device", DEVICES)
def test_fused_layers_of_one_input_are_the_formula_each(device: str) -> None:
    """One layer has rank 2 and a bias, one has no adapter, one has rank 1 and a transposed weight."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((6, 5), (2, 5), (4, 2), (1, 5), (6, 1), (4, 5), (3, 5), (5, 6), (4,))
    drawn = [torch.randn(*size, generator=draw, dtype=torch.float64).to(device) for size in sizes]
    (x, *adapters), weights, bias = [each.requires_grad_() for each in drawn[:5]], drawn[5:8], drawn[8]
    empty = x.new_empty(0, 5), x.new_empty(3, 0)
    kinds = (LayerSpec(0.7, False, None), LayerSpec(1, False, None), LayerSpec(1.3, True, None))

    def fused(x: torch.Tensor, *adapters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers = ((bias, *adapters[:2]), (None, *empty), (None, *adapters[2:]))
        tensors = [each for weight, layer in zip(weights, layers, strict=True) for each in (weight, *layer)]
        return LoraProducts.apply(x, None, None, kinds, *tensors)

    a, b, other_a, other_b = adapters
    first = x @ weights[0].T + bias + 0.7 * x @ a.T @ b.T
    wanted = first, x @ weights[1].T, x @ weights[2] + 1.3 * x @ other_a.T @ other_b.T
    torch.testing.assert_close(fused(x, *adapters), wanted)
    assert torch.autograd.gradcheck(fused, (x, *adapters))
    assert torch.autograd.gradcheck(lambda *adapters: fused(x.detach(), *adapters), adapters)


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook"])
def test_layers_of_one_input_go_together_but_for_a_hook(hook: str) -> None:
    """As in attention and gated MLPs. The results are those of each layer alone."""
    torch.manual_seed(0)
    base = build("Llama", GROUPED | {"num_hidden_layers": 1})
    model = adapt(base, Adapter(r=2), ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"], True)
    attention = model.base_model.model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    for layer in layers[::2]:
        nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 5, SMALL["hidden_size"])
    calls: list[int] = []
    found = []
    for hooked in (False, True):
        if hooked:
            getattr(attention.k_proj, hook)(lambda *_: calls.append(1))
        inputs = x.clone().requires_grad_()
        made = apply_layers(layers, inputs)
        assert (made_by(made[0]) is made_by(made[1]) is made_by(made[2])) is not hooked
        sum(each.square().sum() for each in made).backward()
        weights = [each for each in model.parameters() if each.requires_grad]
        found.append([*(each.detach() for each in made), inputs.grad, *(each.grad for each in weights)])
        model.zero_grad()
    assert calls == [1]
    for together, apart in zip(*found, strict=True):
        assert float((together - apart).norm() / apart.norm()) < 1e-5


def test_frozen_layers_of_one_input_do_not_keep_it() -> None:
    layers = [nn.Linear(5, width).requires_grad_(False) for width in (3, 4)]
    x = torch.randn(2, 5, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda t: t):
        made = apply_layers(layers, x)
    assert made_by(made[0]) is made_by(made[1])
    assert x.shape not in kept
    sum(each.sum() for each in made).backward()
    torch.testing.assert_close(x.grad, sum(layer.weight.sum(0) for layer in layers).expand(2, 5))


def test_a_gate_before_fused_lora_is_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = ((6, 5), (6, 5), (2, 5), (4, 2))
    gate, x, a, b = (torch.randn(*size, generator=draw, dtype=torch.float64).requires_grad_() for size in sizes)
    weight = torch.randn(4, 5, generator=draw, dtype=torch.float64)

    def fused(gate: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return LoraProducts.apply(x, gate, None, (LayerSpec(0.7, False, None),), weight, None, a, b)[0]

    gated = gate / (1 + (-gate).exp()) * x
    torch.testing.assert_close(fused(gate, x, a, b), gated @ weight.T + 0.7 * gated @ a.T @ b.T)
    assert torch.autograd.gradcheck(fused, (gate, x, a, b))
    assert torch.autograd.gradcheck(lambda gate: fused(gate, x.detach(), a, b), (gate,))


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_before_fused_lora_is_the_formula_and_made_again(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 8), (2, 8), (4, 2), (8,), (4, 8))
    drawn = [torch.randn(*size, generator=draw, dtype=torch.float64).to(device) for size in sizes]
    (x, a, b), (scale, weight) = [each.requires_grad_() for each in drawn[:3]], drawn[3:]
    kept = []

    def fused(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y, kinds = normed(x, scale, 0.1), (LayerSpec(0.7, False, None),)
        with torch.autograd.graph.saved_tensors_hooks(lambda each: (kept.append(each), each)[1], lambda each: each):
            return LoraProducts.apply(y.flatten(0, 1), None, norm_inputs_of(y), kinds, weight, None, a, b)[0]

    y = (x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * scale).flatten(0, 1)
    torch.testing.assert_close(fused(x, a, b), y @ weight.T + 0.7 * y @ a.T @ b.T)
    assert [each.shape for each in kept if each.numel() == y.numel()] == [x.shape], "the norm's input alone"
    assert kept[0].data_ptr() == x.data_ptr()
    assert torch.autograd.gradcheck(fused, (x, a, b))


def test_layers_need_not_keep_what_a_norm_has_made() -> None:
    base = build("Llama", GROUPED | {"num_hidden_layers": 1})
    targets = [f"model.layers.0.self_attn.{each}_proj" for each in "qkv"]
    model = adapt(base, Adapter(r=2), targets, fused=True)
    layers = [model.get_submodule(f"base_model.model.{each}") for each in targets]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(1, 7, 32, requires_grad=True)
    y = normed(x, torch.rand(32), 0.1)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    gradients = []
    for given in (y, y.clone()):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = apply_layers(layers, given)
        assert (given.data_ptr() in kept) == (given is not y)
        trained = [x, *(weight for weight in model.parameters() if weight.requires_grad)]
        gradients.append(torch.autograd.grad(sum(each.sum() for each in outputs), trained, retain_graph=True))
    torch.testing.assert_close(*gradients)
    assert norm_inputs_of(y) is not None
    y.mul_(2)
    assert norm_inputs_of(y) is None, "it is no longer what it was made to be"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("targets", [PROJECTIONS, ("down_proj",), ("gate_proj", "down_proj"), ("gate_proj",)])
def test_a_fused_mlp_gives_what_pefts_layers_give_and_on_a_gpu_keeps_its_inputs_alone(
    targets: tuple[str, ...], device: str
) -> None:
    gradients, kept = [], []
    for is_fused in (True, False):
        torch.manual_seed(0)
        base = build("Llama", GROUPED | {"num_hidden_layers": 1}).to(device)
        if is_fused:
            fuse(base)
        model = adapt(base, Adapter(r=2), [f"model.layers.0.mlp.{each}" for each in targets], is_fused)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight)
        wide: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, wide: dict[int, torch.Tensor] = wide) -> torch.Tensor:
            if tensor.shape[-1] == SMALL["intermediate_size"] and tensor.numel() == 17 * SMALL["intermediate_size"]:
                wide[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=torch.arange(3, 20, device=device)[None]).logits.square().mean()
        loss.backward()
        kept.append(len(wide))
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert float((gradients[0][name] - gradient).norm() / gradient.norm()) < 1e-4, name
    assert kept[0] == min(2, kept[1]) if device == "cuda" else kept[0] <= kept[1]
    assert len(targets) < 3 or kept[1] > 2


@pytest.mark.parametrize("device", DEVICES)
def test_fused_lora_in_16_bits_is_the_formula_to_its_rounding(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = ((70, 48), (8, 48), (32, 8), (32, 48), (70, 32))
    x, a, b, weight, along = (torch.randn(*size, generator=draw).to(device) for size in sizes)
    leaves = [x.bfloat16().requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = LoraProducts.apply(leaves[0], None, None, (LayerSpec(0.7, False, None),), weight.bfloat16(), None, *leaves[1:])[
        0
    ]
    wanted = exact[0] @ weight.bfloat16().double().T + 0.7 * exact[0] @ exact[1].T @ exact[2].T
    assert float((y.detach() - wanted.detach()).norm() / wanted.detach().norm()) < 0.01
    y.backward(along.bfloat16())
    wanted.backward(along.bfloat16().double())
    for leaf, each in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and each.grad is not None and leaf.grad.dtype == leaf.dtype
        assert float((leaf.grad - each.grad).norm() / each.grad.norm()) < 0.01


@NEEDS_GPU
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(256, 64), (48, 1024), (100, 96)])
def test_codes_expand_on_a_gpu_to_the_numbers_of_bitsandbytes(shape: tuple[int, int], kind: str) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    codes, state = quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    assert torch.equal(dequantize(codes, state), dequantize_4bit(codes, state))


@NEEDS_GPU
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_loss_on_a_gpu_is_the_plain_one(cap: float | None) -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 5000, bias=False, device="cuda").requires_grad_(False)
    hidden, targets = torch.randn(3000, 64, device="cuda", requires_grad=True), torch.arange(3000, device="cuda")
    loss = Head(module, 0.5, cap).summed_loss(hidden, targets)
    (found,) = torch.autograd.grad(loss, hidden)
    z = 0.5 * (hidden @ module.weight.T)
    wanted = nn.functional.cross_entropy(z if cap is None else cap * torch.tanh(z / cap), targets, reduction="sum")
    (slope,) = torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    assert float((found - slope).norm() / slope.norm()) < 1e-2  # Liger multiplies float32 in the GPU's precision


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_fused_layers_give_what_pefts_give(kind: str) -> None:
    def layer(fused: bool) -> Any:
        torch.manual_seed(0)
        holder = nn.Module()
        holder.config = {"model_type": "none"}  # type: ignore[assignment]
        holder.proj = Conv1D(24, 16) if kind == "conv1d" else nn.Linear(16, 24)
        if kind == "nf4":
            from bitsandbytes.nn import Linear4bit, Params4bit

            weight = holder.proj.weight.data
            holder.proj = Linear4bit(16, 24, compute_dtype=torch.float32, quant_type="nf4")
            holder.proj.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
            holder.proj.to("cpu")
            patch_4bit_layers(holder)
            holder.is_loaded_in_4bit = True  # type: ignore[assignment]
        holder.requires_grad_(False)
        holder.prepare_inputs_for_generation = None  # type: ignore[assignment]
        adapted = adapt(holder, Adapter(r=2), ["proj"], fused)  # type: ignore[arg-type]
        nn.init.normal_(adapted.base_model.model.proj.lora_B["default"].weight)
        return adapted.base_model.model.proj

    fused, plain = layer(True), layer(False)
    assert type(fused) is not type(plain)
    assert isinstance(fused, type(plain))
    torch.manual_seed(1)
    x = torch.randn(3, 7, 16)
    for each in (fused, plain):
        each.train()
        inputs = x.clone().requires_grad_()
        each.outputs = each(inputs)
        each.outputs.square().sum().backward()
        each.seen = inputs.grad
    torch.testing.assert_close(fused.outputs, plain.outputs)
    torch.testing.assert_close(fused.seen, plain.seen)
    for (name, found), (_, wanted) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, msg=name)
    assert "LoraProducts" in str(made_by(fused.outputs))


@pytest.mark.parametrize("state", ["disabled", "merged", "two adapters", "a bias"])
def test_fused_layers_in_pefts_other_states_give_what_pefts_give(state: str) -> None:
    name, results = "model.layers.0.self_attn.q_proj", []
    for fused in (True, False):
        base = build("Llama", GROUPED | {"num_hidden_layers": 1, "attention_bias": True})
        config = LoraConfig(r=2, target_modules=[name], lora_bias=state == "a bias")
        if fused:
            register(config, [base.get_submodule(name)])
        model = get_peft_model(base, config)
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        assert isinstance(layer, Fused) is fused
        if state == "two adapters":
            model.add_adapter("other", config)
            model.base_model.set_adapter(["default", "other"])
        for key, weight in layer.named_parameters():
            if "lora_" in key:
                nn.init.normal_(weight)
        if state == "merged":
            model.merge_adapter()
        with model.disable_adapter() if state == "disabled" else nullcontext():
            results.append(layer(torch.ones(1, 5, 32)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("changes", [{"adapter.lora_dropout": 0.3}, {"adapter.use_dora": True}])
def test_dropout_and_dora_keep_pefts_path(
    changes: dict[str, Any], write_recipe: Any, lora: Any, tmp_path: Any, no_curves: None
) -> None:
    runs = []
    for fused in (True, False):
        folder = tmp_path / f"fused-{fused}"
        recipe = write_recipe(changes | {"adapter.fused": fused, "training.output_dir": str(folder)})
        done(lora("train", recipe))
        runs.append(Run(folder))
    assert runs[0].adapter_bytes == runs[1].adapter_bytes


def test_adapter_fused_takes_our_products_or_pefts_layers(
    write_recipe: Any, lora: Any, tmp_path: Any, no_curves: None, monkeypatch: Any
) -> None:
    calls: list[int] = []
    original: Callable[..., Any] = LoraProducts.apply
    monkeypatch.setattr(LoraProducts, "apply", lambda *arguments: (calls.append(1), original(*arguments))[1])
    losses, counted = [], []
    for fused in (True, False):
        calls.clear()
        folder = tmp_path / f"fused-{fused}"
        done(lora("train", write_recipe({"adapter.fused": fused, "training.output_dir": str(folder)})))
        counted.append(len(calls))
        losses.append(Run(folder).losses)
    assert counted[0] > 0
    assert counted[1] == 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pefts_own_layers_stand_where_fused_ones_are_off() -> None:
    base = build("Llama", GROUPED)
    model = adapt(base, Adapter(r=2), ["model.layers.0.self_attn.q_proj"], fused=False)
    assert type(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")) is Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4, 9])
def test_a_sink_takes_its_share_of_each_rows_attention(window: int | None, dtype: torch.dtype) -> None:
    """Its score takes part in the softmax over the visible tokens, whatever the window, but it has no value."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 16, 8, generator=draw).to(dtype) for heads in (4, 2, 2))
    q[..., 0], k[..., 0] = 10, 13
    sinks = (39 + torch.randn(4, generator=draw)).to(dtype)  # near the scores, 0.3 * 130: rounding would show
    lengths = (9, 1, 6)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found, _ = attend_by_rows(nn.Module(), q, k, v, None, 0.3, 0.0, window, starts, s_aux=sinks)
    wanted = []
    for one, two, three in zip(*(torch.split(part.double(), lengths, dim=2) for part in (q, k, v)), strict=True):
        distance = torch.arange(one.shape[2])[:, None] - torch.arange(one.shape[2])
        scores = 0.3 * one @ two.repeat_interleave(2, dim=1).transpose(2, 3)
        weights = scores.masked_fill((distance < 0) | (distance >= (window or 16)), -torch.inf).exp()
        shares = weights / (weights.sum(-1, keepdim=True) + sinks.double().exp().view(1, 4, 1, 1))
        wanted.append((shares @ three.repeat_interleave(2, dim=1)).transpose(1, 2))
    rounding = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(found.double(), torch.cat(wanted, dim=1), **rounding)
    alone, _ = attend_by_rows(nn.Module(), *(part[:, :, :9] for part in (q, k, v)), None, 0.3, 0.0, window, s_aux=sinks)
    assert torch.equal(alone, found[:, :9])
    with pytest.raises(ValueError, match="sinks beside a mask"):
        attend_by_rows(nn.Module(), q, k, v, torch.ones(1, 1, 16, 16, dtype=torch.bool), s_aux=sinks)
    with pytest.raises(ValueError, match="softcap, position_bias"):
        attend_by_rows(nn.Module(), q, k, v, None, softcap=50.0, position_bias=q[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [[0, 5, 6, 9], None])
def test_attention_by_rows_drops_weights_out(starts: list[int] | None, dtype: torch.dtype) -> None:
    """A row's first token sees only itself: dropout of a half leaves nothing of its value or doubles it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 32, 9, 8).to(dtype) for _ in range(3))
    bounds = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    found, _ = attend_by_rows(nn.Module(), q, k, v, None, dropout=0.5, cu_seq_lens_q=bounds, max_length_q=5)
    for first in [0] if starts is None else starts[:-1]:
        results, values = found[0, first], v[0, :, first]
        doubled = (results == 2 * values).all(1)
        assert (doubled | (results == 0).all(1)).all() and 4 < doubled.sum() < 28


def test_attention_with_a_mask_is_that_of_the_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., 1:, 0] = False
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    found, _ = attend_by_rows(nn.Module(), q, k, v, mask, cu_seq_lens_q=starts, max_length_q=4)
    weights = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (weights @ v).transpose(1, 2))


@pytest.mark.parametrize(
    ("dtype", "width", "of_values", "capability", "groups"),
    [
        (torch.bfloat16, 128, 128, (8, 0), 2),
        (torch.bfloat16, 512, 512, (8, 0), 1),
        (torch.bfloat16, 100, 100, (8, 0), 1),
        (torch.bfloat16, 192, 128, (8, 0), 1),
        (torch.float32, 128, 128, (9, 0), 1),
        (torch.float16, 128, 128, (7, 5), 1),
    ],
)
def test_on_a_gpu_only_flash_attention_is_given_groups(
    dtype: torch.dtype,
    width: int,
    of_values: int,
    capability: tuple[int, int],
    groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For any other of its kernels torch would store all scores. Tensors without data stand in for a GPU's."""
    heads: list[int] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool, **_: Any) -> torch.Tensor:
        assert enable_gqa == (query.shape[1] > key.shape[1])
        heads.append(query.shape[1] // key.shape[1])
        return query

    monkeypatch.setattr("lora_cli.model.fast_paths.attention.scaled_dot_product_attention", attend)
    monkeypatch.setattr("lora_cli.model.fast_paths.attention.is_from_ampere_on", lambda _: capability >= (8, 0))
    with FakeTensorMode():
        shapes = ((1, 4, 6, width), (1, 2, 6, width), (1, 2, 6, of_values))
        q, k, v = (torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)
        _fused(q, k, v, 1.0, None, 0.0, None)
    assert heads == [groups]


def test_attention_of_mixed_dtypes_is_computed_in_autocasts() -> None:
    """On a GPU, a 4-bit key projection with DoRA returns float32, an unadapted query projection 16 bits."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 8).bfloat16() for heads in (4, 2, 2))
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        parts = [each.detach().to(own).requires_grad_() for each, own in ((q, q.dtype), (k, dtype), (v, dtype))]
        with torch.autocast("cpu", torch.bfloat16):
            result, _ = attend_by_rows(nn.Module(), *parts, None, cu_seq_lens_q=starts)
        result.float().square().sum().backward()
        found.append([result, *(each.grad.bfloat16() for each in parts)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_row_lengths_are_read_once_for_all_layers() -> None:
    """Each read would make the host wait for the GPU."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten.sub.Tensor and args[0].dtype == torch.int32
            return func(*args, **(kwargs or {}))

    model = build("Llama", GROUPED)
    assert enable_packing(model, "auto")
    starts = torch.tensor([0, *np.cumsum(ROW_LENGTHS)], dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in ROW_LENGTHS])[None]
    with Reads() as reads:
        model(input_ids=places, **packed_row_arguments(places, starts, max(ROW_LENGTHS)))
    assert model.config.num_hidden_layers == 2
    assert reads.count == 1


@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize(("key_heads", "width", "scores"), [(2, 8, 2**24), (2, 6, 2**24), (4, 6, 2**24), (4, 8, 2**16)])
def test_attention_in_16_bits_is_that_of_each_row_alone(
    window: int | None, key_heads: int, width: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention weights are kept, recomputed or never stored; rows have one block or several, alone or together.
    Expected is softmax(q k^T / sqrt(8)) v, written out in float64."""
    monkeypatch.setattr("lora_cli.model.fast_paths.row_products.MAX_SCORES", scores)
    torch.manual_seed(0)
    lengths = (300, 1, 40, MAX_SAVED_TOKENS, 30, MAX_SAVED_TOKENS + 1, 310, MAX_UNBLOCKED_TOKENS, 1100)
    total = sum(lengths)
    shapes = ((4, total, 8), (key_heads, total, 8), (key_heads, total, width))
    given = [torch.randn(1, *shape).bfloat16() for shape in shapes]
    q, k, v = (tensor.requires_grad_() for tensor in given)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found, _ = attend_by_rows(nn.Module(), q, k, v, None, sliding_window=window, cu_seq_lens_q=starts)
    assert found.shape == (1, total, 4, width)
    frozen = (tensor.detach() for tensor in (q, k, v))
    apart, _ = attend_by_rows(nn.Module(), *frozen, None, sliding_window=window, cu_seq_lens_q=starts)

    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    wide = [exact[0], *(each.repeat_interleave(4 // key_heads, dim=1) for each in exact[1:])]
    rows = []
    for start, length in zip(starts.tolist(), lengths, strict=False):
        one, two, three = (each[0, :, start : start + length] for each in wide)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= (window or length))
        weights = (one @ two.transpose(1, 2) / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        rows.append((weights @ three).transpose(0, 1))
    wanted = torch.cat(rows)[None]

    def far(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one.double() - other).norm() / other.norm())

    assert far(found.detach(), wanted.detach()) < 0.01
    assert far(apart, wanted.detach()) < 0.01
    slope = torch.randn(wanted.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(found, (q, k, v), slope.bfloat16())
    for gradient, right in zip(gradients, torch.autograd.grad(wanted, exact, slope), strict=True):
        assert far(gradient, right) < 0.015


@pytest.mark.parametrize("short", [0, 1024])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_by_products_has_the_slope_of_its_numbers(
    window: int | None, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention weights are kept or recomputed, in several blocks of a row alone, and of two rows in one product."""
    for name, value in (
        ("BLOCK_TOKENS", 8),
        ("MAX_UNBLOCKED_TOKENS", 8),
        ("MIN_BLOCK_TOKENS", 8),
        ("PAD_MULTIPLE", 8),
        ("MAX_PADDING_SCORES", 1),
        ("MAX_SAVED_TOKENS", short),
    ):
        monkeypatch.setattr(f"lora_cli.model.fast_paths.row_products.{name}", value)
    lengths = (17, 1, 5)
    _layouts.cache_clear()
    assert [rows.matrices for rows in _layouts(lengths, 2, 2)[0].rows] == [2 * 2, 2]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 23, 2, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *given: RowProducts.apply(*given, lengths, 0.6, window), (q, k, v))


def test_rows_go_through_a_product_together_while_their_scores_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one padded length, and shorter ones while the padding adds fewer scores than separate calls are worth."""
    lengths, heads, group = (40, 33, 300, 7, 47, 3, 48, 290), 2, 3
    added = heads * group * 2 * (64**2 - 32**2)  # when the two shortest are padded to 64 tokens
    for together, spared, groups in (
        (2**22, 1, [2, 4, 2]),
        (heads * group * 64 * 64 * 3, 1, [2, 3, 1, 1, 1]),
        (1, 1, [1] * 8),
        (2**22, added, [2, 4, 2]),
        (2**22, added + 1, [6, 2]),
    ):
        monkeypatch.setattr("lora_cli.model.fast_paths.row_products.MAX_SHARED_SCORES", together)
        monkeypatch.setattr("lora_cli.model.fast_paths.row_products.MAX_PADDING_SCORES", spared)
        _layouts.cache_clear()
        queries, keys = _layouts(lengths, heads, group)
        for layout in (queries, keys):
            assert [rows.matrices for rows in layout.rows] == [heads * count for count in groups]
        line = torch.arange(sum(lengths) * heads * group).view(1, sum(lengths), heads * group, 1)
        laid = queries.gather(line)
        assert torch.equal(queries.ungather(laid), line)
        assert len(laid) == heads * group * ((6 * 64 if groups[0] == 6 else 2 * 32 + 4 * 64) + 2 * 320)
    _layouts.cache_clear()


def test_sizes_are_rounded_up_by_an_eighth_at_most_to_eight_between_powers_of_two() -> None:
    sizes = np.arange(1, 5000)
    up = np.array([rounded_size(int(size)) for size in sizes])
    assert (up >= sizes).all() and (up - sizes < np.minimum(64, np.maximum(1, sizes / 8 + 1e-9))).all()
    assert sorted(set(up[(sizes > 128) & (sizes <= 256)].tolist())) == list(range(144, 257, 16))
    assert [rounded_size(size) for size in (9, 17, 1479, 1536)] == [9, 18, 1536, 1536]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_in_16_bits_a_processor_takes_lines_of_few_lengths(name: str, dtype: torch.dtype) -> None:
    """69 tokens are padded to 72; the last 3 add nothing to the loss and its gradient."""
    model = build(name, GROUPED if name == "Llama" else {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 70})
    targets = list(adaptable_layers(model))
    assert enable_packing(model, "auto")
    base = model.to(dtype)
    adapted = adapt(base, Adapter(r=2), targets, fused=True).eval()
    for weight in adapted.parameters():
        nn.init.normal_(weight, std=0.02) if weight.requires_grad else None
    seen: list[int] = []
    base.get_input_embeddings().register_forward_hook(lambda *passed: seen.append(passed[-1].shape[1]))
    rows = rows_of((69,))
    found = learned(adapted, summed_loss(adapted, packed(rows)))
    assert seen == [72 if dtype == torch.bfloat16 else 69]
    loss = summed_loss(adapted, packed(rows))
    alone = one_at_a_time(adapted, rows)
    near = 1e-5 if dtype == torch.float32 else 5e-3
    assert loss.item() == pytest.approx(alone.item(), rel=near)
    for key, wanted in learned(adapted, alone).items():
        assert (found[key] - wanted).norm() <= 10 * near * wanted.norm()


@pytest.mark.parametrize(("dtype", "method"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")])
def test_a_model_that_mixes_rows_is_padded_and_says_so(
    dtype: str, method: str | None, tokenizer: Any, write_recipe: Any, lora: Any, tmp_path: Any, no_curves: None
) -> None:
    """Bloom counts positions across packed rows. With usual weights, 16-bit rounding hides most of the difference."""
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4)
    torch.manual_seed(0)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    changes = {"model": {"name_or_path": tmp_path / "bloom", "dtype": dtype}, "data.packing": True}
    changes |= {"quantization": method and {"method": method}, "training.max_steps": 1}
    result = done(lora("train", write_recipe(changes)))
    assert "this architecture does not support packed rows; rows of similar length are padded instead" in result.stderr
    assert Run(tmp_path / "run").info["data"]["packed"] is False


def test_rows_whose_line_would_be_longer_than_a_models_masks_are_padded(
    tokenizer: Any, write_recipe: Any, lora: Any, tmp_path: Any
) -> None:
    """GPT-Neo's masks have the length of its longest row, which packed rows exceed."""
    config = transformers.GPTNeoConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_heads=4,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=24,
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    tokenizer.save_pretrained(tmp_path / "neo")
    changes = {"model": {"name_or_path": tmp_path / "neo"}, "data.packing": True, "training.max_steps": 1}
    done(lora("train", write_recipe(changes)))
    assert Run(tmp_path / "run").info["data"]["packed"] is False


def test_rows_are_packed_in_8_bits_which_mix_those_of_any_batch_for_their_outliers(
    tiny_llama: Any, train: Any, tmp_path: Any
) -> None:
    """In each row, about 4 of the first layer's inputs exceed 6, the threshold from which LLM.int8() uses 16 bits."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"] *= 4
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    changes = {"model.name_or_path": base, "data.packing": True, "training.max_steps": 1}
    assert train(changes | {"quantization": {"method": "int8"}}).info["data"]["packed"] is True
    quantized = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized)
    assert enable_packing(model, "auto")
    assert not any(module._forward_hooks for module in model.modules()), "but to look, nothing is computed otherwise"


def test_attention_whose_layers_get_four_dimensions_trains_in_8_bits(tokenizer: Any, train: Any, tmp_path: Any) -> None:
    """DeepSeek-V3's attention."""
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 24, "kv_lora_rank": 16}
    sizes = GROUPED | heads | {"num_key_value_heads": 4, "vocab_size": len(tokenizer), "first_k_dense_replace": 2}
    build("DeepseekV3", sizes).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = {"model.name_or_path": tmp_path / "base", "adapter.target_modules": "all-linear"}
    runs = [train(changes | more) for more in ({}, {"quantization": {"method": "int8"}})]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=0.02)


def test_dora_trains_in_8_bits(train: Any) -> None:
    changes = {"adapter.use_dora": True, "adapter.target_modules": "all-linear"}
    runs = [train(changes | more) for more in ({}, {"quantization": {"method": "int8"}})]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=0.02)


LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("packing", [True, False])
def test_longrope_has_no_row_beside_one_that_turns_its_positions(packing: bool, tokenizer: Any) -> None:
    """One row longer than the original context changes the position embeddings of its whole batch."""
    model = build("Phi3", GROUPED | LONGROPE).eval()
    assert enable_packing(model, "auto")
    bounds = longrope_bounds(model.config)
    assert bounds == [16]
    rows = rows_of((4, 30, 16, 17, 9, 18, 12, 3))
    ids, lengths = torch.cat(rows).numpy(), np.array([len(row) for row in rows])
    offsets = np.concatenate(([0], lengths.cumsum()))
    store = Store(ids, ~np.isin(np.arange(len(ids)), offsets))
    examples = end_to_end(store, offsets, np.zeros(len(rows), np.int32), ("text",))
    in_order, drawn = (
        Schedule(lengths, lengths, examples.source, (1.0,), 0, shuffle, 3, 32, packing, 1, tuple(bounds))
        for shuffle in (False, True)
    )
    assert np.concatenate(in_order.epoch_batches(0)).tolist() == list(range(len(rows)))
    wanted = float(one_at_a_time(model, rows))
    for groups in (
        in_order.epoch_batches(0),
        drawn.epoch_batches(0),
        evaluation_groups(examples, 3, 32, packing, bounds),
    ):
        assert sorted(np.concatenate(groups)) == list(range(len(rows))) and len(groups) < len(rows)
        found = sum(float(summed_loss(model, collate(examples, group, packing, 0))) for group in groups)
        assert found == pytest.approx(wanted, rel=1e-5)
    score = compare(model, Path(), None, tokenizer, examples, 32).score
    assert score.loss * score.tokens == pytest.approx(wanted, rel=1e-5)
    mixed = float(summed_loss(model, collate(examples, range(len(rows)), packing, 0)))
    assert mixed != pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("window", [6, 14])
def test_a_window_that_the_mask_alone_tells_of_is_kept(window: int) -> None:
    """PhiMoE and Qwen2-MoE do not pass their window to attention. The wider one is wider than the rows of the trial."""
    model = build("Phimoe", GROUPED | {"sliding_window": window, "num_local_experts": 2}).eval()
    rows = rows_of((20, 5, 15))
    wanted = float(one_at_a_time(model, rows))
    assert enable_packing(model, "auto")
    assert float(summed_loss(model, packed(rows))) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("width", [64, 80, 96, 688])
def test_rows_of_any_width_are_expanded_rightly(width: int) -> None:
    """On CPUs with AVX512, bitsandbytes 0.50.2 uses wrong scales if a row's width is not a multiple of 64."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    weight, x = torch.randn(24, width), torch.randn(5, width)
    seen = reference.nf4_dequantize(*reference.nf4_codes(weight), (24, width))
    layer = Linear4bit(width, 24, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer.to("cpu").eval()
    patch_4bit_layers(layer)
    for wants_gradient in (False, True):
        given = x.clone().requires_grad_(wants_gradient)
        with torch.set_grad_enabled(wants_gradient):
            torch.testing.assert_close(layer(given), x @ seen.T)
    layer(given).sum().backward()
    torch.testing.assert_close(given.grad, seen.sum(0).expand(5, -1))
    torch.testing.assert_close(dequantize(layer.weight.data, layer.weight.quant_state), seen)
    nf4 = Quantization(method="nf4", double_quant=False)
    torch.testing.assert_close(quantize_dequantize(weight, nf4), seen)
    assert encode(weight, nf4).error == pytest.approx(float((seen - weight).norm()), rel=1e-5)


def test_dora_of_rows_whose_norms_would_be_wrong(tmp_path: Any, tokenizer: Any, write_recipe: Any, lora: Any) -> None:
    """PEFT dequantizes weights itself for DoRA's norms. It is refused where bitsandbytes does so wrongly."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(8, 80, generator=torch.Generator().manual_seed(0))
    right = reference.nf4_dequantize(*reference.nf4_codes(weight), (8, 80))
    codes = quantize_4bit(weight.to(best_device()), blocksize=64, quant_type="nf4")
    is_right = torch.allclose(dequantize_4bit(*codes).cpu(), right)
    config = transformers.LlamaConfig(
        **GROUPED | {"vocab_size": len(tokenizer), "hidden_size": 80, "max_position_embeddings": 128}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    changes = {"model.name_or_path": tmp_path / "narrow", "adapter": {"use_dora": True}, "training.max_steps": 1}
    result = lora("train", write_recipe(changes | {"quantization.method": "nf4"}))
    assert result.exit_code == (0 if is_right else 2), result.stderr
    if not is_right:
        assert "adapter.use_dora" in result.stderr and "q_proj has 80" in result.stderr
        assert not (tmp_path / "run").exists()
    done(lora("train", write_recipe(changes | {"training.output_dir": tmp_path / "unquantized"})))
