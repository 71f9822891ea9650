"""Which tokens are supervised with the chat templates of well-known families, rebuilt here in small with their own
tokens and oddities. Expectations are written by hand, token by token; the tokens in ⟦ ⟧ are supervised."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lora_cli.data.chat import conversation_segments, end_of_turn, render
from lora_cli.data.sources import Row
from lora_cli.data.tokenize import tokenize_rows
from lora_cli.data.turns import Conversation, Message, read_turns
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Data


@dataclass(frozen=True)
class Family:
    """A chat template and its tokenizer's special tokens. ``adds_bos``: the tokenizer puts the BOS before each text."""

    template: str
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    adds_bos: bool = False


LLAMA_3 = Family(  # the BOS is part of the first message; contents are trimmed
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
    adds_bos=True,
)
LLAMA_3_2 = Family(  # always writes a system turn, with today's date
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% set system = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages if m.role != 'system' %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    LLAMA_3.specials,
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
    adds_bos=True,
)
CHATML = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    eos="<|im_end|>",
)
QWEN_2_5 = Family(  # adds a system turn if there is none; has no BOS
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML.template,
    CHATML.specials,
    eos="<|im_end|>",
)
QWEN_3 = Family(  # keeps reasoning only in turns after the last question, which always have it, even if empty
    "{% set ns = namespace(last=-1) %}{% for m in messages if m.role == 'user' %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set said = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    (*CHATML.specials, "<think>", "</think>"),
    eos="<|im_end|>",
)
NO_THINKING = Family(  # the generation prompt contains empty reasoning, rendered answers do not
    CHATML.template + "{% if add_generation_prompt %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    QWEN_3.specials,
    eos="<|im_end|>",
)
THINKING = Family(  # the generation prompt opens the reasoning
    CHATML.template + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}",
    QWEN_3.specials,
    eos="<|im_end|>",
)
GEMMA = Family(  # roles user and model alternate, no system turn; contents are trimmed
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    eos="<eos>",
    bos="<bos>",
    adds_bos=True,
)
GEMMA_3 = Family(  # puts the system text before that of the first user turn
    "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    GEMMA.specials,
    eos="<eos>",
    bos="<bos>",
    adds_bos=True,
)
MISTRAL = Family(  # puts the system text into the last user turn; has no generation prompt
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}{% if m.role == 'user' %}"
    "{% set last = loop.index0 >= loop.length - 2 and loop.index0 % 2 == 0 %}"
    "{{ '[INST] ' + (system if last else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    eos="</s>",
    bos="<s>",
    adds_bos=True,
)
PHI_3 = Family(  # one token ends each turn, another one the conversation
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    eos="<|endoftext|>",
)
MARKED = Family(  # marks what is generated: without the turn's header, with its end
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    CHATML.specials,
    eos="<|im_end|>",
)

SYSTEM = ("system", "Say yes or no.")
ONCE = (("user", "Is it so?"), ("assistant", "yes"))
TWICE = (
    ("user", "Is the answer yes or no?"),
    ("assistant", "no"),
    ("user", "say yes"),
    ("assistant", "yes"),
)
SILENT = (("user", "Is it so?"), ("assistant", ""))
SPACED = (("user", " Is it so?\n"), ("assistant", "\n yes. \n"))
HEADERS = (("user", "a"), ("assistant", "a"), ("user", "user"), ("assistant", "assistant"))
REASONED = (
    ("user", "One?"),
    ("assistant", "<think>\nsmall\n</think>\n\nOne."),
    ("user", "Two?"),
    ("assistant", "<think>\nlarger\n</think>\n\nTwo."),
)

CASES = [
    (
        LLAMA_3,
        (SYSTEM, *TWICE),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSay yes or no.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs the answer yes or no?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦no<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nsay yes<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧",
    ),
    (
        LLAMA_3,
        SPACED,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nIs it so?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yes.<|eot_id|>⟧",
    ),
    (
        LLAMA_3,
        HEADERS,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nuser<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦assistant<|eot_id|>⟧",
    ),
    (
        LLAMA_3_2,
        ONCE,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it so?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧",
    ),
    (
        CHATML,
        (*TWICE, ("user", "Bye")),
        "<|im_start|>user\nIs the answer yes or no?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n"
        "<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n",
    ),
    (
        CHATML,
        SPACED,
        "<|im_start|>user\n Is it so?\n<|im_end|>\n<|im_start|>assistant\n⟦\n yes. \n<|im_end|>⟧\n",
    ),
    (
        CHATML,
        (("assistant", "yes"), ("user", "yes"), ("assistant", "yes")),  # before the first turn there is no prompt
        "<|im_start|>assistant\n⟦yes<|im_end|>⟧\n<|im_start|>user\nyes<|im_end|>\n"
        "<|im_start|>assistant\n⟦yes<|im_end|>⟧\n",
    ),
    (
        QWEN_2_5,
        HEADERS,
        "<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
        "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n⟦assistant<|im_end|>⟧\n",
    ),
    (
        QWEN_2_5,
        (SYSTEM, *ONCE),
        "<|im_start|>system\nSay yes or no.<|im_end|>\n<|im_start|>user\nIs it so?<|im_end|>\n"
        "<|im_start|>assistant\n⟦yes<|im_end|>⟧\n",
    ),
    (
        QWEN_3,
        TWICE,
        "<|im_start|>user\nIs the answer yes or no?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n"
        "<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nyes<|im_end|>⟧\n",
    ),
    (
        QWEN_3,
        REASONED,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦One.<|im_end|>⟧\n"
        "<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nlarger\n</think>\n\nTwo.<|im_end|>⟧\n",
    ),
    (
        QWEN_3,
        (("assistant", "<think>\nsmall\n</think>\n\nOne. "),),
        "<|im_start|>assistant\n⟦<think>\nsmall\n</think>\n\nOne. <|im_end|>⟧\n",
    ),
    (
        QWEN_3,
        REASONED[1:2],
        "<|im_start|>assistant\n⟦<think>\nsmall\n</think>\n\nOne.<|im_end|>⟧\n",
    ),
    (
        NO_THINKING,
        TWICE,
        "<|im_start|>user\nIs the answer yes or no?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n"
        "<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n",
    ),
    (
        NO_THINKING,
        HEADERS,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
        "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n⟦assistant<|im_end|>⟧\n",
    ),
    (
        NO_THINKING,
        REASONED[:2],
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nsmall\n</think>\n\nOne.<|im_end|>⟧\n",
    ),
    (
        NO_THINKING,
        (("user", "One?"), ("assistant", "")),
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n",
    ),
    (
        THINKING,
        REASONED,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦small\n</think>\n\nOne.<|im_end|>⟧\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦larger\n</think>\n\nTwo.<|im_end|>⟧\n",
    ),
    (
        THINKING,
        ONCE,
        "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n",
    ),
    (
        GEMMA,
        TWICE,
        "<bos><start_of_turn>user\nIs the answer yes or no?<end_of_turn>\n<start_of_turn>model\n⟦no<end_of_turn>⟧\n"
        "<start_of_turn>user\nsay yes<end_of_turn>\n<start_of_turn>model\n⟦yes<end_of_turn>⟧\n",
    ),
    (
        GEMMA,
        SPACED,
        "<bos><start_of_turn>user\nIs it so?<end_of_turn>\n<start_of_turn>model\n⟦yes.<end_of_turn>⟧\n",
    ),
    (
        GEMMA_3,
        (SYSTEM, *ONCE),
        "<bos><start_of_turn>user\nSay yes or no.\n\nIs it so?<end_of_turn>\n"
        "<start_of_turn>model\n⟦yes<end_of_turn>⟧\n",
    ),
    (
        MISTRAL,
        TWICE,
        "<s>[INST] Is the answer yes or no? [/INST]⟦ no</s>⟧[INST] say yes [/INST]⟦ yes</s>⟧",
    ),
    (
        MISTRAL,  # the system text moves to the last user turn, so the first answer's prompt is no prefix of the text
        (SYSTEM, *TWICE),
        "<s>[INST] Is the answer yes or no? [/INST] ⟦no</s>⟧[INST] Say yes or no.\n\nsay yes [/INST]⟦ yes</s>⟧",
    ),
    (
        PHI_3,
        TWICE,
        "<|user|>\nIs the answer yes or no?<|end|>\n<|assistant|>\n⟦no<|end|>⟧\n"
        "<|user|>\nsay yes<|end|>\n<|assistant|>\n⟦yes<|end|>\n<|endoftext|>⟧",
    ),
    (
        PHI_3,
        (*TWICE, ("user", "Bye")),
        "<|user|>\nIs the answer yes or no?<|end|>\n<|assistant|>\n⟦no<|end|>⟧\n"
        "<|user|>\nsay yes<|end|>\n<|assistant|>\n⟦yes<|end|>⟧\n<|user|>\nBye<|end|>\n<|endoftext|>",
    ),
    (
        PHI_3,
        (("user", "One?"), ("assistant", ""), *ONCE),
        "<|user|>\nOne?<|end|>\n<|assistant|>\n⟦<|end|>⟧\n"
        "<|user|>\nIs it so?<|end|>\n<|assistant|>\n⟦yes<|end|>\n<|endoftext|>⟧",
    ),
    (
        MARKED,
        (SYSTEM, *TWICE),
        "<|im_start|>system\nSay yes or no.<|im_end|>\n"
        "<|im_start|>user\nIs the answer yes or no?<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧\n"
        "<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n",
    ),
]
NAMES = {id(value): name for name, value in list(globals().items()) if isinstance(value, Family)}


def tokens_of(family: Family, expected: str) -> list[tuple[str, bool]]:
    """The tokens of an expectation, each with whether it is supervised."""
    pattern = "|".join([*map(re.escape, family.specials), "⟦|⟧", r"\w+", r"[^\w]"])
    tokens, learned = [], False
    for token in re.findall(pattern, expected):
        if token in "⟦⟧":
            learned = token == "⟦"
        else:
            tokens.append((token, learned))
    return tokens


def tokenizer_of(family: Family, expected: str) -> Any:
    """A tokenizer for which each word, space and punctuation mark of the expectation is one token."""
    words = sorted({token for token, _ in tokens_of(family, expected)} - set(family.specials))
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    words_alone = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_alone.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), "isolated")
    named = {"bos_token": family.bos} if family.bos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_alone,
        unk_token="<unk>",
        eos_token=family.eos,
        additional_special_tokens=list(family.specials),
        **named,
    )
    if family.adds_bos:
        bos = (family.bos, tokenizer.convert_tokens_to_ids(family.bos))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = family.template
    return tokenizer


def messages_of(turns: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("family", "turns", "expected"), CASES, ids=[f"{NAMES[id(case[0])]}-{n}" for n, case in enumerate(CASES)]
)
def test_the_assistants_words_and_their_end_are_supervised(
    family: Family, turns: tuple[tuple[str, str], ...], expected: str
) -> None:
    tokenizer = tokenizer_of(family, expected)
    rows = [Row({"messages": messages_of(turns)}, "rows.jsonl:1")]
    ids, mask = tokenize_rows(Data(train="rows.jsonl"), rows, tokenizer).examples.row(0)
    found = list(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), mask.tolist(), strict=True))
    assert found == tokens_of(family, expected)


@pytest.mark.parametrize("family", [LLAMA_3, LLAMA_3_2, CHATML, QWEN_2_5, QWEN_3, GEMMA, MISTRAL, MARKED])
def test_an_answer_is_learned_behind_what_is_given_to_the_model(family: Family) -> None:
    messages = messages_of(TWICE)
    talk = Conversation(tuple(Message(role, content) for role, content in TWICE))
    tokenizer = tokenizer_of(family, render(tokenizer_of(family, ""), talk, None))
    rows = [Row({"messages": messages}, "rows.jsonl:1")]
    ids, mask = tokenize_rows(Data(train="rows.jsonl"), rows, tokenizer).examples.row(0)
    given = tokenizer(render(tokenizer, talk.before(3), None, add_generation_prompt=True), add_special_tokens=False)[
        "input_ids"
    ]
    assert ids[: len(given)].tolist() == given
    assert mask[len(given)] and not mask[len(given) - 1]


@pytest.mark.parametrize("key", ["weight", "train", "training"])
@pytest.mark.parametrize("supervised", ["completion", "all"])
def test_a_turn_may_be_read_and_not_learned(key: str, supervised: str) -> None:
    messages = messages_of(TWICE)
    talk = Conversation(tuple(Message(*turn) for turn in TWICE))
    tokenizer = tokenizer_of(CHATML, render(tokenizer_of(CHATML, ""), talk, None))
    masks = []
    asked = messages[2] | {key: 0.5}  # which nobody learns
    for turns in (messages, [messages[0], messages[1] | {key: False}, asked, messages[3] | {key: True}]):
        data = Data(train="rows.jsonl", train_on=supervised)
        rows = [Row({"messages": turns}, "rows.jsonl:1")]
        masks.append(tokenize_rows(data, rows, tokenizer).examples.row(0)[1])
    answer = len(tokenizer(render(tokenizer, talk.before(2), None), add_special_tokens=False)["input_ids"])
    first = masks[0].copy()
    first[answer:] = False
    assert first.any()
    assert (masks[1] == (masks[0] if supervised == "all" else masks[0] & ~first)).all()


OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REASONED = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "no", "reasoning_content": "why"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "yes", "reasoning_content": "so"},
)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_reasoning_apart_is_learned_where_the_template_writes_it(key: str, opened: str) -> None:
    """This template, like Qwen3's, writes the reasoning of turns after the last question alone."""
    template = QWEN_3.template.replace("set thought = ", f"set thought = m.{key} if m.{key} is string else ")
    family = replace(QWEN_3, template=template.replace(OPENED, OPENED.replace("assistant\n", f"assistant\n{opened}")))
    rows = [{key if name == "reasoning_content" else name: value for name, value in turn.items()} for turn in REASONED]
    talk = Conversation(read_turns(rows, "rows.jsonl:1"))
    tokenizer = tokenizer_of(family, "")
    segments = conversation_segments(tokenizer, talk, end_of_turn(tokenizer), "rows.jsonl:1")
    answer = "<think>\nso\n</think>\n\nyes<|im_end|>".removeprefix(opened)
    assert [text for text, wanted in segments if wanted] == ["no<|im_end|>", answer]
    assert "".join(text for text, _ in segments) == render(tokenizer, talk, None)
    earlier = talk.with_turn(3, Message("assistant", "yes"))  # the template writes none of its reasoning
    segments = conversation_segments(tokenizer, earlier, end_of_turn(tokenizer), "rows.jsonl:1")
    assert next(text for text, wanted in segments if wanted) == "no<|im_end|>"


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (CHATML, "the chat template leaves out the reasoning of turn 1"),
        (
            replace(
                QWEN_3,
                template=QWEN_3.template.replace(
                    "set thought = ", "set thought = m.reasoning_content if m.reasoning_content is string else "
                ).replace(OPENED, OPENED.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")),
            ),
            "the chat template writes the reasoning of turn 3 before the answer that is learned",
        ),
    ],
)
def test_reasoning_that_would_not_be_learned_is_refused(family: Family, message: str) -> None:
    talk = Conversation(read_turns(list(REASONED), "rows.jsonl:1"))
    tokenizer = tokenizer_of(family, "")
    with pytest.raises(UserError, match=f"rows.jsonl:1: {message}"):
        conversation_segments(tokenizer, talk, end_of_turn(tokenizer), "rows.jsonl:1")


THOUGHT = "<think>\n\n</think>\n\n"
WRITTEN: list[tuple[Family, Callable[[str, bool], str]]] = [
    (LLAMA_3, lambda words, last: f"{words.strip()}<|eot_id|>"),
    (CHATML, lambda words, last: f"{words}<|im_end|>"),
    (QWEN_3, lambda words, last: THOUGHT * last + words.lstrip("\n") + "<|im_end|>"),
    (NO_THINKING, lambda words, last: f"{words}<|im_end|>"),
    (THINKING, lambda words, last: f"{words}<|im_end|>"),
    (GEMMA, lambda words, last: f"{words.strip()}<end_of_turn>"),
    (MISTRAL, lambda words, last: f" {words.strip()}</s>"),
    (PHI_3, lambda words, last: f"{words}<|end|>" + "\n<|endoftext|>" * last),
    (MARKED, lambda words, last: f"{words}<|im_end|>"),
]
PIECES = ["a", "no", "yes", "user", "assistant", "model", " ", "\n", "<", "|im_end|", "think", "[/INST", "</", "/s"]
WORDS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WRITTEN), st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_any_words_are_supervised_and_no_others(
    case: tuple[Family, Callable[[str, bool], str]], pairs: list[tuple[str, str]]
) -> None:
    family, written = case
    tokenizer = tokenizer_of(family, "")
    turns = [Message(role, words) for pair in pairs for role, words in zip(("user", "assistant"), pair, strict=True)]
    talk = Conversation(tuple(turns))
    segments = conversation_segments(tokenizer, talk, end_of_turn(tokenizer), "rows.jsonl:1")
    learned = [text for text, wanted in segments if wanted]
    assert "".join(text for text, _ in segments) == render(tokenizer, talk, None)
    assert learned == [written(answer, number == len(pairs)) for number, (_, answer) in enumerate(pairs, 1)]


def test_a_marked_template_agrees_with_its_marks() -> None:
    messages = messages_of((SYSTEM, *TWICE))
    tokenizer = tokenizer_of(MARKED, CASES[-1][2])
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = tokenize_rows(Data(train="x"), [Row({"messages": messages}, "x:1")], tokenizer).examples.row(0)
    assert ids.tolist() == marked["input_ids"]
    assert mask.tolist() == [bool(one) for one in marked["assistant_masks"]]


@pytest.mark.parametrize(("turns", "supervised"), [(ONCE, True), ((*ONCE, ("user", "Bye")), False), (SILENT, True)])
def test_where_a_template_ends_no_turn_the_row_is_ended(turns: tuple[tuple[str, str], ...], supervised: bool) -> None:
    family = Family("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ("</s>",), eos="</s>")
    tokenizer = tokenizer_of(family, "".join(f"{role}: {words}\n" for role, words in turns))
    row = Row({"messages": messages_of(turns)}, "rows.jsonl:1")
    ids, mask = tokenize_rows(Data(train="rows.jsonl"), [row], tokenizer).examples.row(0)
    assert tokenizer.convert_ids_to_tokens(ids.tolist())[-1] == "</s>"
    assert bool(mask[-1]) is supervised


def test_a_conversation_that_is_rendered_as_nothing_is_an_empty_row() -> None:
    tokenizer = tokenizer_of(Family("{% for m in messages %}{{ m.content }}{% endfor %}", ("</s>",), eos="</s>"), "")
    row = Row({"messages": messages_of((("user", ""), ("assistant", "")))}, "rows.jsonl:1")
    ids, mask = tokenize_rows(Data(train="rows.jsonl"), [row], tokenizer).examples.row(0)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["</s>"] and not mask.any()


GLM_4 = replace(  # writes empty reasoning in place of that of earlier turns
    QWEN_3,
    template=QWEN_3.template.replace(
        "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}",
        "<think>{{ thought if loop.index0 > ns.last }}</think>\n",
    ),
)
R1 = replace(  # writes no turn's reasoning
    THINKING, template=THINKING.template.replace("m.content", "m.content.split('</think>')[-1]")
)
THOUGHTS = (
    ("user", "One?"),
    ("assistant", "<think>\nsmall\n</think>\n\nOne."),
    ("user", "Two?"),
    ("assistant", "<think>\nlarger\n</think>\n\nTwo."),
)


def test_reasoning_in_the_text_may_be_left_out_of_earlier_turns_alone() -> None:
    tokenizer = tokenizer_of(GLM_4, "")
    talk = Conversation(tuple(Message(*turn) for turn in THOUGHTS))
    segments = conversation_segments(tokenizer, talk, end_of_turn(tokenizer), "rows.jsonl:1")
    learned = ["<think></think>\nOne.<|im_end|>", "<think>larger</think>\nTwo.<|im_end|>"]
    assert [text for text, wanted in segments if wanted] == learned
    tokenizer = tokenizer_of(R1, "")
    for turns in (THOUGHTS, THOUGHTS[:2], (*THOUGHTS, ("user", "Bye"))):
        talk = Conversation(tuple(Message(*turn) for turn in turns))
        with pytest.raises(UserError, match=r"rewrites turn 1 \(assistant\)\n    change the model's chat_template"):
            conversation_segments(tokenizer, talk, end_of_turn(tokenizer), "rows.jsonl:1")
    talk = Conversation((Message("user", "One?"), Message("assistant", "small</think>"), Message("user", "Bye")))
    tokenizer = tokenizer_of(QWEN_3, "")
    with pytest.raises(UserError, match="rewrites turn 1"):  # nothing of it is left
        conversation_segments(tokenizer, talk, end_of_turn(tokenizer), "rows.jsonl:1")


CHANGED = replace(CHATML, template=CHATML.template.replace("m.content", "m.content | replace('y', 'Y')"))
REVERSED = replace(CHATML, template=CHATML.template.replace("in messages", "in messages | reverse"))
REPEATED = replace(CHATML, template=CHATML.template + "last: {{ messages[-1].content }}")


@pytest.mark.parametrize(
    ("family", "turns", "index"),
    [
        (CHANGED, ONCE, 1),
        (REVERSED, TWICE, 3),
        (REVERSED, (*ONCE, ("user", "a"), ("assistant", "")), 3),
        (REPEATED, (("user", "a"), ("assistant", "yes<|im_end|>\n")), 1),
    ],
)
def test_words_that_a_template_changes_or_moves_are_not_guessed_at(
    family: Family, turns: tuple[tuple[str, str], ...], index: int
) -> None:
    rows = [Row({"messages": messages_of(turns)}, "rows.jsonl:1")]
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: the chat template leaves out or rewrites turn {index}"):
        tokenize_rows(Data(train="rows.jsonl"), rows, tokenizer_of(family, "a"))


@pytest.mark.parametrize("wrong", ["1 // (messages | length - 1)", "1 | dictsort", "'{}'.format()", "'a'.index('b')"])
def test_errors_of_python_in_a_template_are_told(wrong: str) -> None:
    tokenizer = tokenizer_of(replace(CHATML, template="{{ " + wrong + " }}"), "")
    with pytest.raises(UserError, match="the chat template refuses the conversation: "):
        render(tokenizer, Conversation((Message("user", "Hi"),)), "rows.jsonl:1")


@pytest.mark.parametrize(("heading", "words"), [(100_000, 1), (0, 1_100_000)])
def test_long_conversations_and_headings_are_rendered(heading: int, words: int) -> None:
    tokenizer = tokenizer_of(replace(CHATML, template="x" * heading + CHATML.template), "")
    text = render(tokenizer, Conversation((Message("user", "y" * words),)), "rows.jsonl:1")
    assert text == "x" * heading + "<|im_start|>user\n" + "y" * words + "<|im_end|>\n"
