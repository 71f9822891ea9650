"""Model folders that are damaged, of another kind, or missing."""

from __future__ import annotations

import json
import shutil
from typing import Any

from bad_input import LFS, ROW, Arguments, World, case


@case("nowhere/model", "no such model folder")
def missing_model(w: World) -> Arguments:
    return w.train({"model.name_or_path": "./nowhere/model"})


@case("modl", "no such model folder", "did you mean 'model'?")
def misspelt_model(w: World) -> Arguments:
    w.model()
    return w.train({"model.name_or_path": "modl"})


@case("somebody/something", "HF_HUB_OFFLINE", "not in the local cache")
def hub_id_while_offline(w: World) -> Arguments:
    return w.train({"model.name_or_path": "somebody/something"})


@case("no config.json", "model")
def no_config(w: World) -> Arguments:
    (w.root / w.model() / "config.json").unlink()
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "line 1")
def broken_config(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", '{"model_type": "gpt2"')
    return w.train({"model.name_or_path": "model"})


@case("model/config.json")
def config_that_is_a_list(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", "[]")
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "gpt17")
def unknown_model_type(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", model_type="gpt17")
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "'vit'", "not a causal language model")
def model_of_another_kind(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", json.dumps({"model_type": "vit"}))
    return w.train({"model.name_or_path": "model"})


SMALL = {"vocab_size": 400, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@case("model/config.json: a model of type 'bert' sees the tokens that it is to predict", "is_decoder: false")
def encoder_alone(w: World) -> Arguments:
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(w.root / w.model())
    return w.train({"model.name_or_path": "model"})


@case("a model of type 'bert-generation' sees the tokens", "is_decoder: false")
def encoder_that_fills_no_masks(w: World) -> Arguments:
    from transformers import BertGenerationConfig, BertGenerationDecoder

    BertGenerationDecoder(BertGenerationConfig(**SMALL)).save_pretrained(w.root / w.model())
    return w.train({"model.name_or_path": "model"})


@case("a model of type 'xlnet' sees the tokens that it is to predict")
def model_of_permuted_text(w: World) -> Arguments:
    from transformers import XLNetConfig, XLNetLMHeadModel

    sizes = {"d_model": 8, "d_inner": 8, "n_layer": 1, "n_head": 2}
    XLNetLMHeadModel(XLNetConfig(vocab_size=400, **sizes)).save_pretrained(w.root / w.model())
    return w.train({"model.name_or_path": "model", "adapter.target_modules": "all-linear", "adapter.r": 2})


@case("model/config.json: a model of type 'reformer' passes no gradient to adapters", "another type")
def model_of_reversible_layers(w: World) -> Arguments:
    from transformers import ReformerConfig, ReformerModelWithLMHead

    sizes = {"hidden_size": 8, "feed_forward_size": 8, "num_attention_heads": 2, "attention_head_size": 4}
    rest = {"is_decoder": True, "attn_layers": ["local"], "axial_pos_embds": False, "max_position_embeddings": 128}
    ReformerModelWithLMHead(ReformerConfig(vocab_size=400, **sizes, **rest)).save_pretrained(w.root / w.model())
    return w.train({"model.name_or_path": "model", "adapter.target_modules": "all-linear", "adapter.r": 2})


@case("a model of type 'llama' sees the tokens", "is_causal: false")
def model_for_embeddings(w: World) -> Arguments:
    w.edit_json(w.model("llama") / "config.json", is_causal=False)
    return w.train({"model.name_or_path": "model"})


@case("a model of type 'llama' sees the tokens", "is_causal: false")
def perplexity_of_a_model_for_embeddings(w: World) -> Arguments:
    w.edit_json(w.model("llama") / "config.json", is_causal=False)
    return ["eval", "model", "--perplexity", "--data", w.rows(ROW)]


@case("model", "no tokenizer", "tokenizer.json")
def no_tokenizer(w: World) -> Arguments:
    model = w.root / w.model()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    return w.train({"model.name_or_path": "model"})


@case("model", "no usable tokenizer")
def broken_tokenizer(w: World) -> Arguments:
    w.file(f"{w.model()}/tokenizer.json", "{")
    return w.train({"model.name_or_path": "model"})


@case("model", "no usable tokenizer")
def tokenizer_that_is_none(w: World) -> Arguments:
    w.file(f"{w.model()}/tokenizer.json", "{}")
    return w.train({"model.name_or_path": "model"})


@case("model", "no usable tokenizer: tokenizer_class is GPT2Config")
def tokenizer_of_a_class_of_another_kind(w: World) -> Arguments:
    w.edit_json(w.model() / "tokenizer_config.json", tokenizer_class="AutoConfig")
    return w.train({"model.name_or_path": "model"})


@case("model", "no usable tokenizer: NotImplementedError")
def tokenizer_of_a_class_without_words(w: World) -> Arguments:
    w.edit_json(w.model() / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerBase")
    return w.train({"model.name_or_path": "model"})


def _with_fewer_words(w: World) -> None:
    w.edit_json(w.model() / "config.json", vocab_size=300)

    def shorten(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("wte.weight", "lm_head.weight")):
                tensors[name] = tensor[:300]

    w.tensors("model/model.safetensors", shorten)


@case("model", "tokenizer", "vocabulary", "300")
def tokenizer_of_a_larger_vocabulary(w: World) -> Arguments:
    _with_fewer_words(w)
    return w.train({"model.name_or_path": "model"})


@case("model", "tokenizer", "vocabulary", "300")
def words_beyond_the_vocabulary_in_validation_rows(w: World) -> Arguments:
    _with_fewer_words(w)
    rows = {"data.train": w.rows({"question": "Q", "answer": "Z"}), "data.validation": w.rows(ROW, name="held.jsonl")}
    return w.train({"model.name_or_path": "model"} | rows)


@case("model", "no safetensors weights")
def no_weights(w: World) -> Arguments:
    (w.root / w.model() / "model.safetensors").unlink()
    return w.train({"model.name_or_path": "model"})


@case("model", "no safetensors weights", "pytorch_model.bin", "save the model again with safetensors")
def pickled_weights(w: World) -> Arguments:
    (w.root / w.model() / "model.safetensors").rename(w.root / "model" / "pytorch_model.bin")
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "not a whole safetensors file", "bytes", "again")
def truncated_weights(w: World) -> Arguments:
    w.truncate(w.model() / "model.safetensors")
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "not a whole safetensors file")
def weights_cut_within_the_header(w: World) -> Arguments:
    w.truncate(w.model() / "model.safetensors", 0.001)
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "not a whole safetensors file")
def empty_weights(w: World) -> Arguments:
    w.file(f"{w.model()}/model.safetensors", b"")
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "h.0.mlp.c_fc.weight", "[64, 258]", "[64, 256]", "config.json")
def weights_of_another_shape(w: World) -> Arguments:
    def widen(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith("h.0.mlp.c_fc.weight"))
        tensors[name] = tensors[name].new_zeros(64, 258)

    w.tensors(w.model() / "model.safetensors", widen)
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors.index.json", "model-00002-of-00002.safetensors")
def missing_shard(w: World) -> Arguments:
    model = w.root / w.model()
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    w.file("model/model.safetensors.index.json", json.dumps({"weight_map": shards}))
    return w.train({"model.name_or_path": "model"})


def indexed(w: World, index: str) -> None:
    """Write a model folder with this index. Rename the single weight file, which would be read instead."""
    (w.root / w.model() / "model.safetensors").rename(w.root / "model" / "model-00001-of-00001.safetensors")
    w.file("model/model.safetensors.index.json", index)


@case("model/model.safetensors.index.json", "not a readable shard index")
def broken_shard_index(w: World) -> Arguments:
    indexed(w, "{}")
    return w.train({"model.name_or_path": "model"})


def _with_weights_of_another_name(w: World) -> None:
    model = w.root / w.model()
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    w.edit_json(model / "config.json", transformers_weights="other.safetensors")


@case("model/config.json", "names the weights to load (other.safetensors; transformers_weights)", "remove the key")
def weights_of_a_name_that_only_transformers_reads(w: World) -> Arguments:
    _with_weights_of_another_name(w)
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "names the weights to load (other.safetensors; transformers_weights)")
def perplexity_by_weights_of_such_a_name(w: World) -> Arguments:
    _with_weights_of_another_name(w)
    return ["eval", "model", "--perplexity", "--data", w.rows(ROW)]


@case("model/config.json", "names the weights to load (other.safetensors; transformers_weights)")
def quantize_of_weights_of_such_a_name(w: World) -> Arguments:
    _with_weights_of_another_name(w)
    return ["quantize", "model", "--out", "out"]


@case("model", "lack", "h.1.ln_2.weight", loads=True)
def missing_tensor(w: World) -> Arguments:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith("h.1.ln_2.weight"))]

    w.tensors(w.model() / "model.safetensors", drop)
    return w.train({"model.name_or_path": "model"})


@case("model", "quantized already (bitsandbytes)", "use the model as it is")
def quantize_again_in_training(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return w.train({"model.name_or_path": "model", "quantization.method": "nf4"})


@case("model", "training.fsdp", "only those in bitsandbytes' 4 bits can be sharded", "quantization.method nf4")
def shard_what_is_stored_in_8_bits(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    return w.train({"model.name_or_path": "model", "training.fsdp": True})


@case("model", "quantized already (gptq)", "use the model as it is")
def quantize_again(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return ["quantize", "model", "--out", "out"]


@case("model/model.safetensors", "not a whole safetensors file")
def weights_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file(f"{w.model()}/model.safetensors", LFS)
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "not readable")
def config_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", LFS)
    return ["quantize", "model", "--out", "out"]


@case("model/config.json", "'t5'", "not a causal language model")
def encoder_and_decoder(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", json.dumps({"model_type": "t5"}))
    return ["eval", "model", "--data", w.rows(ROW)]


@case("model/config.json", "None")
def config_without_a_type(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", model_type=...)
    return ["eval", "model", "--data", w.rows(ROW)]


@case("model/config.json", "['gpt2']", "unknown to transformers")
def config_with_a_type_that_is_a_list(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", model_type=["gpt2"])
    return w.train({"model.name_or_path": "model"})


@case("nothing", "no such model folder")
def quantize_of_nothing(w: World) -> Arguments:
    return ["quantize", "nothing", "--out", "out"]


@case("model/model.safetensors", "not a whole safetensors file")
def quantize_of_truncated_weights(w: World) -> Arguments:
    w.truncate(w.model() / "model.safetensors")
    return ["quantize", "model", "--out", "out"]


@case("nothing", "no such model folder")
def eval_of_a_missing_target(w: World) -> Arguments:
    return ["eval", "nothing", "--data", w.rows(ROW)]


@case("model", "no tokenizer")
def eval_without_a_tokenizer(w: World) -> Arguments:
    (w.root / w.model() / "tokenizer.json").unlink()
    return ["eval", "model", "--data", w.rows(ROW)]


@case("model/model.safetensors", "not a whole safetensors file")
def eval_of_truncated_weights(w: World) -> Arguments:
    w.truncate(w.model() / "model.safetensors")
    return ["eval", "model", "--data", w.rows(ROW)]


@case("an adapter", "base")
def adapter_given_as_model(w: World) -> Arguments:
    return w.train({"model.name_or_path": str(w.run() / "adapter")})


@case("model/tokenizer.json", "git lfs pull")
def tokenizer_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file(f"{w.model()}/tokenizer.json", LFS)
    return w.train({"model.name_or_path": "model"})


@case("model/chat_template.jinja", "git lfs pull")
def chat_template_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file(f"{w.model('llama')}/chat_template.jinja", LFS)
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors.index.json", "not a readable shard index", "git lfs pull")
def index_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    indexed(w, LFS)
    return ["quantize", "model", "--out", "out"]


@case("model/model.safetensors.index.json", "not a readable shard index")
def index_of_numbers(w: World) -> Arguments:
    indexed(w, json.dumps({"weight_map": {"a": 1, "b": 2}}))
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors.index.json", "not a readable shard index")
def index_that_leads_out_of_the_folder(w: World) -> Arguments:
    model = w.root / w.model()
    (model / "model.safetensors").rename(w.root / "other.safetensors")
    w.file("model/model.safetensors.index.json", json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors.index.json", "not a readable shard index")
def index_nested_without_end(w: World) -> Arguments:
    indexed(w, "[" * 100_000)
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors.index.json", "not a readable shard index")
def index_without_a_shard(w: World) -> Arguments:
    indexed(w, json.dumps({"weight_map": {}}))
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "holds no tensor")
def weights_without_a_tensor(w: World) -> Arguments:
    w.tensors(w.model() / "model.safetensors", lambda tensors: tensors.clear())
    return w.train({"model.name_or_path": "model"})


def header(w: World, changes: dict[str, Any] | bytes) -> Arguments:
    """Train on a model whose weight file's header has ``changes`` to the first tensor's entry, or is these bytes."""
    file = w.root / w.model() / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    if isinstance(changes, bytes):
        told = changes
    else:
        entries[next(name for name in entries if name != "__metadata__")] |= changes
        told = json.dumps(entries).encode()
    file.write_bytes(len(told).to_bytes(8, "little") + told + content[8 + length :])
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "not a whole safetensors file")
def header_of_a_tensor_beyond_the_file(w: World) -> Arguments:
    return header(w, {"data_offsets": [0, 10**9]})


@case("model/model.safetensors", "not a whole safetensors file")
def header_of_another_shape(w: World) -> Arguments:
    return header(w, {"shape": [3, 5]})


@case("model/model.safetensors", "not a whole safetensors file")
def header_of_a_negative_shape(w: World) -> Arguments:
    return header(w, {"shape": [-1, 5]})


@case("model/model.safetensors", "not a whole safetensors file")
def header_of_an_unknown_type(w: World) -> Arguments:
    return header(w, {"dtype": "F7"})


@case("model/model.safetensors", "not a whole safetensors file")
def header_that_is_no_json(w: World) -> Arguments:
    return header(w, b'{"a": ')


@case("model/model.safetensors", "not a whole safetensors file")
def header_that_is_a_list(w: World) -> Arguments:
    return header(w, b"[]      ")


@case("model/model.safetensors", "not a whole safetensors file")
def header_as_long_as_the_memory(w: World) -> Arguments:
    w.file(f"{w.model()}/model.safetensors", (2**62).to_bytes(8, "little") + b"{}")
    return w.train({"model.name_or_path": "model"})


@case("model", "lack", "h.0.ln_1.weight", loads=True)
def shard_without_its_tensors(w: World) -> Arguments:
    model = w.root / w.model()
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")

    def drop(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith("h.0.ln_1.weight"))]

    w.tensors("model/model-00001-of-00001.safetensors", drop)
    index = {"metadata": {"total_size": 1}, "weight_map": {"h.0.ln_1.weight": "model-00001-of-00001.safetensors"}}
    w.file("model/model.safetensors.index.json", json.dumps(index))
    return w.train({"model.name_or_path": "model"})


@case("model", "no config.json")
def config_that_is_a_folder(w: World) -> Arguments:
    (w.root / w.model() / "config.json").unlink()
    w.file("model/config.json/x", "")
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "not readable")
def config_nested_without_end(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", "[" * 100_000)
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "not readable")
def config_in_utf_16(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", '{"model_type": "gpt2"}'.encode("utf-16"))
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "not a usable model configuration")
def config_with_text_for_a_width(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", n_embd="wide")
    return w.train({"model.name_or_path": "model"})


@case("model", "config.json")
def config_with_a_negative_width(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", n_embd=-32)
    return w.train({"model.name_or_path": "model"})


@case("model", "config.json")
def config_with_a_width_that_the_heads_do_not_divide(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", n_head=5)
    return w.train({"model.name_or_path": "model"})


@case("model", "config.json")
def config_without_a_head(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", n_head=0)
    return ["eval", "model", "--data", w.rows(ROW)]


@case("model", "config.json")
def config_with_an_unknown_activation(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", activation_function="gelu_newest")
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "n_layer says 1,000,000,000 layers")
def config_with_more_layers_than_weights(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", n_layer=10**9)
    return w.train({"model.name_or_path": "model"})


@case("taken", "a file, not a model folder")
def model_that_is_a_file(w: World) -> Arguments:
    return w.train({"model.name_or_path": w.file("taken", "x")})


@case("no such model folder")
def model_that_is_a_link_to_itself(w: World) -> Arguments:
    (w.root / "loop").symlink_to("loop")
    return w.train({"model.name_or_path": "./loop"})


@case("model/generation_config.json")
def broken_generation_config(w: World) -> Arguments:
    w.file(f"{w.model()}/generation_config.json", "{")
    return ["quantize", "model", "--out", "out"]


@case("model/tokenizer_config.json")
def broken_tokenizer_config(w: World) -> Arguments:
    w.file(f"{w.model()}/tokenizer_config.json", "[1")
    return w.train({"model.name_or_path": "model"})


@case("no end-of-text token", "eos_token")
def tokenizer_without_an_end(w: World) -> Arguments:
    w.edit_json(w.model() / "tokenizer_config.json", eos_token=...)
    return w.train({"model.name_or_path": "model"})


@case("no character offsets", "tokenizer.json")
def tokenizer_of_bytes_without_offsets(w: World) -> Arguments:
    w.edit_json(w.model() / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    return w.train({"model.name_or_path": "model"})
