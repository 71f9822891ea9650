"""A conversation through the tokenizer's own template, and the spans of it that the assistant says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from lora_cli.data.formats import Message, Segment
from lora_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "lora-probe-7f3a"
PROBES = (Message("user", PROBE), Message("assistant", PROBE))
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], where: str | None, add_generation_prompt: bool = False
) -> str:
    """The conversation as text, special tokens included.

    Raises UserError, with the row's place, when the template refuses the conversation or is broken.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateSyntaxError as error:
        what = f"the tokenizer's chat template is broken in its line {error.lineno}: {error.message}"
        raise UserError(what, hint="mend the model's chat_template.jinja, or chat_template in its JSON") from error
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        hint = "see which roles, and in which order, this model's template takes"
        raise UserError(f"the chat template refuses the conversation: {error}", where, hint) from error


def written_after_words(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an assistant's words ('<|im_end|>\\n', '<|eot_id|>', …).

    Raises UserError when the template leaves these words out.
    """
    text = render(tokenizer, PROBES, None)
    if PROBE not in text:
        raise UserError("the tokenizer's chat template leaves out what the assistant says", hint="mend it")
    return text[text.rindex(PROBE) + len(PROBE) :]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the template ends an assistant's turn ('<|im_end|>', '<|eot_id|>', …), or ''."""
    return written_after_words(tokenizer).strip()


def marked(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What of an answer the template's ``{% generation %}`` marks hold; None when it has no such marks."""
    if not GENERATION_MARK.search(tokenizer.get_chat_template()):
        return None
    messages = [{"role": turn.role, "content": turn.content} for turn in PROBES]
    found: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    held = [token for token, wanted in zip(found["input_ids"], found["assistant_masks"], strict=True) if wanted]
    return str(tokenizer.decode(held))


def conversation_segments(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], closing: str, where: str
) -> tuple[Segment, ...]:
    """The rendered conversation cut into segments; an assistant's words and the end of its turn are supervised.

    Raises UserError, with the row's place, when the template refuses the conversation or leaves a turn out.
    """
    full = render(tokenizer, turns, where)
    segments: list[Segment] = []
    at = cursor = 0
    for index, turn in enumerate(turns):
        words = turn.content.strip()
        if turn.role != "assistant":
            if turn.role != "system":  # some templates move the system's words to the last turn
                cursor = max(cursor, full.find(words, cursor) + len(words))
            continue
        start = _start(tokenizer, full, turns[:index], words, cursor)
        end = _end(full, start, words, closing)
        if end is None:
            raise UserError(f"the chat template leaves out or rewrites turn {index} (assistant)", where)
        segments += [(full[at:start], False), (full[start:end], True)]
        at = cursor = end
    segments.append((full[at:], False))
    return tuple(segment for segment in segments if segment[0])


def _start(tokenizer: PreTrainedTokenizerBase, full: str, before: Sequence[Message], words: str, cursor: int) -> int:
    """Where an assistant's turn begins in the rendered conversation.

    That is where the conversation ``before`` it ends, rendered with the generation prompt: exactly what the model is
    given when it is to answer. Templates that write earlier turns otherwise once later ones follow fail that
    comparison; the turn then begins after the next generation prompt behind ``cursor``, or with its words.
    """
    prompt = ""
    if before:
        try:
            given, without = (render(tokenizer, before, None, asked) for asked in (True, False))
        except UserError:  # a template may refuse part of a conversation that it takes as a whole
            given = without = ""
        if given and len(given) >= cursor and full.startswith(given):
            return len(given)
        prompt = given.removeprefix(without) if given.startswith(without) else ""
    found = full.find(prompt, cursor) if prompt.strip() else -1
    return found + len(prompt) if found >= 0 else full.find(words, cursor)


def _end(full: str, start: int, words: str, closing: str) -> int | None:
    """Where the turn that begins at ``start`` ends, its ``closing`` included; None when its words are not there."""
    if start < 0:
        return None
    said = full[start:]
    if words and said.lstrip().startswith(words):
        end = start + len(said) - len(said.lstrip()) + len(words)
        gap = full.find(closing, end)
        if gap >= 0 and not full[end:gap].strip():
            return gap + len(closing)
        if words or gap < 0:
            return end
    gap = full.find(closing, start) if closing else -1
    if gap < 0:
        found = full.find(words, start)
        return found + len(words) if found >= 0 else None
    # Reasoning left out, put in empty, or spaced anew: the one must still end as the other does.
    written, meant = ("".join(text.split()) for text in (full[start:gap], words))
    same = written.endswith(meant) or (bool(written) and meant.endswith(written))
    return gap + len(closing) if same else None
