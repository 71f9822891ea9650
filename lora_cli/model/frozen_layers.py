"""The layers of a decoder below the lowest one that is trained: what comes out of them is always the same.

They are set aside by standing a module in for each in the decoder's list of layers, so that masks and positions are
made by the architecture's own forward pass, and the layers above are called as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_cli.model.layers import CANNOT

if TYPE_CHECKING:
    from peft import PeftModel


class StandIn(nn.Module):
    """In a layer's place: gives ``hidden``, or what comes in when that is None, as the first of ``returned``, or alone
    when that is 0; ``taken`` is what came in."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor | None, returned: int) -> None:
        super().__init__()
        self.layer = layer
        self.hidden = hidden
        self.returned = returned
        self.taken: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor | tuple[Any, ...]:
        self.taken = hidden_states
        given = hidden_states if self.hidden is None else self.hidden
        return (given, *[None] * (self.returned - 1)) if self.returned else given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # decoders ask their layers for their kind of attention
            return getattr(super().__getattr__("layer"), name)


@dataclass(frozen=True)
class FrozenLayers:
    """The first ``count`` of a decoder's ``layers``; ``returned``: of how many a layer returns a tuple, 0 of none."""

    decoder: nn.Module
    layers: nn.ModuleList
    count: int
    returned: int

    def states(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What comes out of them, (rows, tokens, width), for the arguments of a forward pass; the rest is not run."""
        with self._replaced(range(self.count, len(self.layers)), None) as above:
            self.decoder(use_cache=False, **inputs)
        assert above[0].taken is not None
        return above[0].taken

    def giving(self, hidden: torch.Tensor) -> AbstractContextManager[object]:
        """Within, a forward pass does not run them but takes ``hidden`` (rows, tokens, width) for what they give."""
        return self._replaced(range(self.count), hidden)

    @contextmanager
    def _replaced(self, span: range, hidden: torch.Tensor | None) -> Iterator[list[StandIn]]:
        own = list(self.layers)
        stand_ins = [StandIn(own[index], hidden, self.returned) for index in span]
        try:
            for index, stand_in in zip(span, stand_ins, strict=True):
                self.layers[index] = stand_in
            yield stand_ins
        finally:
            for index in span:
                self.layers[index] = own[index]


def frozen_layers(model: PeftModel) -> FrozenLayers | None:
    """The layers below the lowest trained one; None when there are none, or where layers are not to be found."""
    base: Any = model.get_base_model()
    decoder = base.get_decoder()
    depth = base.config.get_text_config().num_hidden_layers
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    layers = next(lists, None)
    if layers is None:
        return None
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    by_layer = [{id(weight) for weight in layer.parameters()} & trained for layer in layers]
    if trained != set().union(*by_layer):  # something outside of the layers, which may stand before them
        return None
    count = next((index for index, weights in enumerate(by_layer) if weights), 0)
    if count == 0:
        return None
    returned: list[Any] = []
    hook = layers[0].register_forward_hook(lambda *passed: returned.append(passed[-1]))
    try:
        with torch.no_grad():
            decoder(input_ids=some_ids(model), use_cache=False)
    finally:
        hook.remove()
    if not returned:
        return None
    return FrozenLayers(decoder, layers, count, len(returned[0]) if isinstance(returned[0], tuple) else 0)


def draws_random_numbers(model: PeftModel, below: FrozenLayers) -> bool:
    """Whether in training anything below the trained layers, such as dropout, is random; leaves the random state."""
    device = next(model.parameters()).device
    was_training = model.training
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.no_grad():
        before = _random_state(device)
        model.train()
        below.states({"input_ids": some_ids(model)})
        model.train(was_training)
        return not torch.equal(before, _random_state(device))


def gives_the_same(model: PeftModel, below: FrozenLayers) -> bool:
    """Whether what its frozen layers give is a vector a token, and the model's logits are the same when that is
    computed apart and handed in."""
    ids = some_ids(model)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        try:
            hidden = below.states({"input_ids": ids})
            if hidden.shape[:-1] != ids.shape:
                return False
            with below.giving(hidden):
                found = model(input_ids=ids, use_cache=False).logits.float()
        except CANNOT:
            return False
    return float((found - wanted).norm() / wanted.norm()) < (1e-5 if model.dtype == torch.float32 else 0.02)


def _random_state(device: torch.device) -> torch.Tensor:
    own = torch.get_rng_state()
    return torch.cat([own, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else own


def some_ids(model: PeftModel) -> torch.Tensor:
    """Ids of two rows of 8 tokens, (2, 8) int64."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return ((torch.arange(16, device=next(model.parameters()).device) * 7919 + 3) % vocabulary).view(2, 8)
