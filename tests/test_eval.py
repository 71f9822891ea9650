"""`lora eval`: its perplexity equals a row-by-row loop's, for the adapter and its base, which is found when moved."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import Run, done, edit_json, edited_weights, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.evaluation import compare
from lora_cli.evaluation.loss import evaluating
from lora_cli.model.device import has_units_for

TEXTS = (
    "The lighthouse keeper lights the lamp and writes down every ship that passes in the night. " * 6,
    "Short.",
    "They fly south in September, across the sea and the desert, and come back in April. " * 3,
)
ROUNDING = 1e-5
"""Of a perplexity in float32: its relative error is the loss's absolute one, and float32 stores a loss of 7 to 5e-7."""


def load(folder: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    return folder


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 what no recipe sets the type of, also on a CPU with bfloat16 units."""
    monkeypatch.setattr("lora_cli.model.device.has_units_for", lambda *_: False)


@pytest.fixture
def run_of(write_recipe: Any, lora: Any, tmp_path: Path, no_curves: None) -> Callable[..., Path]:
    """Train a few steps on a base, with these changes to the recipe, and return the run's folder."""

    def train(folder: Path, name: str = "run", **changes: Any) -> Path:
        settings = {"model.name_or_path": folder, "training.output_dir": tmp_path / name, "training.warmup_steps": 0}
        done(lora("train", write_recipe(settings | changes)))
        return tmp_path / name

    return train


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_run_adapter_and_model_equal_a_row_by_row_loop(
    base: Path, packing: bool, run_of: Callable[..., Path], qa_file: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(base, **{"data": {"max_length": 24, "packing": packing}})
    loads: list[Any] = []
    original = AutoModelForCausalLM.from_pretrained

    def count(*args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        return original(*args, **kwargs)

    rows = reference.rows_of(qa_file, AutoTokenizer.from_pretrained(base), 24)
    bare = reference.perplexity_row_by_row(load(base), rows)
    tuned = reference.perplexity_row_by_row(load(base, run / "adapter"), rows)
    assert abs(bare - tuned) > 1e-3 * bare
    for target in (run, run / "adapter"):
        with monkeypatch.context() as patch:
            patch.setattr(AutoModelForCausalLM, "from_pretrained", count)
            found = done(lora("eval", target, "--data", qa_file, "--json")).json
        assert found["perplexity"] == pytest.approx(tuned, rel=ROUNDING)
        assert found["loss"] == pytest.approx(math.log(tuned), rel=1e-6)
        assert found["base"]["perplexity"] == pytest.approx(bare, rel=ROUNDING)
        assert found["base"]["loss"] == pytest.approx(math.log(bare), rel=1e-6)
        assert found["tokens"] == sum(label >= 0 for _, labels in rows for label in labels[1:])
        assert set(found) == {"target", "data", "tokens", "loss", "perplexity", "base"}
        assert (found["target"], found["data"]) == (str(target), str(qa_file))
    assert len(loads) == 2, "one model a command, for base and adapter both"

    whole = reference.rows_of(qa_file, AutoTokenizer.from_pretrained(base), 1000)
    found = done(lora("eval", base, "--data", qa_file, "--json")).json
    in_16_bits = has_units_for(torch.bfloat16, torch.device("cpu"))  # a bare model has no recipe that sets float32
    wanted = reference.perplexity_row_by_row(load(base), whole)
    assert found["perplexity"] == pytest.approx(wanted, rel=0.01 if in_16_bits else ROUNDING)
    assert set(found) == {"target", "data", "tokens", "loss", "perplexity"}


def made(folder: Path, out: Path, words: int = 0, **config: Any) -> Path:
    """Save a randomly changed adapter made by PEFT alone; ``words``: tokens added to its base, with new embeddings."""
    torch.manual_seed(0)
    model = load(folder)
    if words:
        model.resize_token_embeddings(model.config.vocab_size + words)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    is_gpt2 = model.config.model_type == "gpt2"
    names = ["c_attn"] if is_gpt2 else ["q_proj", "v_proj"]
    wanted = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names, fan_in_fan_out=is_gpt2, **config)
    adapted = get_peft_model(model, wanted)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape))
    adapted.save_pretrained(str(out), save_embedding_layers=words > 0)
    return out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt2", {"bias": "all"}),
        ("gpt2", {"bias": "lora_only"}),
        ("gpt2", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "olora"}),
        ("llama", {"kasa_config": {}}),
        ("llama", {"words": 3}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("in_float32")
def test_the_base_is_scored_as_it_is_without_what_peft_puts_into_it(
    name: str, kind: dict[str, Any], request: pytest.FixtureRequest, qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    folder = request.getfixturevalue(f"tiny_{name}")
    adapter = made(folder, tmp_path / "adapter", **kind)
    found = done(lora("eval", adapter, "--data", qa_file, "--json")).json
    alone = done(lora("eval", folder, "--data", qa_file, "--json")).json
    assert found["base"]["perplexity"] == alone["perplexity"]
    if "words" not in kind:
        rows = reference.rows_of(qa_file, AutoTokenizer.from_pretrained(folder), 1000)
        tuned = reference.perplexity_row_by_row(load(folder, adapter), rows)
        assert found["perplexity"] == pytest.approx(tuned, rel=ROUNDING)
    assert abs(found["perplexity"] - alone["perplexity"]) > 0.01 * alone["perplexity"]


WORDS = {
    "beside": {},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "some": {"trainable_token_indices": [5, 6]},
}
"""How an adapter holds tokens added to its base: in embeddings that PEFT saves, in trained ones, or token by token."""


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("how", WORDS)
def test_rows_may_hold_words_that_an_adapter_has_added(how: str, tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    before = len(tokenizer)
    tokenizer.add_tokens(["<first>", "<second>"])
    adapter = made(tiny_llama, tmp_path / "adapter", words=2, **WORDS[how])
    tokenizer.save_pretrained(adapter)
    model = load(tiny_llama)
    model.resize_token_embeddings(len(tokenizer))
    texts = ["They fly <first> in September.<second>", "Short.<second>"]
    file = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    assert before in rows[0] and len(tokenizer) == before + 2 == model.config.vocab_size
    wanted = reference.perplexity_row_by_row(PeftModel.from_pretrained(model, adapter).eval(), [(r, r) for r in rows])
    first = write_rows(tmp_path / "first.jsonl", [{"text": "They fly <first> in September."}])
    found, of_first = (done(lora("eval", adapter, "--data", each, "--json")).json for each in (file, first))
    assert found["perplexity"] == pytest.approx(wanted, rel=ROUNDING)
    for each in (found, of_first):
        assert "base" not in each and "these rows have tokens that the adapter has added" in each["warnings"][0]
    assert done(lora("eval", adapter, "--data", file)).stdout.splitlines()[2].startswith("with adapter")
    beside = done(lora("adapters", "show", adapter, "--json")).json["whole"]
    deltas = ["embed_tokens.trainable_tokens_delta"] if how == "some" else []
    assert beside == ["embed_tokens", *deltas, "lm_head"]
    told = done(lora("merge", adapter, "--out", tmp_path / "merged", "--data", file, "--json")).json
    assert told["verified"] and told["in_memory"] == (how == "some")
    merged = done(lora("eval", tmp_path / "merged", "--data", file, "--json")).json
    assert merged["perplexity"] == pytest.approx(wanted, rel=ROUNDING)


@pytest.mark.usefixtures("in_float32")
def test_an_adapter_is_at_work_behind_each_rows_invocation(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    """aLoRA: PEFT finds one invocation in each sequence, but packed rows need one each."""
    rows = reference.rows_of(qa_file, AutoTokenizer.from_pretrained(tiny_llama), 1000)
    invocation = rows[0][0][:1]
    assert sum(invocation[0] in ids for ids, _ in rows) > 1
    adapter = made(tiny_llama, tmp_path / "adapter", alora_invocation_tokens=invocation, lora_alpha=4000)
    wanted = reference.perplexity_row_by_row(load(tiny_llama, adapter), rows)
    found = done(lora("eval", adapter, "--data", qa_file, "--json")).json
    assert found["perplexity"] == pytest.approx(wanted, rel=ROUNDING)
    assert abs(found["perplexity"] - found["base"]["perplexity"]) > 0.01 * wanted


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_an_adapter_of_a_base_that_is_not_there_is_refused(
    start: str, tiny_llama: Path, qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    adapter = made(tiny_llama, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    edit_json(path, init_lora_weights=start)
    for result in (
        lora("eval", adapter, "--data", qa_file),
        lora("merge", adapter, "--out", tmp_path / "merged"),
    ):
        assert result.exit_code == 2
        assert f"init_lora_weights: {start}" in result.stderr and str(path) in result.stderr


def test_pissa_on_a_quantized_base(tiny_llama: Path, qa_file: Path, tmp_path: Path, lora: Any) -> None:
    """PEFT cannot take its first values out of codes; OLoRA's it can."""
    done(lora("quantize", tiny_llama, "--out", tmp_path / "nf4"))
    for start in ("pissa", "olora"):
        adapter = made(tiny_llama, tmp_path / start, init_lora_weights=start)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "nf4"))
    result = lora("eval", tmp_path / "pissa", "--data", qa_file)
    assert result.exit_code == 2 and "init_lora_weights: pissa" in result.stderr
    assert "measuring" not in result.stderr, "before weights are loaded"
    done(lora("eval", tmp_path / "olora", "--data", qa_file))


def conversed(file: Path, tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Each conversation's ids and labels in ChatML. The assistant's text and its end of turn are supervised."""
    rows = []
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        text, learned = "", []
        for turn in record["messages"]:
            text += f"<|im_start|>{turn['role']}\n"
            if turn["role"] == "assistant":
                learned.append(range(len(text), len(text) + len(turn["content"] + "<|im_end|>")))
            text += f"{turn['content']}<|im_end|>\n"
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        labels = [
            id if any(start < span.stop and end > span.start for span in learned) else -100
            for id, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        ]
        rows.append((encoded.input_ids[:max_length], labels[:max_length]))
    return rows


def test_a_chat_adapter_is_measured_on_what_it_was_trained_to_see(
    tiny_llama: Path, run_of: Callable[..., Path], tmp_path: Path, lora: Any
) -> None:
    says = [("Why?", "Because it is so."), ("Who?", "I."), ("When is bread done?", "When it sounds hollow, they say.")]
    rows = tmp_path / "talk.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for first, second in zip(says, [*says[1:], says[0]], strict=True):
            turns = enumerate((*first, *second))
            told = [{"role": ("user", "assistant")[at % 2], "content": words} for at, words in turns]
            file.write(json.dumps({"messages": told}) + "\n")
    run = run_of(tiny_llama, **{"data": {"train": rows, "validation": rows, "max_length": 60}})
    wanted = conversed(rows, AutoTokenizer.from_pretrained(tiny_llama), 60)
    assert {len(ids) == 60 for ids, _ in wanted} == {True, False}, "some are cut"
    counted = sum(label >= 0 for _, labels in wanted for label in labels[1:])
    for target in (run, run / "adapter"):
        found = done(lora("eval", target, "--data", rows, "--json")).json
        assert found["tokens"] == counted
        for score, adapter in ((found, run / "adapter"), (found["base"], None)):
            row_by_row = reference.perplexity_row_by_row(load(tiny_llama, adapter), wanted)
            assert score["perplexity"] == pytest.approx(row_by_row, rel=ROUNDING)
    trained = json.loads((run / "run.json").read_text())
    assert trained["data"]["supervised_tokens"] == counted
    assert trained["result"]["validation"]["perplexity"] == pytest.approx(found["perplexity"], rel=ROUNDING)


@pytest.mark.parametrize("quantization", [None, {"method": "nf4", "compute_dtype": "float32"}], ids=["", "nf4"])
def test_a_merged_model_scores_as_its_adapter(
    base: Path, quantization: Any, run_of: Callable[..., Path], qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    run = run_of(base, **{"data": {"max_length": 24}, "quantization": quantization})
    done(lora("merge", run, "--out", tmp_path / "merged"))
    merged, adapted = (
        done(lora("eval", target, "--data", qa_file, "--json")).json for target in (tmp_path / "merged", run)
    )
    assert merged["perplexity"] == pytest.approx(adapted["perplexity"], rel=1e-5)
    assert merged["tokens"] == adapted["tokens"], "read in the way its training read rows"


def score_windows(model: Any, tokenizer: Any, length: int) -> tuple[float, int]:
    """The summed loss and token count of windows of ``length``, with a stride of half that. Each token counts once."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id])
        first = 0
        scored = 1  # nothing predicts the first token
        while scored < len(ids):
            window = ids[first : first + length]
            with torch.no_grad():
                logits = model(input_ids=window[None]).logits[0]
            places = torch.arange(scored - first, len(window))
            chances = torch.log_softmax(logits[places - 1].double(), dim=-1)
            total -= float(chances.gather(1, window[places][:, None]).sum())
            count += len(places)
            scored = first + len(window)
            first += length // 2
    return total, count


@pytest.mark.parametrize("length", [16, 33, 64, 1024])
def test_plain_text_is_scored_in_windows_each_token_once(
    base: Path, length: int, run_of: Callable[..., Path], tmp_path: Path, lora: Any
) -> None:
    file = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    run = run_of(base, **{"data.train": file, "data.max_length": length, "data.format": "text"})
    found = done(lora("eval", run, "--data", file, "--json")).json
    model, tokenizer = load(base), AutoTokenizer.from_pretrained(base)
    total, count = score_windows(model, tokenizer, min(length, model.config.max_position_embeddings))
    every = sum(len(tokenizer(text).input_ids) for text in TEXTS)  # +1 for the end of text, -1 for the first token
    assert found["tokens"] == count == every
    assert found["base"]["loss"] == pytest.approx(total / count, rel=1e-6)
    adapted, _ = score_windows(
        load(base, run / "adapter"), tokenizer, min(length, model.config.max_position_embeddings)
    )
    assert found["loss"] == pytest.approx(adapted / count, rel=1e-6)


NF4 = {"quantization": {"method": "nf4", "compute_dtype": "float32"}}


@pytest.mark.parametrize("changes", [{}, {"data.packing": True}, NF4], ids=str)
def test_a_share_held_out_is_found_again(
    base: Path, changes: dict[str, Any], run_of: Callable[..., Path], lora: Any
) -> None:
    run = run_of(base, **{"data.validation": 0.3, "training.seed": 7} | changes)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [line for line in lines if line["split"] == "validation"]
    found = done(lora("eval", run, "--json")).json
    assert found["tokens"] == scores[-1]["tokens"]
    assert found["loss"] == pytest.approx(scores[-1]["loss"], rel=1e-6)
    assert found["base"]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-6)
    assert found["data"].startswith("30% of")


def test_validation_rows_of_their_own(
    tiny_gpt2: Path, run_of: Callable[..., Path], qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    """The training rows may be gone."""
    file = tmp_path / "held_out.jsonl"
    # many tokens: with few, float32 rounding alone changes the perplexity by 1e-6
    rows = [{"question": f"Who mends the nets of boat {n}?", "answer": f" The family of house {n}."} for n in range(24)]
    write_rows(file, rows)
    run = run_of(tiny_gpt2, **{"data.validation": file})
    qa_file.unlink()
    found = done(lora("eval", run, "--json")).json
    assert found["data"] == str(file)
    read = reference.rows_of(file, AutoTokenizer.from_pretrained(tiny_gpt2), 96)
    wanted = reference.perplexity_row_by_row(load(tiny_gpt2, run / "adapter"), read)
    assert found["perplexity"] == pytest.approx(wanted, rel=ROUNDING)


def test_the_newest_finished_run_is_the_default(
    tiny_gpt2: Path, run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lora("eval")
    assert result.exit_code == 2 and "no finished run under runs/" in result.stderr
    finished = {"runs/b": "2026-03-01T00:00:00+00:00", "runs/a": "2026-03-02T00:00:00+00:00", "runs/c": None}
    for name, when in finished.items():
        run = run_of(tiny_gpt2, name, **{"data.validation": 0.2, "training.max_steps": 1})
        edit_json(run / "run.json", finished=when)
    result = done(lora("eval", "--json"))
    assert result.json["target"] == "runs/a"
    assert "runs/a" in result.stderr


def test_the_table_is_of_the_same_numbers(
    tiny_gpt2: Path, run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    """It lists the base and then the adapter, or a model alone. stderr names the run, unless --quiet is given."""
    monkeypatch.chdir(tmp_path)
    run_of(tiny_gpt2, "runs/a", **{"data.validation": 0.2, "training.max_steps": 2})
    found = done(lora("eval", "--json")).json
    table = done(lora("eval", "--quiet"))
    told = done(lora("eval")).stderr.splitlines()
    assert table.stderr == "" and "runs/a" in told[0]
    assert [line.rpartition(" on ")[0] for line in told[1:]] == [
        "measuring the base",
        "measuring the base with its adapter",
    ]
    heads, *rows = [line.split() for line in table.stdout.splitlines()[1:]]
    assert table.stdout.startswith(f"{found['tokens']:,} predicted tokens of {found['data']}\n")
    assert heads == ["loss", "perplexity"] and found["base"]["loss"] != found["loss"]
    wanted = [(["base"], found["base"]), (["with", "adapter"], found)]
    assert rows == [[*name, f"{each['loss']:.4f}", f"{each['perplexity']:.2f}"] for name, each in wanted]
    data = found["data"].partition(" of ")[2]
    alone = done(lora("eval", tiny_gpt2, "--data", data))
    assert [line.split()[0] for line in alone.stdout.splitlines()[2:]] == ["model"]
    assert [line.rpartition(" on ")[0] for line in alone.stderr.splitlines()] == ["measuring the model"]


def test_base_and_adapter_moved_together_are_found(
    tiny_gpt2: Path, run_of: Callable[..., Path], qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    home = tmp_path / "home"
    shutil.copytree(tiny_gpt2, home / "base")
    run = run_of(home / "base", "home/runs/one")
    before = done(lora("eval", run, "--data", qa_file, "--json")).json
    home.rename(tmp_path / "elsewhere")
    after = done(lora("eval", tmp_path / "elsewhere" / "runs" / "one", "--data", qa_file, "--json")).json
    assert (after["loss"], after["base"]) == (before["loss"], before["base"])
    done(lora("merge", tmp_path / "elsewhere" / "runs" / "one", "--out", tmp_path / "merged"))


def test_a_copy_of_an_adapter_is_for_the_base_that_it_was_trained_on(
    tiny_gpt2: Path, run_of: Callable[..., Path], qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    """While that base is in its place, it is used: the folder at the copy's relative path may hold another base."""
    home, copy = tmp_path / "home", tmp_path / "copy"
    shutil.copytree(tiny_gpt2, home / "base")
    before = done(lora("eval", run_of(home / "base", "home/runs/one"), "--data", qa_file, "--json")).json
    shutil.copytree(home, copy)
    with edited_weights(copy / "base") as tensors:
        tensors[next(iter(tensors))] += 0.5
    after = done(lora("eval", copy / "runs" / "one", "--data", qa_file, "--json")).json
    assert (after["loss"], after["base"]) == (before["loss"], before["base"])


@pytest.mark.usefixtures("in_float32")
def test_rows_at_once_change_nothing(
    tiny_gpt2: Path, qa_file: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    scores = []
    for rows in (1, 3, 24):
        monkeypatch.setattr(compare, "ROWS_AT_ONCE", rows)
        scores.append(done(lora("eval", tiny_gpt2, "--data", qa_file, "--json")).json["perplexity"])
    assert scores == pytest.approx([scores[0]] * 3, rel=ROUNDING)


def test_changed_validation_rows_are_told(
    tiny_gpt2: Path, run_of: Callable[..., Path], qa_file: Path, lora: Any
) -> None:
    run = run_of(tiny_gpt2, **{"data.validation": 0.25})
    before = done(lora("eval", run, "--json"))
    assert "warnings" not in before.json and "warning" not in before.stderr
    lines = qa_file.read_text(encoding="utf-8").splitlines(keepends=True)
    qa_file.write_text("".join(lines[:-1]), encoding="utf-8")
    after = done(lora("eval", run / "adapter", "--json", "--quiet"))
    assert "not the 6 validation rows of the training run" in after.json["warnings"][0]
    assert after.json["warnings"][0] in after.stderr
    assert "warning" not in done(lora("eval", run, "--data", qa_file)).stderr, "asked for by name, nothing is compared"


def test_rows_of_an_adapter_without_a_record_of_them_are_not_called_changed(
    tiny_gpt2: Path, run_of: Callable[..., Path], tmp_path: Path, lora: Any
) -> None:
    """An adapter composed of those for a quantized base keeps their recipe, not the fingerprints of their rows."""
    run = run_of(tiny_gpt2, **{"data.validation": 0.25, "quantization.method": "nf4"})
    other = shutil.copytree(run / "adapter", tmp_path / "other")
    done(lora("adapters", "compose", f"{run}=1", f"{other}=1", "--out", tmp_path / "both"))
    assert "warnings" not in done(lora("eval", tmp_path / "both", "--json")).json


@pytest.mark.parametrize(
    ("share", "told"), [(0.05, "5% of "), (0.3, "30% of "), (0.125, "12.5% of "), (1 / 3, "33.3333% of ")]
)
def test_the_rows_are_named_in_words(
    share: float, told: str, tiny_gpt2: Path, run_of: Callable[..., Path], qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    other = tmp_path / "other.jsonl"
    shutil.copy(qa_file, other)
    train = [str(qa_file), {"path": str(other), "weight": 2.0}]
    run = run_of(tiny_gpt2, **{"data.train": train, "data.validation": share, "training.max_steps": 1})
    assert done(lora("eval", run, "--json")).json["data"] == f"{told}{qa_file}, {other}"


def test_an_unfinished_run(
    tiny_gpt2: Path, run_of: Callable[..., Path], qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    run = run_of(tiny_gpt2)
    finished = done(lora("eval", run, "--data", qa_file, "--json")).json
    edit_json(run / "run.json", finished=None)
    result = done(lora("eval", run, "--data", qa_file, "--json"))
    assert "has not finished" in result.stderr and "--resume" in result.stderr
    assert result.json.pop("loss") == finished["loss"]
    assert "has not finished" in done(lora("merge", run, "--out", tmp_path / "merged")).stderr
    shutil.rmtree(run / "adapter")
    for command in (["eval", run, "--data", qa_file], ["merge", run, "--out", tmp_path / "again"]):
        result = lora(*command)
        assert result.exit_code == 2
        assert "has no adapter yet" in result.stderr and f"lora train {run / 'recipe.yaml'} --resume" in result.stderr
    done(lora("train", run / "recipe.yaml", "--resume"))
    assert done(lora("eval", run, "--data", qa_file, "--json")).json["loss"] == finished["loss"]


def test_unreadable_runs_are_passed_over(
    tiny_gpt2: Path, run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(tiny_gpt2, "runs/good", **{"data.validation": 0.2, "training.max_steps": 1})
    for name, content in {"torn": b'{"finished": "2999', "list": b"[]", "number": b'{"finished": 7}'}.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_bytes(content)
    assert done(lora("eval", "--json")).json["target"] == "runs/good"


def edited(adapter: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the adapter's provenance.json."""
    record = json.loads((adapter / "provenance.json").read_text(encoding="utf-8"))
    change(record)
    (adapter / "provenance.json").write_text(json.dumps(record), encoding="utf-8")


def test_a_recipe_of_another_version_is_read_as_far_as_it_is_known(
    tiny_gpt2: Path, run_of: Callable[..., Path], qa_file: Path, lora: Any
) -> None:
    run = run_of(tiny_gpt2, **{"data.validation": 0.25})
    wanted = done(lora("eval", run, "--json")).json

    def later(record: dict[str, Any]) -> None:
        record["recipe"]["adapter"]["flux"] = 3
        record["recipe"]["data"]["smoothing"] = {"by": 2}
        record["recipe"]["safety"] = {"belt": True}

    edited(run / "adapter", later)
    assert done(lora("eval", run, "--json")).json == wanted

    def odd(record: dict[str, Any]) -> None:
        record["recipe"]["adapter"] |= {"r": "many", "method": "teleport"}
        record["versions"]["lora"] = "99.1"

    edited(run / "adapter", odd)
    result = lora("eval", run)
    assert result.exit_code == 2
    for words in (
        "provenance.json: recipe.adapter.r: ",
        "recipe.adapter.method: ",
        "written by lora 99.1",
        "remove it",
    ):
        assert words in result.stderr
    assert "pydantic" not in result.stderr and "https:" not in result.stderr
    (run / "adapter" / "provenance.json").unlink()
    done(lora("eval", run, "--data", qa_file))


def test_a_record_that_is_none(tiny_gpt2: Path, run_of: Callable[..., Path], qa_file: Path, lora: Any) -> None:
    run = run_of(tiny_gpt2, **{"training.max_steps": 1})
    objects = (
        *({"base": 3}, {"base": {"fingerprint": 3}}, {"data": []}, {"data": {"validation": {"rows": "3"}}}),
        *({"recipe": 3}, {"dtype": "int7"}, {"made": {"of": 3}}),
    )
    for content in ("[]", "{", "[" * 10000, *map(json.dumps, objects)):
        (run / "adapter" / "provenance.json").write_text(content)
        result = lora("eval", run, "--data", qa_file)
        assert result.exit_code == 2, content
        assert "provenance.json" in result.stderr and "remove it" in result.stderr, content


def damaged(folder: Path, out: Path, name: str, value: float) -> Path:
    """A copy of a model with one tensor filled with ``value``."""
    shutil.copytree(folder, out)
    with edited_weights(out) as weights:
        weights[name].fill_(value)
    return out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_fails(
    value: float, tiny_llama: Path, qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    model = damaged(tiny_llama, tmp_path / "model", "lm_head.weight", value)
    result = lora("eval", model, "--data", qa_file, "--json")
    assert result.exit_code == 3
    assert "the loss of the model is nan" in result.stderr and str(model) in result.stderr
    assert result.stdout == ""


def test_a_starting_adapter_that_gives_no_number_ends_training(
    train: Callable[..., Run], tmp_path: Path, write_recipe: Any, lora: Any
) -> None:
    adapter = train({"training.max_steps": 1}).folder / "adapter"
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.full_like(each, 1e30) for name, each in load_file(file).items()}, file, {"format": "pt"})
    changes = {"adapter.init_from": adapter, "data.validation": 0.2, "training.output_dir": tmp_path / "next"}
    result = lora("train", write_recipe(changes))
    assert result.exit_code == 3
    assert "step 0: loss with the starting adapter is nan" in " ".join(result.stderr.split())


def test_a_base_that_gives_no_number_ends_training(
    tiny_llama: Path, tmp_path: Path, write_recipe: Any, lora: Any
) -> None:
    model = damaged(tiny_llama, tmp_path / "model", "lm_head.weight", math.nan)
    result = lora("train", write_recipe({"model.name_or_path": model, "data.validation": 0.2}))
    assert result.exit_code == 3
    told = " ".join(result.stderr.split())
    assert "step 0: loss of the base is nan" in told and "the weights are damaged, or the activations overflow" in told
    assert "learning_rate" not in told
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or "NaN" not in metrics.read_text(encoding="utf-8")


def test_an_adapter_whose_base_was_moved_is_measured_and_quantized_with_it(
    train: Callable[..., Run], tiny_llama: Path, qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    run = train({"model.name_or_path": base, "training.max_steps": 1})
    rows = ("--data", qa_file, "--json")
    before = done(lora("eval", run.folder, *rows)).json
    moved = base.rename(tmp_path / "moved")
    for command in (("eval", run.folder), ("quantize", run.folder, "--out", tmp_path / "out")):
        refused = lora(*command, *rows)
        assert refused.exit_code == 2 and "or give its new place with --base" in refused.stderr
        after = done(lora(*command, *rows, "--base", moved)).json
        measured = after.get("before", after)
        assert measured["loss"] == before["loss"]
    assert after["base"] == str(moved)


def test_a_perplexity_beyond_all_numbers_is_still_json(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    with edited_weights(tmp_path / "model") as weights:
        weights["lm_head.weight"] *= 1e4
    result = done(lora("eval", tmp_path / "model", "--data", qa_file, "--json"))
    found = json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["loss"] > 710
    assert 1e307 < found["perplexity"] < math.inf


def test_rows_to_measure_on_need_not_have_every_column_of_training(
    write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    row = {"q": "Sum up.", "context": "A text.", "a": "Text."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    del row["context"]
    (tmp_path / "others.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    columns = {"instruction": "q", "input": "context", "output": "a"}
    done(lora("train", write_recipe({"data": {"train": tmp_path / "rows.jsonl", "columns": columns}})))
    done(lora("eval", tmp_path / "run", "--data", tmp_path / "others.jsonl"))


@pytest.mark.parametrize("failing", [False, True])
def test_evaluation_leaves_the_mode_it_found(tiny_gpt2: Path, failing: bool) -> None:
    model = load(tiny_gpt2)
    for training in (True, False):
        model.train(training)
        with pytest.raises(ZeroDivisionError) if failing else nullcontext(), evaluating(model):
            assert not model.training and not torch.is_grad_enabled()
            assert 1 / (not failing) == 1
        assert model.training is training and torch.is_grad_enabled()
