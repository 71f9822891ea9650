"""The reference, checked against the libraries before other tests check ``lora`` against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from reference import LoRALinear, Row, adapter_tensors, inject, load_adapter_tensors, train_reference
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from transformers.pytorch_utils import Conv1D

# PEFT 0.21 uses a name that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

R, ALPHA = 4, 6.0
KINDS: dict[str, dict[str, bool]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora-rslora": {"rslora": True, "dora": True},
}
TARGETS = {
    "tiny_gpt2": ("c_attn", "c_proj", "c_fc"),
    "tiny_llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
LENGTHS = (5, 17, 9, 30, 12, 2, 21, 8)


@pytest.fixture(params=TARGETS)
def base(request: pytest.FixtureRequest) -> tuple[Path, tuple[str, ...]]:
    return request.getfixturevalue(request.param), TARGETS[request.param]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def names(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]


def stir(layers: dict[str, LoRALinear], seed: int = 0) -> None:
    """Randomize the adapter in place, so that each of its tensors has an effect."""
    draw = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.A.data.normal_(0, 0.2, generator=draw)
        layer.B.data.normal_(0, 0.2, generator=draw)
        if layer.m is not None:
            layer.m.data.mul_(1 + 0.2 * torch.rand(layer.m.shape, generator=draw, dtype=layer.m.dtype))


def rows(vocabulary: int, seed: int = 0) -> list[Row]:
    """Random rows whose first third is not supervised."""
    draw = torch.Generator().manual_seed(seed)
    made: list[Row] = []
    for length in LENGTHS:
        ids = torch.randint(vocabulary, (length,), generator=draw).tolist()
        made.append((ids, [reference.IGNORED] * (length // 3) + ids[length // 3 :]))
    return made


def with_peft(folder: Path, targets: tuple[str, ...], layers: dict[str, LoRALinear], **kind: bool) -> Any:
    """The same base with the same adapter, as a PEFT model."""
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(targets),
        use_rslora=kind.get("rslora", False),
        use_dora=kind.get("dora", False),
        fan_in_fan_out="c_attn" in targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(folder), config)
    tensors = adapter_tensors(layers)
    assert tensors.keys() == get_peft_model_state_dict(model).keys()
    assert not set_peft_model_state_dict(model, tensors).unexpected_keys
    return model


def by_short_name(peft_model: Any) -> dict[str, Tensor]:
    """PEFT's trainable parameters under the names of an adapter file."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            found[name.replace(".default.weight", "" if "magnitude" in name else ".weight")] = parameter
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_pefts(base: tuple[Path, tuple[str, ...]], kind: str) -> None:
    folder, targets = base
    model = load(folder)
    layers = inject(model, names(model, targets), R, ALPHA, **KINDS[kind])
    assert len(layers) == len(names(load(folder), targets)) > 0
    stir(layers)
    peft_model = with_peft(folder, targets, layers, **KINDS[kind])
    ids = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))

    ours, theirs = model(input_ids=ids).logits, peft_model(input_ids=ids).logits
    assert (ours - load(folder)(input_ids=ids).logits).abs().max() > 0.1
    assert_close(ours, theirs, atol=1e-5 * float(theirs.detach().abs().max()), rtol=1e-5)

    for logits in (ours, theirs):
        logits.log_softmax(-1)[..., 0].mean().backward()
    expected = by_short_name(peft_model)
    gradients = {key: parameter.grad for key, parameter in reference._under_peft_names(layers).items()}
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 1e-6, key
        assert_close(gradient, expected[key].grad, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert all(parameter.grad is None for layer in layers.values() for parameter in layer.base.parameters())


def test_worked_by_hand() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.eye(2), torch.tensor([0.5, -0.5])
    adapted = LoRALinear(layer, r=1, alpha=2)
    adapted.A.data, adapted.B.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    # A x = 3, s B A x = 2 (9, 12), on top of x + b.
    assert adapted(torch.ones(1, 2)).tolist() == [[1 + 0.5 + 18, 1 - 0.5 + 24]]
    adapted.merge()
    assert layer.weight.tolist() == [[1 + 6, 12], [8, 1 + 16]]


def test_four_ranks_of_rslora_are_scaled_twice_as_much() -> None:
    assert LoRALinear(nn.Linear(8, 8), r=4, alpha=6).scaling == 1.5
    assert LoRALinear(nn.Linear(8, 8), r=4, alpha=6, rslora=True).scaling == 3.0


def test_only_linear_layers_are_adapted() -> None:
    with pytest.raises(TypeError, match="Embedding"):
        LoRALinear(nn.Embedding(4, 4), r=2, alpha=2)


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_the_base(base: tuple[Path, tuple[str, ...]], kind: str) -> None:
    folder, targets = base
    model = load(folder)
    ids = torch.arange(24)[None]
    before = model(input_ids=ids).logits
    inject(model, names(model, targets), R, ALPHA, **KINDS[kind])
    after = model(input_ids=ids).logits
    assert_close(after, before, atol=1e-5, rtol=1e-5) if "dora" in kind else assert_close(after, before, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_keeps_the_function_and_unmerge_the_weights(base: tuple[Path, tuple[str, ...]], kind: str) -> None:
    folder, targets = base
    model = load(folder, torch.float64)
    layers = inject(model, names(model, targets), R, ALPHA, **KINDS[kind])
    stir(layers)
    original = {name: layer.base.weight.clone() for name, layer in layers.items()}
    ids = torch.arange(24)[None]
    adapted = model(input_ids=ids).logits

    for layer in layers.values():
        layer.merge()
    assert_close(model(input_ids=ids).logits, adapted, atol=1e-12, rtol=1e-12)
    for name, layer in layers.items():
        before = original[name].T if isinstance(layer.base, Conv1D) else original[name]
        update = ALPHA / (R**0.5 if "rslora" in kind else R) * torch.einsum("or,ri->oi", layer.B, layer.A)
        expected = before + update
        if layer.m is not None:
            expected = torch.stack([m * row / (row @ row).sqrt() for m, row in zip(layer.m, expected, strict=True)])
        merged = layer.base.weight.T if isinstance(layer.base, Conv1D) else layer.base.weight
        assert_close(merged, expected.detach(), atol=1e-14, rtol=1e-14, check_stride=False)

    for name, layer in layers.items():
        layer.unmerge()
        assert_close(layer.base.weight.detach(), original[name], atol=1e-14, rtol=1e-14)
        with pytest.raises(RuntimeError, match="not merged"):
            layer.unmerge()


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_what_peft_and_torch_do_on_padded_batches(base: tuple[Path, tuple[str, ...]], kind: str) -> None:
    folder, targets = base
    model = load(folder)
    layers = inject(model, names(model, targets), R, ALPHA, **KINDS[kind])
    stir(layers)
    theirs = with_peft(folder, targets, layers, **KINDS[kind])
    given = rows(model.config.vocab_size)
    steps = [given[:3], given[3:6], given[6:], given[2:5]]
    rate, max_norm, decay = 1e-3, 0.5, 0.1

    results = train_reference(model, steps, lambda t: rate * (t + 1), max_grad_norm=max_norm, weight_decay=decay)

    parameters = by_short_name(theirs)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=decay)
    for t, (step, result) in enumerate(zip(steps, results, strict=True)):
        ids, labels, mask = padded(step)
        logits = theirs(input_ids=ids, attention_mask=mask).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
        optimizer.param_groups[0]["lr"] = rate * (t + 1)
        optimizer.step()
        optimizer.zero_grad()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert result.grad_norm > max_norm, "nothing was clipped"
        assert result.tokens == int((labels[:, 1:] != reference.IGNORED).sum())
        assert result.learning_rate == rate * (t + 1)
    for key, tensor in adapter_tensors(layers).items():
        assert_close(tensor, parameters[key].detach(), atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def padded(step: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    pads = nn.utils.rnn.pad_sequence
    ids = pads([torch.tensor(ids) for ids, _ in step], batch_first=True)
    labels = pads([torch.tensor(labels) for _, labels in step], batch_first=True, padding_value=reference.IGNORED)
    mask = pads([torch.ones(len(ids), dtype=torch.long) for ids, _ in step], batch_first=True)
    return ids, labels, mask


def test_adapter_tensors_are_taken_over_whole_or_refused(tiny_llama: Path) -> None:
    layers, other = (
        inject(load(tiny_llama), names(load(tiny_llama), ("q_proj",)), R, ALPHA, dora=True) for _ in range(2)
    )
    stir(layers)
    tensors = adapter_tensors(layers)
    load_adapter_tensors(other, tensors)
    for key, tensor in adapter_tensors(other).items():
        assert torch.equal(tensor, tensors[key])
    first = next(iter(tensors))
    with pytest.raises(KeyError, match=first):
        load_adapter_tensors(other, {key: tensor for key, tensor in tensors.items() if key != first})
    with pytest.raises(ValueError, match="expected"):
        load_adapter_tensors(other, tensors | {first: tensors[first].T})


def test_loss_of_a_row_is_llamas(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    for ids, labels in rows(model.config.vocab_size):
        nll, count = reference.row_loss(model, (ids, labels))
        expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert count == sum(label != reference.IGNORED for label in labels[1:])
        assert nll.item() / count == pytest.approx(expected.item(), rel=1e-6)


def test_perplexity_weighs_tokens_not_rows(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    given = rows(model.config.vocab_size)
    ids, labels, mask = padded(given)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss.exp()
    measured = reference.perplexity_row_by_row(model, given)
    assert measured == pytest.approx(expected.item(), rel=1e-5)
    each = [reference.perplexity_row_by_row(model, [row]) for row in given]
    assert abs(sum(each) / len(each) - measured) > 0.01 * measured


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay: float) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,)]
    ours = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    reference_optimizer = reference.AdamW(ours, weight_decay=decay)
    optimizer = torch.optim.AdamW(theirs, weight_decay=decay)
    for t in range(8):
        gradients = [10.0 ** -(t % 4) * torch.randn(shape, generator=draw) for shape in shapes]
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        reference_optimizer.step(gradients, 0.1 / (t + 1))
        assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_is_torchs(max_norm: float) -> None:
    gradients = [torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    theirs = [nn.Parameter(torch.zeros(4, 4)) for _ in gradients]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    clipped, norm = reference.clip(gradients, max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    assert_close(clipped, [parameter.grad for parameter in theirs], atol=0, rtol=1e-6)
    assert_close(reference.clip(gradients, None)[0], gradients, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (reference.linear_decay, "linear"),
        (reference.cosine, "cosine"),
        (reference.constant, "constant_with_warmup"),
    ],
)
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (1, 0), (5, 5), (4, 7)])
def test_learning_rates_are_transformers(
    ours: Callable[[int, int, int], float], theirs: str, total: int, warmup: int
) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for t in range(total + 1):
        assert 0.5 * ours(t, total, warmup) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), t
        optimizer.step()
        scheduler.step()


def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = 0.02 * torch.randn(96, 128, generator=draw)
    outliers, zeros = normal.clone(), normal.clone()
    outliers[::7, ::31] = 50.0
    zeros[::2] = 0.0
    return {
        "normal": normal,
        "heavy-tailed": torch.randn(64, 64, generator=draw) ** 3,
        "outliers": outliers,
        "blocks of zeros": zeros,
        "all zero": torch.zeros(8, 64),
        "bfloat16": normal.bfloat16(),
        "a short last block": normal[:3, :50].contiguous(),
    }


def test_nf4_levels_are_normal_quantiles() -> None:
    assert_close(reference.NF4.double(), reference.nf4_quantiles(), atol=2e-7, rtol=0)


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("which", weights())
def test_four_bit_codes_are_bitsandbytes(method: str, which: str) -> None:
    weight = weights()[which]
    codes, absmax = {"nf4": reference.nf4_codes, "fp4": reference.fp4_codes}[method](weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=method)
    theirs = reference.unpack_4bit(packed)[: weight.numel()]
    if method == "fp4":  # codes 0 and 8 both stand for 0; bitsandbytes' kernels differ in which they use
        theirs = torch.where(theirs == 8, 0, theirs)
    assert torch.equal(codes, theirs)
    assert_close(absmax, state.absmax, atol=1e-37, rtol=0)

    expand = {"nf4": reference.nf4_dequantize, "fp4": reference.fp4_dequantize}[method]
    expected = bnb.dequantize_4bit(packed, state).float()
    rounding = 2**-8 if weight.dtype == torch.bfloat16 else 1e-6
    assert_close(expand(codes, absmax, weight.shape), expected, atol=1e-7, rtol=rounding)


def test_nf4_takes_the_nearest_level() -> None:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))
    codes, absmax = reference.nf4_codes(weight)
    error = (reference.nf4_dequantize(codes, absmax, weight.shape) - weight).abs()
    best = (reference.NF4[None] * absmax - weight[:, None]).abs().amin(dim=1)
    assert_close(error, best)


@pytest.mark.parametrize("which", ["normal", "heavy-tailed", "outliers"])
def test_int8_codes_are_bitsandbytes(which: str) -> None:
    weight = weights()[which].half()
    codes, absmax = reference.int8_codes(weight)
    theirs, scales, _ = bnb.int8_vectorwise_quant(weight.clone())
    assert torch.equal(codes, theirs)
    assert_close(absmax, scales)
    assert_close(reference.int8_dequantize(codes, absmax), bnb.int8_vectorwise_dequant(theirs, scales))


def test_int8_row_of_zeros_stays_zero() -> None:
    codes, absmax = reference.int8_codes(torch.zeros(2, 8))
    assert not codes.any() and not absmax.any()


def test_models_are_what_their_fixtures_say(tiny_gpt2: Path, tiny_llama: Path) -> None:
    for folder in (tiny_gpt2, tiny_llama):
        assert {path.name for path in folder.glob("*.safetensors")} == {"model.safetensors"}
        assert (folder / "generation_config.json").is_file()
        model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2
        assert tokenizer.decode(tokenizer("Ünïcode, too?")["input_ids"]) == "Ünïcode, too?"
        logits = model(input_ids=torch.tensor([tokenizer("What does the lighthouse keeper do?")["input_ids"]])).logits
        assert logits.std(dim=-1).mean() > 0.3
    assert AutoTokenizer.from_pretrained(tiny_gpt2).chat_template is None
    chat = AutoTokenizer.from_pretrained(tiny_llama)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert chat.apply_chat_template(turns, tokenize=False) == text
