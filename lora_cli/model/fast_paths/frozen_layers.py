"""The frozen layers of a decoder below its lowest trained layer: their output for a row never changes.

To skip layers, each is replaced by a stand-in module in the decoder's list of layers. The architecture's own forward
pass still makes masks and positions, and calls the other layers as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lora_cli.model.trial import FORWARD_ERRORS, relative_error, trial_ids


class StandIn(nn.Module):
    """Replaces a layer. Returns ``hidden``, or its input when that is None, as the first item of a tuple of length
    ``returned``, or as a plain tensor when that is 0. ``taken`` is the input of the last call."""

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
        except AttributeError:  # decoders read the attention type from their layers
            return getattr(super().__getattr__("layer"), name)


@dataclass(frozen=True)
class FrozenLayers:
    """The first ``count`` of a decoder's ``layers``. ``returned`` is the length of the tuple that a layer returns, or 0
    when it returns a plain tensor."""

    decoder: nn.Module
    layers: nn.ModuleList
    count: int
    returned: int

    def states(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Their output (rows, tokens, width) for a forward pass's arguments. The layers above them are not run."""
        with self._replaced(range(self.count, len(self.layers)), None) as above:
            self.decoder(use_cache=False, **inputs)
        assert above[0].taken is not None
        return above[0].taken

    def skipped_with(self, hidden: torch.Tensor) -> AbstractContextManager[object]:
        """A context in which a forward pass skips them and uses ``hidden`` (rows, tokens, width) as their output."""
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
    """The layers below the lowest trained one. None if there are none, if other modules are trained, or if no list of
    the decoder's layers is found."""
    base: Any = model.get_base_model()
    decoder = base.get_decoder()
    depth = base.config.get_text_config().num_hidden_layers
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    layers = next(lists, None)
    if layers is None:
        return None
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    by_layer = [{id(weight) for weight in layer.parameters()} & trained for layer in layers]
    if trained != set().union(*by_layer):  # something else is trained, which may come before the layers
        return None
    count = next((index for index, weights in enumerate(by_layer) if weights), 0)
    if count == 0:
        return None
    returned: list[Any] = []
    with torch.no_grad(), layers[0].register_forward_hook(lambda *passed: returned.append(passed[-1])):
        decoder(input_ids=sample_ids(model), use_cache=False)
    if not returned:
        return None
    return FrozenLayers(decoder, layers, count, len(returned[0]) if isinstance(returned[0], tuple) else 0)


def draws_random_numbers(model: PeftModel, below: FrozenLayers) -> bool:
    """Whether anything below the trained layers, such as dropout, is random in training. Restores the random state."""
    device = next(model.parameters()).device
    was_training = model.training
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.no_grad():
        before = _random_state(device)
        model.train()
        below.states({"input_ids": sample_ids(model)})
        model.train(was_training)
        return not torch.equal(before, _random_state(device))


def can_be_skipped(model: PeftModel, below: FrozenLayers) -> bool:
    """Whether the frozen layers output one vector per token, and the model's logits stay the same when this output is
    computed separately and passed in."""
    ids = sample_ids(model)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        try:
            hidden = below.states({"input_ids": ids})
            if hidden.shape[:-1] != ids.shape:
                return False
            with below.skipped_with(hidden):
                found = model(input_ids=ids, use_cache=False).logits.float()
        except FORWARD_ERRORS:
            return False
    rounding = 1e-5 if model.dtype == torch.float32 else 0.02
    return relative_error(found, wanted) < rounding


def _random_state(device: torch.device) -> torch.Tensor:
    own = torch.get_rng_state()
    return torch.cat([own, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else own


def sample_ids(model: PeftModel) -> torch.Tensor:
    """Token ids for a trial: two rows of 8 tokens, (2, 8) int64."""
    return trial_ids(model, 16).view(2, 8)
