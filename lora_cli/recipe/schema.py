"""The recipe's schema: every key with its bounds and description, declared once.

``lora explain``, the JSON Schema and every message about a recipe are generated from these declarations. Names follow
PEFT's ``LoraConfig`` and Transformers' ``TrainingArguments``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Rows = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A group of keys with strict types and no unknown keys, NaN or infinity; immutable after loading.

    A validator's message begins with a dotted key and a colon. The fault is reported at that key's place.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """The base model."""

    name_or_path: Text = Field(description="Folder of a causal language model in Transformers' layout, or a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the frozen weights and of matrix products; adapters stay float32. auto: bfloat16 on a "
        "GPU, or on a CPU with bfloat16 instructions (AMX, AVX512-BF16), else float32.",
    )
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field(
        "auto",
        description="Transformers' attention implementation. auto: each packed row is computed separately, on a "
        "GPU in 16 bits by torch's FlashAttention; where that is not possible, what Transformers picks (sdpa).",
    )


class Quantization(Section):
    """Quantize the frozen base while loading it (QLoRA). Without this section the base is not quantized."""

    method: Literal["nf4", "fp4", "int8"] = Field(
        "nf4", description="nf4 and fp4 store a weight in 4 bits (QLoRA, arXiv:2305.14314), int8 in 8 (LLM.int8())."
    )
    double_quant: bool = Field(True, description="Quantize the 4-bit blocks' scales too (saves 0.4 bits per weight).")
    compute_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16",
        description="Type that 4-bit weights are dequantized to for a matrix product. Hardware without units for it, "
        "such as a T4 for bfloat16, takes model.dtype or else float32.",
    )


class Adapter(Section):
    """The adapter that is trained."""

    method: Literal["lora"] = Field("lora", description="Kind of adapter: lora (arXiv:2106.09685).")
    r: Positive = Field(16, description="Rank of the update BA.")
    lora_alpha: float = Field(32, gt=0, le=1_000_000, description="The update is scaled by lora_alpha / r.")
    lora_dropout: Fraction = Field(0.0, description="Dropout on the adapter's input while training.")
    target_modules: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        "attention",
        description="Layers to adapt: minimal (query and value projections), standard (all attention projections "
        "except the output), attention (all attention projections), all-linear (every linear layer that PEFT can "
        "adapt, except the head), a list of module names, or a regular expression that matches whole module names.",
    )
    layers_to_transform: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        None, description="Numbers of the layers to adapt, from 0, e.g. [6, 7]; null: all."
    )
    use_rslora: bool = Field(False, description="Scale the update by lora_alpha / sqrt(r) instead (arXiv:2312.03732).")
    use_dora: bool = Field(False, description="Split weights into magnitude and direction (DoRA, arXiv:2402.09353).")
    fused: bool = Field(
        True,
        description="Compute RMS norms, SiLU-gated MLPs, rotary positions and LoRA layers (without dropout and "
        "DoRA) in fused autograd functions: faster, with less memory. false: use Transformers' and PEFT's own "
        "forward passes.",
    )
    init_from: Text | None = Field(
        None,
        description="Run or adapter folder (LoRA or DoRA, of the same base) whose weights training starts from.",
    )


class Source(Section):
    """One part of a mixture."""

    path: Text = Field(description="File, folder, glob or hub id.")
    weight: float = Field(
        1.0,
        gt=0,
        le=100_000,
        description="How often an epoch takes this source: 2 takes each row twice, 0.5 half of the rows. "
        "data.validation ignores it: each row counts once.",
    )
    name: Text | None = Field(None, description="Configuration of the hub data set, e.g. main; null: its default.")
    split: Text = Field("train", description="Split of the hub data set.")
    streaming: bool = Field(
        False,
        description="Read the rows of a hub data set over the network as they are needed, and keep no copy on disk.",
    )


Sources = Annotated[tuple[Text | Source, ...], Field(min_length=1)]


class Template(Section):
    """Patterns that make a prompt and a completion from a row's columns."""

    prompt: str = Field("", description="Pattern of the prompt, e.g. 'Question: {question}\\nAnswer:'.")
    completion: Text = Field(description="Pattern of the completion, e.g. ' {answer}'.")


class Data(Section):
    """The rows to train and validate on."""

    train: Text | Sources = Field(
        description="Rows to train on: a .jsonl (.ndjson), .json, .csv, .tsv, .parquet or .txt file (one row per "
        "paragraph; blank lines separate paragraphs), a folder or glob of these, a hub id, or a list of these, "
        "each given as text or as a mapping with path, weight, name and split."
    )
    validation: Share | Text | Sources | None = Field(
        None,
        description="A share of the training rows to hold out (e.g. 0.05), drawn with training.seed, or rows given as "
        "in train; null: none.",
    )
    format: Literal["auto", "text", "prompt_completion", "alpaca", "chat", "template"] = Field(
        "auto",
        description="How a row is read. text: the column text. prompt_completion: prompt and completion, or "
        "question and answer, joined without anything between them. alpaca: instruction, input, output. chat: "
        "messages or conversations (a list or its JSON text), prompt and completion as text or lists of turns, of "
        "which only the completion's are learned, or alpaca's columns, input on the line below instruction; a turn "
        "with weight: 0 or train: 0 is not learned; an assistant's tool_calls and reasoning_content (or thinking) are "
        "read, and besides the turns the columns system (text) and tools (a list of JSON schemas or its JSON text); "
        "all is written by the tokenizer's chat template, which must support what the rows use. template: by "
        "data.template. auto: by the columns of each source's first row; if several formats fit, the one that uses "
        "most of data.columns.",
    )
    columns: dict[str, str] = Field(
        {},
        description="For each name that the format uses, the column of your rows, e.g. {prompt: question, "
        "completion: answer}.",
    )
    template: Template | None = Field(None, description="Patterns for format: template.")
    train_on: Literal["completion", "all"] = Field(
        "completion",
        description="Which tokens are supervised. completion: completions and assistant turns. all: all tokens, "
        "whatever a turn's weight.",
    )
    # Of two tokens only the first predicts, and attention to itself alone gives query and key layers no gradient.
    max_length: Annotated[int, Field(ge=3)] = Field(
        1024,
        description="Maximum tokens of a row; longer rows lose their end. Never more than the model has positions.",
    )
    min_supervised_rows: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5,
        description="The run is refused if less than this share of the training rows has a supervised token within "
        "max_length; 0: one row is enough.",
    )
    packing: bool = Field(
        True,
        description="Fill a batch with whole rows end to end, each attending only to itself, up to "
        "per_device_train_batch_size x max_length tokens. false: pad per_device_train_batch_size rows of similar "
        "length to the longest.",
    )
    shuffle: bool = Field(True, description="Draw a new order every epoch from the seed. false: keep the file's order.")

    @property
    def own_validation(self) -> str | tuple[str | Source, ...] | None:
        """``validation`` where it names separate rows; None where it is a share of the training rows or null."""
        return None if isinstance(self.validation, float) else self.validation

    @model_validator(mode="after")
    def _template_goes_with_its_format(self) -> Data:
        if self.format == "template" and self.template is None:
            raise ValueError("data.format: template needs data.template with a completion pattern")
        if self.template is not None and self.format not in ("auto", "template"):
            raise ValueError(f"data.template: needs format: template, but data.format is {self.format}")
        return self


class Training(Section):
    """Optimization, evaluation and what is kept."""

    output_dir: Text = Field(description="The run's folder; the run creates it.")
    seed: int = Field(
        42,
        ge=0,
        lt=2**32,
        description="Seed of the adapter's first weights, of the order of rows, of dropout, and of the rows that a "
        "share in data.validation holds out; to compare seeds, give validation rows of their own.",
    )
    num_train_epochs: float = Field(3.0, gt=0, le=100_000, description="Passes over the data; may be a fraction.")
    max_steps: Annotated[int, Field(ge=1, le=99_999_999)] | None = Field(  # checkpoints' names have eight digits
        None, description="Optimizer steps to take, instead of num_train_epochs."
    )
    per_device_train_batch_size: Rows | Literal["auto"] = Field(
        4,
        description="Rows per batch on each device; with packing, that many times max_length tokens. auto: as many "
        "as fit in memory, of the numbers that divide a step; gradient_accumulation_steps is then the number of "
        "rows in a step on each process. The run's recipe.yaml records the numbers found. Which rows a step takes "
        "depends on this number: to compare runs, give them the same.",
    )
    gradient_accumulation_steps: Rows = Field(
        4,
        description="Batches per optimizer step; with per_device_train_batch_size: auto, rows per step.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "polynomial", "inverse_sqrt", "constant"] = Field(
        "cosine", description="Schedule of the learning rate after the warm-up."
    )
    warmup_ratio: Fraction = Field(
        0.03, description="Share of the steps (never all) over which the learning rate rises from 0."
    )
    warmup_steps: int | None = Field(None, ge=0, description="Warm-up in steps, instead of warmup_ratio.")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw_torch_fused",
        description="Optimizer; fused is one kernel for the whole update, the 8-bit ones (bitsandbytes) keep their "
        "state in 8 bits, but that of a tensor of fewer than 4,096 numbers, as of low ranks, in 32.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the gradient to this norm; null: never.")
    logging_steps: Positive = Field(
        10,
        description="Steps between two training lines in metrics.jsonl; a line has the loss and the gradient's norm "
        "(before clipping) of its own step alone, and the tokens per second since the last line.",
    )
    eval_steps: Positive | None = Field(
        100, description="Steps between two evaluations; null: only at the start and the end."
    )
    save_steps: Positive | None = Field(100, description="Steps between two checkpoints; null: only at the end.")
    save_total_limit: Positive | None = Field(
        2, description="Number of newest checkpoints to keep; null: all. The best one, if it is kept, comes on top."
    )
    load_best_model_at_end: bool = Field(
        False,
        description="Give the adapter the weights of the evaluation with the lowest validation loss, not those of "
        "the last step. The evaluation before the first step does not count. Each new best evaluation writes a "
        "checkpoint, which is kept until a better one is complete.",
    )
    early_stopping_patience: Positive | None = Field(
        None,
        description="Stop after this many evaluations in a row without a lower validation loss. The best one's "
        "checkpoint is kept; the adapter has the last weights unless load_best_model_at_end is true.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do about a step whose loss or gradient is infinite or NaN; in any case it does not "
        "change the weights. stop: end the run. skip: skip the step, count it, and end the run after 5 in a row.",
    )
    gradient_checkpointing: bool | Literal["auto", "offload"] = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, about 20% slower. offload: also keep "
        "the layers' inputs in host memory and compute gated MLPs 16,384 tokens at a time, for the longest rows. "
        "auto: each only if the activations would not fit without it.",
    )
    stream_base: bool | Literal["auto"] = Field(
        "auto",
        description="Hold the frozen weights of one layer at a time, read from disk or host memory whenever the "
        "layer runs: far less memory, slower, with gradient checkpointing; 4-bit weights are read from the copy in "
        "the run's cache. One process only, not with DoRA or int8. auto: if the weights would not fit, unless the "
        "base is stored quantized.",
    )
    cache_frozen: bool | Literal["auto", "memory", "disk"] = Field(
        "auto",
        description="Compute the output of the layers below the lowest adapted one once per row, before the first "
        "step, and keep it in memory or on disk; not if there is dropout in those layers or weights are sharded. "
        "auto (or true): for rows that are used more than once, in at most a fifth of the free memory or half of "
        "the free disk.",
    )
    torch_compile: bool | Literal["auto"] = Field(
        "auto",
        description="On a CPU, compile RMS norms and SiLU gates with torch.compile: about 5% faster in 16 bits, "
        "after about 15 seconds of compiling. Needs a C++ compiler and adapter.fused. auto: if it saves at least "
        "40 seconds of the run.",
    )
    fsdp: bool = Field(
        False,
        description="Shard base, adapter and optimizer state over several processes (FSDP2), instead of a copy in "
        "each (DDP).",
    )
    deepspeed: Text | None = Field(
        None,
        description="DeepSpeed's configuration, a JSON file whose zero_optimization says what is sharded (ZeRO). "
        "Batch sizes, optimizer, schedule, clipping and precision are taken from the recipe; keys for anything but "
        "sharding and communication (monitors, profilers, offloading to disk, ...) are refused.",
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"], ...] = Field(
        (),
        description="Trackers that also get the metrics, through Accelerate: the run is named after its folder, in "
        "the project lora, or in that of the environment variable WANDB_PROJECT.",
    )

    @property
    def batch_size(self) -> int:
        """``per_device_train_batch_size`` as a number, once auto has been replaced by one."""
        assert self.per_device_train_batch_size != "auto"
        return self.per_device_train_batch_size

    @model_validator(mode="after")
    def _keys_agree(self) -> Training:
        # A recipe written by dump_recipe has every key, so a ratio at its default need not come from the user.
        default = type(self).model_fields["warmup_ratio"].default
        if self.warmup_steps is not None and self.warmup_ratio not in (0, default):
            raise ValueError(f"training.warmup_steps: warmup_ratio is given too ({self.warmup_ratio}); keep one")
        if self.warmup_steps and self.max_steps == 1:
            raise ValueError("training.warmup_steps: with max_steps: 1 the learning rate would be 0; set it to 0")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError("training.lr_scheduler_type: polynomial falls to 1e-7, so learning_rate must be above it")
        is_sharded = self.fsdp or self.deepspeed is not None
        if self.stream_base is True and is_sharded:
            raise ValueError("training.stream_base: works in one process only, not with fsdp or deepspeed")
        if self.stream_base is True and self.gradient_checkpointing is False:
            raise ValueError("training.stream_base: needs gradient_checkpointing, which is false; leave it at auto")
        if self.fsdp and self.deepspeed is not None:
            raise ValueError("training.deepspeed: training.fsdp is set too; keep one")
        if is_sharded and self.optim.endswith("8bit"):
            way = "fsdp" if self.fsdp else "deepspeed"
            raise ValueError(f"training.optim: {self.optim} cannot be sharded; with training.{way} use adamw_torch")
        if self.deepspeed is not None and self.on_nonfinite == "skip":
            raise ValueError("training.on_nonfinite: skip is not possible with training.deepspeed: it takes every step")
        return self


class Recipe(Section):
    """The recipe of a whole run, in sections."""

    model: Model
    quantization: Quantization | None = None
    adapter: Adapter = Adapter()
    data: Data
    training: Training

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        is_int8 = self.quantization is not None and self.quantization.method == "int8"
        if self.training.stream_base is True and self.adapter.use_dora:
            raise ValueError("training.stream_base: not possible with adapter.use_dora, which reads all weights' norms")
        if self.training.stream_base is True and is_int8:
            raise ValueError("training.stream_base: not possible with quantization.method int8, only with nf4 and fp4")
        if self.training.fsdp and is_int8:
            raise ValueError("training.fsdp: not possible with quantization.method int8, only with nf4 and fp4")
        if self.model.dtype == "float16" and self.training.deepspeed is not None:
            raise ValueError("model.dtype: float16 needs loss scaling, which training.deepspeed lacks; use bfloat16")
        if self.training.torch_compile is True and not self.adapter.fused:
            raise ValueError("training.torch_compile: needs adapter.fused, which is false")
        for key in ("early_stopping_patience", "load_best_model_at_end"):
            if getattr(self.training, key) and self.data.validation is None:
                raise ValueError(f"training.{key}: needs data.validation, which is null")
        return self
