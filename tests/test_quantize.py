"""`lora quantize` writes what Transformers and bitsandbytes write, and what the reference quantizers compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import Base, done, edit_json, edited_weights, weights_of
from made_adapters import ALL_LINEAR, in_dtype
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    FalconConfig,
    Gemma3nTextConfig,
    MambaConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from lora_cli.model.linear4bit import dequantize, patch_4bit_layers
from lora_cli.weights.files.shards import TensorInfo, read_tensor

METHODS = ["nf4", "fp4", "int8"]


def linear_weights(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights (out, in) to quantize, by name in the checkpoint."""
    found = {k: w for k, w in weights_of(folder).items() if any(f".{leaf}.weight" in k for leaf in ALL_LINEAR[name])}
    return {key: weight.T.contiguous() if name == "gpt2" else weight for key, weight in found.items()}


def bitsandbytes(method: str, double_quant: bool) -> BitsAndBytesConfig:
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def plain_codes(method: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and the dequantized weight, by the reference quantizers."""
    if method == "int8":
        codes, absmax = reference.int8_codes(weight.half())  # bitsandbytes quantizes to 8 bits from float16
        return codes, reference.int8_dequantize(codes, absmax)
    encode, decode = {
        "nf4": (reference.nf4_codes, reference.nf4_dequantize),
        "fp4": (reference.fp4_codes, reference.fp4_dequantize),
    }[method]
    codes, absmax = encode(weight)
    return codes, decode(codes, absmax, weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_what_transformers_saves(
    base: Base, method: str, dtype: torch.dtype, tmp_path: Path, lora: Any
) -> None:
    _, folder = base
    if dtype != torch.float32:
        folder = in_dtype(folder, dtype, tmp_path / "base")
        edit_json(folder / "config.json", architectures=None)
    done(lora("quantize", folder, "--out", tmp_path / "out", "--method", method))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bitsandbytes(method, True), dtype=dtype)
    model.save_pretrained(tmp_path / "plain")

    found, wanted = weights_of(tmp_path / "out"), weights_of(tmp_path / "plain")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("out", "plain")]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["quant_method"] == "bitsandbytes"


@pytest.mark.parametrize("method", METHODS)
def test_codes_and_errors_equal_the_plain_quantizers(base: Base, method: str, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    flags = [] if method == "int8" else ["--no-double-quant"]
    report = done(lora("quantize", folder, "--out", tmp_path / "out", "--method", method, *flags, "--json")).json
    stored = weights_of(tmp_path / "out")
    errors = {}
    for key, weight in linear_weights(name, folder).items():
        codes, values = plain_codes(method, weight)
        found = stored[key] if method == "int8" else reference.unpack_4bit(stored[key])
        if method == "fp4":  # codes 0 and 8 both stand for 0
            found = torch.where(found == 8, 0, found)
        assert torch.equal(found, codes), key
        errors[key.removesuffix(".weight").removeprefix("transformer.")] = float(
            (values.double() - weight.double()).norm() / weight.double().norm()
        )
    told = {key.removeprefix("transformer."): error for key, error in report["layers"].items()}
    assert told == pytest.approx(errors, rel=1e-4)
    assert list(report["layers"].values()) == sorted(report["layers"].values(), reverse=True), "worst first"
    low, high = {"nf4": (0.05, 0.15), "fp4": (0.08, 0.2), "int8": (0.002, 0.02)}[method]
    assert all(low < error < high for error in told.values())


@pytest.mark.parametrize("method", METHODS)
def test_any_program_loads_it(base: Base, method: str, qa_file: Path, tmp_path: Path, lora: Any) -> None:
    name, folder = base
    out = tmp_path / "out"
    report = done(lora("quantize", folder, "--out", out, "--method", method, "--data", qa_file, "--json")).json
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.use_cache
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    assert (out / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()

    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, out)]
    assert [report["bytes_before"], report["bytes_after"]] == sizes
    assert sizes[1] < sizes[0]
    assert report["method"] == method and report["out"] == str(out)
    layers = {key.removesuffix(".weight") for key in linear_weights(name, folder)}
    assert set(report["layers"]) == layers


@pytest.mark.parametrize("method", METHODS)
def test_perplexity_before_and_after(tiny_llama: Path, method: str, qa_file: Path, tmp_path: Path, lora: Any) -> None:
    out = tmp_path / "out"
    result = done(lora("quantize", tiny_llama, "--out", out, "--method", method, "--data", qa_file, "--json"))
    assert result.stderr == "measuring the model on 24 rows\nmeasuring the quantized model on 24 rows\n"
    report = result.json
    for key, folder in (("before", tiny_llama), ("after", out)):
        alone = done(lora("eval", folder, "--data", qa_file, "--json")).json
        assert report[key] == {name: alone[name] for name in ("loss", "perplexity", "tokens")}
    assert report["before"]["perplexity"] != report["after"]["perplexity"]
    assert report["after"]["perplexity"] == pytest.approx(report["before"]["perplexity"], rel=0.1)


def test_the_text_says_what_the_record_does(tiny_llama: Path, qa_file: Path, tmp_path: Path, lora: Any) -> None:
    given = ["quantize", tiny_llama, "--method", "nf4", "--data", qa_file, "--out"]
    report = done(lora(*given, tmp_path / "out", "--json")).json
    first, *lines = done(lora(*given, tmp_path / "again", "--quiet")).stdout.splitlines()
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (tiny_llama, tmp_path / "out")
    ]
    before, after = (report[key] for key in ("bytes_before", "bytes_after"))
    headers = 20_000  # bytes that the files' headers take, at most
    assert 0 <= sizes[0] - before < headers and 0 <= sizes[1] - after < headers
    shown = f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({round(100 * after / before)}%), nf4"
    assert first == f"{tmp_path / 'again'}: {shown}" and after < before
    errors = sorted(((error, name) for name, error in report["layers"].items()), reverse=True)
    assert len(errors) == 14
    mean = sum(error for error, _ in errors) / 14
    assert lines[0] == f"relative error of 14 layers: mean {mean:.4f}; the largest:"
    assert lines[1:6] == [f"  {error:.4f}  {name}" for error, name in errors[:5]]
    perplexities = " -> ".join(f"{report[key]['perplexity']:.3f}" for key in ("before", "after"))
    assert lines[6:] == [f"perplexity {perplexities} on {report['before']['tokens']:,} tokens"]


def test_quantized_already_is_refused(tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    done(lora("quantize", tiny_gpt2, "--out", tmp_path / "once"))
    result = lora("quantize", tmp_path / "once", "--out", tmp_path / "twice")
    assert result.exit_code == 2
    assert "quantized already" in result.stderr
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("case", ["no template", "other vocabulary", "nothing to learn"])
def test_rows_that_cannot_be_measured_are_refused_before_anything_is_written(
    case: str, tiny_gpt2: Path, tmp_path: Path, lora: Any
) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_gpt2, model)
    row: dict[str, Any] = {"question": "Who?", "answer": " I"}
    if case == "no template":
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    elif case == "other vocabulary":
        tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
        tokenizer.add_tokens(["Who?"])
        tokenizer.save_pretrained(model)
    else:
        row["question"] = "word " * 400  # the answer lies beyond the model's 128 positions
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    result = lora("quantize", model, "--out", tmp_path / "out", "--data", rows)
    assert result.exit_code == 2, result.stderr
    says = {"no template": "chat template", "other vocabulary": "vocabulary", "nothing to learn": "nothing to learn"}
    assert says[case] in result.stderr
    assert not (tmp_path / "out").exists()


def test_weights_of_zeros_and_of_no_numbers(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    name = "model.layers.0.mlp.up_proj"
    for folder, value in (("zeros", 0.0), ("nan", float("nan"))):
        shutil.copytree(tiny_llama, tmp_path / folder)
        weights = weights_of(tiny_llama)
        weights[f"{name}.weight"].fill_(value)
        save_file(weights, tmp_path / folder / "model.safetensors", {"format": "pt"})
    result = done(lora("quantize", tmp_path / "zeros", "--out", tmp_path / "out", "--json"))
    assert result.json["layers"][name] == 0
    result = lora("quantize", tmp_path / "nan", "--out", tmp_path / "out2")
    assert result.exit_code == 2
    assert f"{name}.weight" in result.stderr and not (tmp_path / "out2").exists()


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def renamed(tokenizer: Any, tmp_path: Path) -> Path:
    """A NemotronH of two layers, whose ``model.layers`` are stored as ``backbone.layers``."""
    torch.manual_seed(3)
    kinds = ["attention", "mlp"]
    config = NemotronHConfig(vocab_size=len(tokenizer), layers_block_type=kinds, max_position_embeddings=64, **SIZES)
    NemotronHForCausalLM(config).save_pretrained(tmp_path / "renamed")
    tokenizer.save_pretrained(tmp_path / "renamed")
    return tmp_path / "renamed"


@pytest.mark.parametrize("method", METHODS)
def test_errors_of_layers_that_are_stored_by_another_name(
    renamed: Path, method: str, tmp_path: Path, lora: Any
) -> None:
    flags = [] if method == "int8" else ["--no-double-quant"]
    report = done(lora("quantize", renamed, "--out", tmp_path / "out", "--method", method, *flags, "--json")).json
    errors = {}
    for key, weight in weights_of(renamed).items():
        if ".mixer." in key:
            _, values = plain_codes(method, weight)
            layer = key.replace("backbone.", "model.").removesuffix(".weight")
            errors[layer] = float((values - weight).norm() / weight.norm())
    assert len(errors) == 6 and report["layers"] == pytest.approx(errors, rel=1e-4)


def test_text_report_where_no_error_is_known(
    renamed: Path, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.weights.quantize_in_memory._errors", lambda *_: {})
    result = done(lora("quantize", renamed, "--out", tmp_path / "out"))
    assert "nf4" in result.stdout and "relative error" not in result.stdout


@pytest.mark.parametrize("name", ["backbone.layers.0.mixer.q_proj.weight", "backbone.norm_f.weight"])
def test_what_is_no_number_by_another_name(name: str, renamed: Path, tmp_path: Path, lora: Any) -> None:
    """The error gives the tensor's name in the file."""
    with edited_weights(renamed) as weights:
        weights[name].view(-1)[5] = float("nan")
    result = lora("quantize", renamed, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"tensor {name} holds NaN" in result.stderr and not (tmp_path / "out").exists()


def test_beside_loading_what_is_quantized_is_read_once(
    renamed: Path, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def read(info: TensorInfo) -> torch.Tensor:
        reads.append(info.name)
        return read_tensor(info)

    monkeypatch.setattr("lora_cli.weights.files.stored_model.read_tensor", read)
    done(lora("quantize", renamed, "--out", tmp_path / "out"))
    assert sorted(reads) == sorted(name for name in weights_of(renamed) if "_proj" in name)


@pytest.mark.parametrize(
    ("base_name", "name"),
    [("tiny_llama", "model.layers.0.mlp.up_proj.weight"), ("renamed", "backbone.layers.1.mixer.up_proj.weight")],
)
def test_a_weight_too_large_for_8_bits(
    base_name: str, name: str, request: pytest.FixtureRequest, tmp_path: Path, lora: Any
) -> None:
    """bitsandbytes quantizes to 8 bits from float16, in which this weight is infinite."""
    folder = shutil.copytree(request.getfixturevalue(base_name), tmp_path / "large")
    with edited_weights(folder) as weights:
        weights[name][0, 0] = 1e5
    result = lora("quantize", folder, "--out", tmp_path / "out", "--method", "int8")
    assert result.exit_code == 2
    assert f"tensor {name} has values beyond float16's" in result.stderr and "--method nf4" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_could_not_be_loaded_again(joined: Path, method: str, tmp_path: Path, lora: Any) -> None:
    """Transformers saves HRM's projections joined in one tensor, and would also join their codes and scales."""
    flags = ["--method", method, "--out", tmp_path / "out"]
    result = lora("quantize", joined, *flags)
    hint = "--skip gate_proj,k_proj,q_proj,up_proj,v_proj"
    assert result.exit_code == 2 and "could not be loaded again" in result.stderr and hint in result.stderr
    result = lora("quantize", joined, *flags, "--skip", "gate_proj,k_proj,q_proj,up_proj")
    assert result.exit_code == 2 and "self_attn.v_proj and 1 more" in result.stderr and hint in result.stderr
    assert not (tmp_path / "out").exists()

    report = done(lora("quantize", joined, *flags, *hint.split(), "--json")).json
    assert {layer.rpartition(".")[2] for layer in report["layers"]} == {"o_proj", "down_proj"}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        found, wanted = (
            each(torch.arange(8)[None]).logits for each in (model, AutoModelForCausalLM.from_pretrained(joined))
        )
    assert (found - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, state_size=4), "dt_proj"),
        (
            Gemma3nTextConfig(
                vocab_size=400,
                hidden_size=32,
                intermediate_size=[64],
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                layer_types=["full_attention"],
                num_kv_shared_layers=0,
                activation_sparsity_pattern=[0.0],
                vocab_size_per_layer_input=400,
                hidden_size_per_layer_input=8,
                laurel_rank=4,
            ),
            "correction_coefs, prediction_coefs",
        ),
    ],
)
def test_a_layer_whose_numbers_the_model_reads(
    config: Any, layers: str, tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    """Mamba multiplies by dt_proj's weight, and Gemma 3n clips two layers' weights in training. Codes would fail."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    result = lora("quantize", base, "--out", tmp_path / "out")
    assert result.exit_code == 2 and f"reads {layers}'s weights directly" in result.stderr
    result = done(lora("quantize", base, "--out", tmp_path / "out", "--skip", layers.replace(" ", "")))
    assert "expert weights" not in result.stdout, "a convolution is none"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()(torch.arange(8)[None])

    changes = {"model.name_or_path": base, "quantization": {"method": "nf4"}, "adapter.target_modules": "all-linear"}
    result = lora("train", write_recipe(changes))
    assert result.exit_code == 2 and f"reads {layers}'s weights directly" in result.stderr

    stored = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    stored.save_pretrained(tmp_path / "out")  # over what was quantized before
    result = lora("train", write_recipe(changes | {"model.name_or_path": tmp_path / "out", "quantization": ...}))
    assert result.exit_code == 2 and f"reads {layers.split(', ')[0]}'s weights directly" in result.stderr
    (tmp_path / "text.jsonl").write_text('{"text": "Sea"}\n')
    result = lora("eval", tmp_path / "out", "--perplexity", "--data", tmp_path / "text.jsonl")
    if layers == "dt_proj":
        assert result.exit_code == 2 and "reads dt_proj's weights directly" in result.stderr
    else:
        assert done(result).stdout


def test_a_model_without_a_layer_to_quantize(
    tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falcon's layers are a subclass of nn.Linear, which Transformers silently leaves unquantized."""
    base = tmp_path / "falcon"
    shutil.copytree(tiny_llama, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = FalconConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    no_weights = "transformers.AutoModelForCausalLM.from_pretrained"
    monkeypatch.setattr(no_weights, lambda *_, **__: pytest.fail("weights were loaded before the fault was told"))
    for method in ("nf4", "int8"):
        result = lora("train", write_recipe({"model.name_or_path": base, "quantization": {"method": method}}))
        assert result.exit_code == 2 and "no layer that can be quantized" in result.stderr
        assert "loading" not in result.stderr and not (tmp_path / "run").exists()


def test_a_missing_tokenizer_is_told_before_anything_is_quantized(
    tiny_llama: Path, tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    monkeypatch.setattr("lora_cli.weights.quantize.write_quantized", None)
    result = lora("quantize", tmp_path / "model", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "holds no tokenizer" in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("guarded", [True, False])
def test_gradients_after_an_evaluation_pass_are_those_of_the_expanded_weight(guarded: bool) -> None:
    """Without the guard, the first evaluation pass repacks the weights. The gradient is then wrong or missing."""
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16, for which weights are repacked")
    torch.manual_seed(0)
    layer = Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    expanded = dequantize(layer.weight.data, layer.weight.quant_state).float().clone()
    if guarded:
        patch_4bit_layers(layer)
    else:
        assert layer.support_avx512bf16_for_cpu, "what the guard turns off"
    with torch.no_grad():
        layer.eval()(torch.randn(4, 256, dtype=torch.bfloat16))
    layer.train()
    x, upstream = torch.randn(8, 256, dtype=torch.bfloat16, requires_grad=True), torch.randn(8, 512)
    layer(x).backward(upstream.bfloat16())
    gradient = torch.zeros_like(x) if x.grad is None else x.grad
    cosine = torch.cosine_similarity(gradient.float().flatten(), (upstream @ expanded).flatten(), dim=0)
    assert cosine > 0.999 if guarded else cosine < 0.9


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("base_name", ["gpt2", "llama"])
def test_evaluation_leaves_gradients_as_they_are(
    base_name: str,
    method: str,
    request: pytest.FixtureRequest,
    qa_file: Path,
    write_recipe: Any,
    lora: Any,
    no_curves: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in the first evaluation pass, and from then on
    gradients are silently wrong. Here bitsandbytes takes every CPU for one with AVX512-BF16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    changes = {
        "model.name_or_path": request.getfixturevalue(f"tiny_{base_name}"),
        "quantization": {"method": method, "compute_dtype": "float32"},
        "adapter.target_modules": "all-linear",
        "training.eval_steps": 1,
    }
    adapters = []
    for name, more in {"never": {}, "often": {"data.validation": qa_file}}.items():
        done(lora("train", write_recipe(changes | {"training.output_dir": tmp_path / name} | more)))
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
