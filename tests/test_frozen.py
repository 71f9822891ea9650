"""Layers below the lowest adapted one get no gradient; computing their output only once gives the same results."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run, check_goes_on_alike, done, fork_lora
from torch import nn

from lora_cli.data.batches import Batch
from lora_cli.errors import RunError
from lora_cli.evaluation.loss import evaluating, row_boundary_arguments, summed_loss
from lora_cli.evaluation.packing import enable_packing
from lora_cli.model.adapters import adapt
from lora_cli.model.fast_paths.frozen_layers import can_be_skipped, draws_random_numbers, frozen_layers
from lora_cli.model.layers import adaptable_layers
from lora_cli.model.targets import choose_targets
from lora_cli.recipe.schema import Adapter
from lora_cli.training import loop
from lora_cli.training.hidden_states import allocate, choose_places

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
DROPOUT = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "gpt2": ("GPT2", GPT2 | dict.fromkeys(DROPOUT, 0.0)),
    "gemma, which scales embeddings": ("Gemma", GROUPED),
    "gemma3, whose layers see differently far": (
        "Gemma3Text",
        GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 2}),
    "gpt-neox": ("GPTNeoX", SMALL),
    "bloom, whose layers return tuples": ("Bloom", SMALL | {"n_layer": 4, "n_head": 4}),
    "falcon": ("Falcon", SMALL),
    "bamba, of whose layers two things are taken": (
        "Bamba",
        GROUPED
        | {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4}
        | {"mamba_chunk_size": 4},
    ),
}
UPPER = (2, 3)


def build(kind: str, vocabulary: int = 97, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of four layers, with weights large enough that errors show."""
    name, arguments = ARCHITECTURES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**arguments | changes, vocab_size=vocabulary)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1) if weight.dim() > 1 else nn.init.normal_(weight, mean=0.5, std=0.1)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def adapted(base: Any, layers: tuple[int, ...] = UPPER) -> Any:
    """The base with an adapter on these layers, whose B is not zero."""
    targets = [target.name for target in choose_targets(adaptable_layers(base), "all-linear", 2, layers)]
    model = adapt(base, Adapter(r=2), targets, fused=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def laid_out(rows: list[torch.Tensor], packing: bool) -> Batch:
    """The packed or padded batch, all tokens but each row's first supervised. It is built without ``collate``."""
    lengths = [len(row) for row in rows]
    positions = [torch.arange(length) for length in lengths]
    if packing:
        ids, place = torch.cat(rows)[None], torch.cat(positions)[None]
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        wanted, mask = place[0, 1:] > 0, None
    else:
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
        place, starts = torch.arange(max(lengths)).expand_as(ids), None
        mask = (place < torch.tensor(lengths)[:, None]).long()
        wanted = mask[:, 1:].bool()
    predict = torch.arange(ids.shape[1] - 1)
    targets = ids[:, 1:].flatten()[wanted.flatten()]
    return Batch(ids, place, mask, starts, max(lengths), predict, wanted.flatten().nonzero()[:, 0], targets)


def gradients_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@contextmanager
def broken(layers: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which running these layers is an error."""

    def fail(*_: Any) -> None:
        raise AssertionError("this layer was run")

    hooks = [layer.register_forward_pre_hook(fail) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_upper_half_alone_gives_what_the_whole_model_gives(kind: str) -> None:
    # In float64, since layers amplify differences in the last bit; Mixtral's experts do not support it.
    base = build(kind, dtype=torch.float32 if kind == "mixtral" else torch.float64)
    model = adapted(base)
    packs = enable_packing(base, "auto")
    model.eval()
    below = frozen_layers(model)
    assert below is not None and below.count == 2
    assert can_be_skipped(model, below) and not draws_random_numbers(model, below)
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 97, (length,), generator=draw) for length in (9, 3, 12, 6)]
    losses = [model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    wanted = torch.stack(losses).sum()
    wanted_gradients = gradients_of(model, wanted)

    for packing in (True, False) if packs else (False,):
        batch = laid_out(rows, packing)
        with evaluating(model):
            hidden = below.states({"input_ids": batch.input_ids, **row_boundary_arguments(batch)})
        given = Batch(**{**vars(batch), "hidden": hidden})
        with broken(below.layers[:2]):
            found = summed_loss(model, given, None, below)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        gradients = gradients_of(model, found)
        assert gradients.keys() == wanted_gradients.keys()
        scale = max(float(gradient.abs().max()) for gradient in wanted_gradients.values())
        for name, gradient in wanted_gradients.items():
            assert float((gradients[name] - gradient).abs().max()) < 1e-5 * scale, name
    assert [type(layer).__name__ for layer in below.layers] == [type(below.layers[0]).__name__] * 4


def test_nothing_lies_below_the_first_layer_or_beside_the_layers() -> None:
    assert frozen_layers(adapted(build("llama"), (0, 3))) is None
    base = build("llama")
    base.add_module("embeddings_too", None)
    model = adapted(base)
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    assert frozen_layers(model) is None
    model = adapted(build("llama"))
    model.config.num_hidden_layers = 5
    assert frozen_layers(model) is None, "it has no list of five layers"


def test_layers_that_leave_something_to_layers_above_are_not_skipped() -> None:
    model = adapted(build("llama")).eval()
    below, left = frozen_layers(model), []
    assert below is not None and can_be_skipped(model, below)
    below.decoder.register_forward_pre_hook(lambda *_: left.clear())
    below.layers[0].register_forward_hook(lambda *_: left.append(0.5))
    below.layers[3].register_forward_hook(lambda _, __, output: output * sum(left))
    assert not can_be_skipped(model, below)


@pytest.mark.parametrize("key", DROPOUT)
def test_dropout_below_is_seen_and_draws_nothing_from_the_runs_random_state(key: str) -> None:
    model = adapted(build("gpt2", **{key: 1e-6})).eval()
    below = frozen_layers(model)
    before = torch.get_rng_state()
    assert draws_random_numbers(model, below)
    assert torch.equal(torch.get_rng_state(), before) and not model.training


@pytest.mark.parametrize("shared", [2, 0])
def test_an_architecture_whose_layers_pass_on_more_than_a_vector_a_token_is_left_alone(shared: int) -> None:
    """Gemma 3n's layers pass on four vectors per token and, if ``shared``, keys and values."""
    ARCHITECTURES["gemma3n"] = (
        "Gemma3nText",
        GROUPED
        | {"intermediate_size": [48] * 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
        | {"num_kv_shared_layers": shared, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}
        | {"layer_types": ["full_attention"] * 4},
    )
    model = adapted(build("gemma3n")).eval()
    below = frozen_layers(model)
    assert below is None or not can_be_skipped(model, below)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_of(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a model of this kind and return its folder."""

    def make(kind: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("models") / "deep"
        build(kind, len(tokenizer), **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def upper(model_of: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Recipe changes: adapt the upper half of a model of this kind, for three epochs."""

    def changes(kind: str = "llama", **of_model: Any) -> dict[str, Any]:
        return {
            "model.name_or_path": model_of(kind, **of_model),
            "adapter": {"target_modules": "all-linear", "layers_to_transform": list(UPPER), "lora_dropout": 0.1},
            "data": {"packing": True, "validation": 0.2},
            "training": {"max_steps": None, "num_train_epochs": 3.0, "eval_steps": 2, "save_steps": 1}
            | {"save_total_limit": None},
        }

    return changes


@pytest.fixture
def tokens_below(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens that went through the first layer, for each run of the test in order."""
    seen: list[int] = []
    original = loop.set_up

    def watch(*args: Any) -> Any:
        trainer = original(*args)
        seen.append(0)

        def count(_: Any, inputs: Any, output: Any) -> None:
            seen[-1] += (output[0] if isinstance(output, tuple) else output).shape[:-1].numel()

        below = frozen_layers(trainer.accelerator.unwrap_model(trainer.model))
        below.layers[0].register_forward_hook(count)
        return trainer

    monkeypatch.setattr(loop, "set_up", watch)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_no_gradient_goes_below_the_lowest_adapted_layer(
    kind: str, checkpointing: bool, train: Callable[..., Run], upper: Callable[..., Any], monkeypatch: Any
) -> None:
    seen: list[tuple[int, bool]] = []
    original = loop.set_up

    def note(index: int, layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        if layer.training:
            seen.append((index, output.requires_grad))

    def watch(*args: Any) -> Any:
        trainer = original(*args)
        layers = frozen_layers(trainer.accelerator.unwrap_model(trainer.model)).layers
        for index, layer in enumerate(layers):
            layer.register_forward_hook(partial(note, index))
        return trainer

    monkeypatch.setattr(loop, "set_up", watch)
    run = {"max_steps": 2, "cache_frozen": False, "gradient_checkpointing": checkpointing}
    train(upper(kind) | {"training": run, "data.validation": None})
    assert set(seen) == {(0, False), (1, False), (2, True), (3, True)}


def with_cache(changes: dict[str, Any], wanted: Any) -> dict[str, Any]:
    return changes | {"training": changes["training"] | {"cache_frozen": wanted}}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma, which scales embeddings", "mixtral", "falcon"])
@pytest.mark.parametrize("packing", [True, False])
def test_runs_with_and_without_take_the_same_steps(
    kind: str, packing: bool, train: Callable[..., Run], upper: Callable[..., Any], tokens_below: list[int]
) -> None:
    changes = upper(kind)
    changes["data"]["packing"] = packing
    changes["training"]["save_steps"] = None
    plain = train(with_cache(changes, False))
    runs = [train(with_cache(changes, wanted)) for wanted in ("auto", "memory", "disk")]
    for run in runs:
        for split in ("train", "validation"):
            assert run.column("step", split) == plain.column("step", split)
            assert run.column("tokens", split) == plain.column("tokens", split)
            assert run.column("loss", split) == pytest.approx(plain.column("loss", split), abs=1e-5)
        assert run.column("grad_norm") == pytest.approx(plain.column("grad_norm"), rel=1e-4)
        assert run.adapter_bytes == runs[0].adapter_bytes
        assert sorted(path.suffix for path in (run.folder / "cache").iterdir()) == [".safetensors"]
    assert [run.info["cache_frozen"] for run in (plain, *runs)] == [
        {},
        *({"train": place, "validation": place} for place in ("memory", "memory", "disk")),
    ]
    rows = plain.info["data"]["tokens"]
    assert tokens_below[0] > 3 * rows
    if packing:
        assert rows < tokens_below[1] == tokens_below[2] == tokens_below[3] < 2 * rows
    assert max(tokens_below[1:]) < tokens_below[0] / 2


def test_dropout_below_turns_it_off(
    train: Callable[..., Run], upper: Callable[..., Any], write_recipe: Any, lora: Any, tmp_path: Path
) -> None:
    changes = upper("gpt2", resid_pdrop=0.1)
    plain = train(with_cache(changes, False))
    asked = with_cache(changes, "memory") | {"training.output_dir": tmp_path / "asked"}
    told = done(lora("train", write_recipe(asked))).stderr
    assert "training.cache_frozen: memory -> false: below layer 2" in told and "dropout" in told
    assert Run(tmp_path / "asked").adapter_bytes == plain.adapter_bytes
    assert Run(tmp_path / "asked").info["cache_frozen"] == {}


def test_auto_keeps_what_is_gone_through_again(train: Callable[..., Run], upper: Callable[..., Any]) -> None:
    changes = upper()
    once = changes | {"training": changes["training"] | {"num_train_epochs": 1.0}}
    assert train(once).info["cache_frozen"] == {"validation": "memory"}
    assert train(with_cache(once, "disk")).info["cache_frozen"] == {"train": "disk", "validation": "disk"}
    everything = changes | {"adapter": {"target_modules": "all-linear"}}
    assert train(everything).info["cache_frozen"] == {}


def test_gradient_checkpointing_and_nf4_go_with_it(train: Callable[..., Run], upper: Callable[..., Any]) -> None:
    for more in ({"training.gradient_checkpointing": True}, {"quantization": {"method": "nf4"}}):
        changes = upper()
        plain, kept = (train(with_cache(changes, wanted) | more) for wanted in (False, "memory"))
        assert kept.info["cache_frozen"] == {"train": "memory", "validation": "memory"}
        assert kept.losses == pytest.approx(plain.losses, abs=1e-5)


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    place: str, train: Callable[..., Run], upper: Callable[..., Any], tmp_path: Path
) -> None:
    whole = train(with_cache(upper(), place))
    last = whole.info["result"]["steps"]
    for stopped in (1, last // 2, last):
        cut = check_goes_on_alike(whole, stopped, tmp_path / f"cut{stopped}")
        assert cut.info["cache_frozen"] == whole.info["cache_frozen"]


def test_the_last_evaluation_stopped_is_made_again_from_what_is_kept(
    train: Callable[..., Run], upper: Callable[..., Any], write_recipe: Any, lora: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """In bfloat16, evaluating without the kept hidden states may round differently."""
    changes = with_cache(upper(), "memory") | {"model.dtype": "bfloat16"}
    whole, evaluate_step = train(changes), loop.evaluate_step

    def evaluate(trainer: Any, step: Any, *rest: Any) -> Any:
        if step.number == trainer.total_steps:
            signal.raise_signal(signal.SIGTERM)
        return evaluate_step(trainer, step, *rest)

    cut = changes | {"training": changes["training"] | {"output_dir": tmp_path / "cut"}}
    recipe, run = write_recipe(cut), Run(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_step", evaluate)
        assert lora("train", recipe).exit_code == 143
    assert run.losses == whole.losses and len(run.lines("validation")) == len(whole.lines("validation")) - 1
    assert "validation rows: hidden states below" in done(lora("train", recipe, "--resume")).stderr
    assert run.column("loss", "validation") == whole.column("loss", "validation")


def test_a_signal_stops_the_computing(
    upper: Callable[..., Any], write_recipe: Any, lora: Any, tmp_path: Path, train: Callable[..., Run], monkeypatch: Any
) -> None:
    whole = train(upper())
    original = loop.set_up

    def watch(*args: Any) -> Any:
        trainer = original(*args)

        def interrupt(*_: Any) -> None:
            if trainer.hidden_states is not None:
                signal.raise_signal(signal.SIGINT)
                hook.remove()

        below = frozen_layers(trainer.accelerator.unwrap_model(trainer.model))
        hook = below.layers[0].register_forward_hook(interrupt)
        return trainer

    recipe = write_recipe(upper() | {"training": upper()["training"] | {"output_dir": tmp_path / "cut"}})
    with monkeypatch.context() as patched:
        patched.setattr(loop, "set_up", watch)
        stopped = lora("train", recipe)
    assert stopped.exit_code == 130 and "stopped before the first step" in stopped.stderr
    assert not (tmp_path / "cut" / "metrics.jsonl").exists()
    done(lora("train", recipe, "--resume"))
    assert Run(tmp_path / "cut").adapter_bytes == whole.adapter_bytes
    with monkeypatch.context() as patched:
        patched.setattr(loop, "set_up", watch)
        more = whole.info["result"]["steps"] + 1
        again = lora("train", recipe, "--resume", f"training.max_steps={more}")
    assert again.exit_code == 130 and f"stopped after step {more - 1}, checkpoint written" in again.stderr


def test_a_run_goes_on_as_it_began(train: Callable[..., Run], upper: Callable[..., Any], lora: Any) -> None:
    """With more epochs, auto would keep the training rows' hidden states, but the run began without them."""
    changes = upper()
    run = train(changes | {"training": changes["training"] | {"num_train_epochs": 1.0}})
    recipe = run.folder / "recipe.yaml"
    done(lora("train", recipe, f"training.output_dir={run.folder}", "training.num_train_epochs=2.0", "--resume"))
    assert run.info["cache_frozen"] == {"validation": "memory"}
    finished = done(lora("train", run.folder / "recipe.yaml", "--resume"))
    assert "computed once" not in finished.stderr


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_two_processes_share_the_computing(
    place: str,
    train: Callable[..., Run],
    upper: Callable[..., Any],
    write_recipe: Any,
    tmp_path: Path,
) -> None:
    changes = upper() | {"adapter.lora_dropout": 0.0}
    one = train(with_cache(changes, place))
    training = changes["training"] | {"gradient_accumulation_steps": 1, "output_dir": tmp_path / "two"}
    two = Run(tmp_path / "two")
    recipe = write_recipe(with_cache(changes | {"training": training}, place))
    for process in fork_lora(["train", recipe], ["train", recipe]):
        done(process)
    assert two.info["processes"] == 2 and two.info["cache_frozen"] == {"train": place, "validation": place}
    for split in ("train", "validation"):
        assert two.column("tokens", split) == one.column("tokens", split)
        assert two.column("loss", split) == pytest.approx(one.column("loss", split), rel=1e-5)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, atol=1e-4, rtol=1e-3)


# --- where -----------------------------------------------------------------------------------------------------------


def test_memory_first_then_disk_then_nowhere() -> None:
    sizes = {"train": 100, "validation": 10}
    assert choose_places(sizes, "auto", {"memory": 110, "disk": 0}) == {"train": "memory", "validation": "memory"}
    assert choose_places(sizes, "auto", {"memory": 109, "disk": 10}) == {"train": "memory", "validation": "disk"}
    assert choose_places(sizes, "auto", {"memory": 10, "disk": 100}) == {"train": "disk", "validation": "memory"}
    assert choose_places(sizes, "auto", {"memory": 9, "disk": 99}) == {"validation": "disk"}
    assert choose_places(sizes, "disk", {"memory": 110, "disk": 0}) == {"train": "disk", "validation": "disk"}


def test_the_file_on_disk_has_no_name_and_room_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, reserved = os.posix_fallocate, []

    def noted(handle: int, start: int, size: int) -> None:
        reserve(handle, start, size)
        reserved.append(512 * os.fstat(handle).st_blocks)

    monkeypatch.setattr(os, "posix_fallocate", noted)
    states = allocate("disk", (2**16, 64), torch.bfloat16, tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(reserved) == 1 and reserved[0] >= states.nbytes
    states[5] = 3.0
    assert states[4:7, 0].tolist() == [0.0, 3.0, 0.0]
    with pytest.raises(RunError, match="bytes are needed"):
        allocate("disk", (2**34, 2**10), torch.float32, tmp_path)


def test_a_system_that_sets_no_room_aside_has_the_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    states = allocate("disk", (8, 64), torch.float32, tmp_path)
    states[7] = 3.0
    assert states[6:, 0].tolist() == [0.0, 3.0]
