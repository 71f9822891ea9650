"""Norms, gated MLPs and rotary positions, each as one autograd function: they compute the formulas, and replace only
modules that compute the same."""

from __future__ import annotations

import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, done
from test_fast_paths import GROUPED, build
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from lora_cli.model.fast_paths import swiglu
from lora_cli.model.fast_paths.fuse import SwiGLU, fuse
from lora_cli.model.fast_paths.gated_mlp import GatedMLP
from lora_cli.model.fast_paths.rms_norm import FrozenRMSNorm, RMSNormFunction
from lora_cli.model.fast_paths.rotary import RotaryAttention, Rotate

MIXED = {"num_local_experts": 2, "num_experts_per_tok": 1}
REPLACED = {  # the numbers of norms, MLPs and attention modules that are replaced
    "Llama": (GROUPED, 5, 2, 2),
    "Mistral, with a window": (GROUPED | {"sliding_window": 4}, 5, 2, 2),
    "Qwen3, which has norms over heads": (GROUPED, 9, 2, 2),
    "Granite": (GROUPED, 5, 2, 2),
    "SmolLM3, which has one layer without positions": (GROUPED | {"no_rope_layers": [1, 0]}, 5, 2, 1),
    "Phi3, whose gate and up are one layer": (GROUPED, 5, 0, 0),
    "Gemma, which adds 1 to a norm's weight and takes GELU": (GROUPED, 0, 0, 2),
    "StableLm, which has LayerNorm": (GROUPED, 0, 2, 0),
    "Mixtral, whose MLPs are experts": (GROUPED | MIXED, 5, 0, 2),
    "Olmo, whose positions are in float32": (GROUPED, 0, 2, 0),
    "Olmo2, whose norms go over all heads": (GROUPED, 9, 2, 0),
    "Nemotron, which turns half of a head": (GROUPED, 0, 0, 0),
    "Cohere, whose pairs are neighbours": (GROUPED, 0, 2, 0),
    "GPT2": ({"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 0, 0, 0),
}


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_norm_is_the_formula() -> None:
    torch.manual_seed(0)
    x, weight, eps = doubles(2, 3, 8).requires_grad_(), doubles(8), 0.1
    wanted = x / (x.square().sum(-1, keepdim=True) / 8 + eps).sqrt() * weight
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, eps), wanted.flatten(0, 1))
    assert torch.autograd.gradcheck(lambda x: RMSNormFunction.apply(x, weight, eps), (x,))


def test_in_16_bits_a_norm_rounds_where_llamas_does() -> None:
    torch.manual_seed(0)
    own = LlamaRMSNorm(64).bfloat16().requires_grad_(False)
    own.weight.normal_()
    x = torch.randn(3, 50, 64).bfloat16().requires_grad_()
    grad = torch.randn(3, 50, 64).bfloat16()
    wanted, found = own(x), FrozenRMSNorm(own.weight, own.variance_epsilon)(x)
    assert float((found == wanted).float().mean()) > 0.99  # the float32 sums may differ in their last bit
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
    exact = x.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(
        RMSNormFunction.apply(exact, own.weight.double(), own.variance_epsilon), exact, grad.double().flatten(0, 1)
    )
    for result in (found, wanted):
        (given,) = torch.autograd.grad(result, x, grad)
        assert float((given - slope).norm() / slope.norm()) < 0.006


def test_a_gate_is_the_formula() -> None:
    torch.manual_seed(0)
    gate, up = doubles(2, 3, 8).requires_grad_(), doubles(2, 3, 8).requires_grad_()
    torch.testing.assert_close(SwiGLU.apply(gate, up), (gate / (1 + (-gate).exp()) * up).flatten(0, 1))
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))


def test_positions_turn_pairs() -> None:
    """Each pair of features is a complex number, which is multiplied by cos + i sin."""
    torch.manual_seed(0)
    x, angles = doubles(2, 3, 4, 8).requires_grad_(), doubles(2, 3, 4)
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    cos, sin = (torch.cat((each, each), dim=-1) for each in (angles.cos(), angles.sin()))
    torch.testing.assert_close(Rotate.apply(x, cos, sin), torch.cat((pairs.real, pairs.imag), dim=-1))
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, cos, sin), (x,))
    one, other = doubles(1, 3, 8), doubles(1, 3, 8)
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, one, other), (x,))  # for any values


def test_in_16_bits_positions_turn_no_less_exactly_than_in_transformers() -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(1, 50, 4, 64).bfloat16() for _ in range(2))
    angles = 9 * torch.randn(1, 50, 32)
    cos, sin = (each.repeat(1, 1, 2).bfloat16() for each in (angles.cos(), angles.sin()))
    found = {}
    for name, given in {"own": x, "exact": x.double(), "theirs": x}.items():
        given = given.clone().requires_grad_()
        turned = (
            apply_rotary_pos_emb(given, given, cos, sin, unsqueeze_dim=2)[0]
            if name == "theirs"
            else Rotate.apply(given, cos.to(given.dtype), sin.to(given.dtype))
        )
        found[name] = (
            torch.stack((turned, *torch.autograd.grad(turned, given, grad.to(turned.dtype)))).detach().double()
        )
    own, theirs = (float((found[name] - found["exact"]).norm()) for name in ("own", "theirs"))
    assert 0 < own < theirs


@pytest.mark.parametrize("kind", REPLACED)
def test_which_modules_are_replaced_and_what_they_give(kind: str) -> None:
    arguments, norms, mlps, attentions = REPLACED[kind]
    model = build(kind.partition(",")[0], arguments).eval()
    names = [name for name, _ in model.named_parameters()]
    ids = torch.arange(3, 20)[None]
    wanted = model(input_ids=ids).logits
    fuse(model)
    kinds = Counter(type(module) for module in model.modules())
    assert (kinds[FrozenRMSNorm], kinds[GatedMLP], kinds[RotaryAttention]) == (norms, mlps, attentions)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    found = model.bfloat16()(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


class ClippingAttention(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, **others: Any) -> Any:
        return LlamaAttention.forward(self, hidden_states.clamp(-8, 8), **others)  # a trial passes another object


class PositionedAttention(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None, **others: Any) -> Any:
        return LlamaAttention.forward(self, hidden_states, **others)


class LargerAttention(LlamaAttention):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = torch.nn.Linear(32, 1)


@pytest.mark.parametrize("kind", [ClippingAttention, PositionedAttention, LargerAttention])
def test_attention_of_another_formula_stays(kind: type[LlamaAttention]) -> None:
    model = build("Llama", GROUPED)
    model.set_submodule("model.layers.0.self_attn", kind(model.config, 0).requires_grad_(False))
    fuse(model)
    kinds = [type(layer.self_attn) for layer in model.model.layers]
    assert kinds == [kind, RotaryAttention]


class OtherRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LlamaRMSNorm.forward(self, x) + getattr(self, "bias", 0)


@pytest.mark.parametrize("kind", [OtherRMSNorm, BiasedRMSNorm])
def test_a_norm_of_another_formula_stays(kind: type[LlamaRMSNorm]) -> None:
    model = build("Llama", GROUPED)
    model.set_submodule("model.norm", kind(32).requires_grad_(False))
    fuse(model)
    assert type(model.get_submodule("model.norm")) is kind
    assert type(model.get_submodule("model.layers.0.input_layernorm")) is FrozenRMSNorm


@pytest.mark.parametrize("returned", [lambda result: (result, None), lambda result: result[None]])
def test_an_mlp_that_returns_something_else_stays(returned: Callable[[torch.Tensor], Any]) -> None:
    class OtherMLP(LlamaMLP):
        def forward(self, x: torch.Tensor) -> Any:
            return returned(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    model = build("Llama", GROUPED)
    model.set_submodule("model.layers.0.mlp", OtherMLP(model.config).requires_grad_(False))
    fuse(model)
    assert [type(layer.mlp) for layer in model.model.layers] == [OtherMLP, GatedMLP]


def test_attention_drops_out_as_before() -> None:
    model = build("Llama", GROUPED | {"attention_dropout": 0.5}).train()
    ids = torch.arange(3, 20)[None]

    def logits() -> torch.Tensor:
        torch.manual_seed(1)
        result: torch.Tensor = model(input_ids=ids).logits
        return result

    wanted, without = logits(), model.eval()(input_ids=ids).logits
    fuse(model)
    torch.testing.assert_close(model(input_ids=ids).logits, without, rtol=1e-5, atol=1e-5)
    model.train()
    torch.testing.assert_close(logits(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, without, rtol=1e-2)


def test_attention_continues_a_cache() -> None:
    model = build("Qwen3", GROUPED).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    ids = torch.arange(3, 20)[None]
    wanted = model.generate(ids, **options)
    fuse(model)
    assert model.generate(ids, **options).tolist() == wanted.tolist()


def test_eager_attention_stays() -> None:
    """Each architecture has its own eager attention function."""
    model = build("Llama", GROUPED)
    model.set_attn_implementation("eager")
    fuse(model)
    assert not any(isinstance(module, RotaryAttention) for module in model.modules())


def test_adapter_fused_takes_our_formulas_or_leaves_the_models(
    write_recipe: Any, lora: Any, tmp_path: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    for function in (RMSNormFunction, SwiGLU, Rotate):

        def counted(*arguments: Any, original: Any = function.apply, name: str = function.__name__) -> Any:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(function, "apply", counted)
    runs = []
    for fused in (True, False):
        calls.clear()
        changes = {
            "model.name_or_path": tiny_llama,
            "adapter.fused": fused,
            "training.output_dir": tmp_path / str(fused),
        }
        done(lora("train", write_recipe(changes)))
        runs.append(Run(tmp_path / str(fused)))
        assert bool(calls["RMSNormFunction"]) == bool(calls["SwiGLU"]) == bool(calls["Rotate"]) == fused
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)


@pytest.mark.skipif(swiglu.HAS_LIGER, reason="Liger itself is installed")
def test_liger_without_a_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nightly builds are the same module in a package of another name."""
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert runpy.run_path(swiglu.__file__)["HAS_LIGER"] is False
