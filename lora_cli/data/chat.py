"""A conversation through the tokenizer's own template, and the spans of it that the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lora_cli.data.formats import Message, Segment
from lora_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "lora-probe-7f3a"


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as text, special tokens included. Raises jinja2.TemplateError when the template refuses it."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an assistant's words ('<|im_end|>', '<|eot_id|>', …), or ''."""
    text = render(tokenizer, (Message("user", PROBE), Message("assistant", PROBE)))
    return text[text.rindex(PROBE) + len(PROBE) :].strip()


def conversation_segments(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], closing: str, where: str
) -> tuple[Segment, ...]:
    """The rendered conversation cut into segments; an assistant's words and the end of its turn are supervised.

    A turn begins where the conversation before it, rendered with the generation prompt, ends: exactly what the model is
    given when it is to answer. Templates that rewrite earlier turns once later ones follow (Qwen3 drops old reasoning)
    fail that comparison there; the turn then begins with its words.

    Raises UserError, with the row's place, when the template refuses the conversation or leaves a turn out.
    """
    try:
        full = render(tokenizer, turns)
    except TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}", where) from error
    segments: list[Segment] = []
    at = 0
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        words = turn.content.strip()
        before = render(tokenizer, turns[:index], add_generation_prompt=True) if index else ""
        prefix = bool(before) and full.startswith(before)
        found = full.find(words, max(at, len(before)) if prefix else at)
        if found < 0:
            raise UserError(f"the chat template leaves out or rewrites turn {index} (assistant)", where)
        start = len(before) if prefix and len(before) >= at else found
        end = found + len(words)
        if closing and closing in full[end:]:
            gap = full.index(closing, end)
            if not full[end:gap].strip():
                end = gap + len(closing)
        segments += [(full[at:start], False), (full[start:end], True)]
        at = end
    segments.append((full[at:], False))
    return tuple(segment for segment in segments if segment[0])
