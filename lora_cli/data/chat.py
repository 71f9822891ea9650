"""Rendering of a conversation through the tokenizer's own chat template, and the spans that the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from lora_cli.data.formats import Segment
from lora_cli.data.resource_limits import MAX_CPU_SECONDS, MAX_EXTRA_BYTES, resource_limits
from lora_cli.data.turns import Conversation, Message
from lora_cli.errors import UserError

PROBE = "lora-probe-7f3a"
PROBES = Conversation((Message("user", PROBE), Message("assistant", PROBE)))
TEMPLATE_DATE = "26 Jul 2024"
"""Today's date for templates that ask for it (Llama's own default), so that rows give the same tokens on any day."""
TEMPLATE_HINT = "correct the model's chat_template.jinja, or chat_template in its tokenizer_config.json"
CALLS_AS_TEXT = "write the calls into the turn's text in the model's own syntax, and remove tool_calls"
KEPT_TEXT = (
    "change the model's chat_template.jinja so that it writes the turn's text as it is, or remove what it leaves out, "
    "such as reasoning"
)
REASONING_END = "</think>"
MOST_ADDED, MOST_REPEATED = 1_000_000, 10
"""Limits of a rendering: characters that a template may add, and how often it may repeat the conversation."""
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, where: str | None, add_generation_prompt: bool = False
) -> str:
    """The conversation as text, special tokens included.

    Raises UserError when the template is broken and, with the row's place, when it refuses the row or exceeds a limit.
    """
    text = str(_apply(tokenizer, talk, where, tokenize=False, add_generation_prompt=add_generation_prompt))
    if len(text) > MOST_ADDED + MOST_REPEATED * len(str(talk)):
        raise UserError(f"the chat template makes {len(text):,} characters of one conversation", where, TEMPLATE_HINT)
    return text


def _apply(tokenizer: PreTrainedTokenizerBase, talk: Conversation, where: str | None, **options: Any) -> Any:
    """What ``apply_chat_template`` returns with these options, within the limits of ``resource_limits``. Templates that
    take a ``date_string`` get ``TEMPLATE_DATE``. Raises UserError as ``render`` does."""
    tools: Any = list(talk.tools) or None  # for an empty list some templates write a heading
    try:
        with resource_limits():
            return tokenizer.apply_chat_template(talk.messages(), tools=tools, date_string=TEMPLATE_DATE, **options)
    except TemplateSyntaxError as error:
        what = f"the tokenizer's chat template has an error in line {error.lineno}: {error.message}"
        raise UserError(what, hint=TEMPLATE_HINT) from error
    except (MemoryError, TimeoutError) as error:
        limits = f"{MAX_CPU_SECONDS:g} s or {MAX_EXTRA_BYTES >> 20} MiB"
        what = f"the chat template takes more than {limits} for one conversation"
        raise UserError(what, where, TEMPLATE_HINT) from error
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        hint = "check which roles this model's chat template accepts, and in which order"
        raise UserError(f"the chat template refuses the conversation: {error}", where, hint) from error


def text_after_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the template writes after an assistant's content ('<|im_end|>\\n', '<|eot_id|>', …).

    Raises UserError when the template leaves the content out.
    """
    text = render(tokenizer, PROBES, None)
    if PROBE not in text:
        raise UserError("the tokenizer's chat template leaves out what the assistant says", hint=TEMPLATE_HINT)
    return text[text.rindex(PROBE) + len(PROBE) :]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the template ends an assistant's turn ('<|im_end|>', '<|eot_id|>', …), or ''."""
    return text_after_content(tokenizer).strip()


def turn_endings(tokenizer: PreTrainedTokenizerBase, closing: str) -> tuple[str, ...]:
    """The possible ends of a turn when the last one ends in ``closing``: ``closing``, or ``closing`` without the EOS
    token that a template writes only after the whole conversation (Phi's '<|end|>\\n<|endoftext|>')."""
    alone = closing.removesuffix(str(tokenizer.eos_token or "")).rstrip()
    return tuple(dict.fromkeys(each for each in (closing, alone) if each))


@lru_cache(maxsize=1)  # reading them takes longer than rendering a conversation
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    """All special tokens by id, those without a role such as EOS too."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def structure_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """BOS, EOS and the special tokens that the template writes from the end of a question to the end of its answer.
    Tokens that a user may write into a turn's text, such as those of tool calls, are not among them."""
    written = render(tokenizer, PROBES, None).partition(PROBE)[2]
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    return [each for each in special_tokens(tokenizer).values() if each in written or each in ends]


def generation_prompt_extra(tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of the generation prompt that the template does not write before a given answer ('<think>…'), or ''."""
    asked, written = render(tokenizer, PROBES.before(1), None, True), render(tokenizer, PROBES, None)
    shared = next(n for n in range(len(asked), -1, -1) if written.startswith(asked[:n]))
    return asked[shared:]


def generation_marked_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The part of an answer inside the template's ``{% generation %}`` marks; None when it has no such marks. Raises
    UserError when the template exceeds a limit."""
    if not GENERATION_MARK.search(tokenizer.get_chat_template()):
        return None
    tokenizer(PROBE)  # starts the tokenizer's threads; the limit on memory may leave no room for their stacks
    found = _apply(tokenizer, PROBES, None, return_dict=True, return_assistant_tokens_mask=True)
    held = [token for token, wanted in zip(found["input_ids"], found["assistant_masks"], strict=True) if wanted]
    return str(tokenizer.decode(held))


def conversation_segments(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, closing: str, where: str
) -> tuple[Segment, ...]:
    """The rendered conversation in segments. A ``learned`` assistant's turn is supervised, including its end.

    Raises UserError, with the row's place, when the template refuses the conversation, or leaves out or changes the
    tools, a tool's turn, an assistant's turn or its reasoning.
    """
    talk, full = _accepted(tokenizer, talk, where)
    if talk.tools and full == _render_or_empty(tokenizer, replace(talk, tools=())):
        hint = "remove the column from the rows, or use a model whose chat template writes tools"
        raise UserError("the chat template leaves out the row's tools", where, hint)
    written = _Written(tokenizer, talk, full, turn_endings(tokenizer, closing))
    segments: list[Segment] = []
    at = 0
    for index, turn in enumerate(talk.turns):
        if turn.role == "tool" and not written.answers(index, at):
            what = f"the chat template leaves out turn {index} (tool), or puts it elsewhere"
            raise UserError(what, where, "use the role that this model's chat template has for tool results")
        if turn.role != "assistant":
            continue
        start = written.start(index, at)
        end = written.end(index, start)
        if end is None:
            what = f"the chat template leaves out or rewrites turn {index} (assistant)"
            raise UserError(what, where, CALLS_AS_TEXT if turn.called else KEPT_TEXT)
        if turn.has_reasoning:
            _check_reasoning(written, index, start, where)
        segments += [(full[at:start], False), (full[start:end], turn.learned)]
        at = end
    return (*segments, (full[at:], False))


def _accepted(tokenizer: PreTrainedTokenizerBase, talk: Conversation, where: str) -> tuple[Conversation, str]:
    """The conversation in the form that the template accepts, and its rendering. Some templates take the arguments of
    tool calls only as JSON text (DeepSeek's), or tools only as {type: function, function} (gpt-oss's, Gemma 4's).

    Raises UserError when the template accepts no form.
    """
    try:
        return talk, render(tokenizer, talk, where)
    except UserError:
        for form in (talk.with_text_arguments(), talk.with_typed_tools()):
            if form != talk and (full := _render_or_empty(tokenizer, form)):
                return form, full
        raise


def _check_reasoning(written: _Written, index: int, start: int, where: str) -> None:
    """Raises UserError when a turn's reasoning would not be learned: the template writes it before ``start``, or never.
    Templates may leave it out of earlier turns than the last."""
    place = written.reasoning(index)
    if 0 <= place < start:
        what = f"the chat template writes the reasoning of turn {index} before the answer that is learned"
        raise UserError(what, where, "use a chat template whose generation prompt leaves the reasoning open")
    if place < 0 and written.reasoning(index, as_last=True) < 0:
        hint = "write it into the turn's text in the model's own syntax, or remove it"
        raise UserError(f"the chat template leaves out the reasoning of turn {index}", where, hint)


def _render_or_empty(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation, add_generation_prompt: bool = False
) -> str:
    """The conversation as text, or '' when the template refuses it, as it may refuse a part of a valid one."""
    try:
        return render(tokenizer, talk, None, add_generation_prompt)
    except UserError:
        return ""


def _without_spaces(text: str) -> str:
    return "".join(text.split())


@dataclass(frozen=True)
class _Written:
    """A conversation and its rendering ``full``, for locating turns. ``closings`` are the possible ends of a turn."""

    tokenizer: PreTrainedTokenizerBase
    talk: Conversation
    full: str
    closings: tuple[str, ...]

    def answers(self, index: int, at: int) -> bool:
        """Whether the text has the tool's turn ``index``, and not before ``at``. Some templates write it into the turn
        that calls the tool."""
        around = self._around(index, replace(self.talk.turns[index], content=PROBE))
        return around is not None and len(around[0]) >= at and self.full.startswith(around[0])

    def start(self, index: int, at: int) -> int:
        """The position in the text, at or after ``at``, where an assistant's turn begins; -1 when it is not found.

        The turn begins where the preceding conversation ends, rendered with the generation prompt: exactly the model's
        input when it is to answer. If the text does not start with that rendering (a prompt may end in an empty
        reasoning block; a system message may move to a later turn), the turn begins with its content.
        """
        given = _render_or_empty(self.tokenizer, self.talk.before(index), add_generation_prompt=True)
        if given and len(given) >= at and self.full.startswith(given):
            return len(given)
        around = self._around(index)
        if around is None:
            return -1
        head, tail = around
        if len(head) >= at and self.full.startswith(head):
            return len(head)
        words, said = self.talk.turns[index].content.strip(), self.full.removesuffix(tail).rstrip()
        return len(said) - len(words) if words and self.full.endswith(tail) and said[at:].endswith(words) else -1

    def end(self, index: int, start: int) -> int | None:
        """The position after the turn that begins at ``start`` and its closing; None when its content is not there."""
        if start < 0:
            return None
        full, turn = self.full, self.talk.turns[index]
        words, said = turn.content.strip(), full[start:]
        if words and not turn.called and said.lstrip().startswith(words):
            end = start + len(said) - len(said.lstrip()) + len(words)
            if closed := self._closed(full[end:]):
                return end + closed
        # Reasoning may precede the content, or the template may close this turn differently from the last one.
        ways = (self._end_when_last, self._end_around) if turn.called else (self._end_around, self._end_when_last)
        found = next((each for way in ways if (each := way(index)) and each[0] >= start), None)
        if found is None:
            return None
        end, closed = found
        spoken = self._before_calls(index, start, end)
        if spoken is None:
            return None
        return end + closed if self._has_whole_text(index, start, spoken) else None

    def _has_whole_text(self, index: int, start: int, spoken: str) -> bool:
        """Whether ``spoken``, which is written from ``start`` on, has a turn's whole text. White space may change,
        reasoning may be added, and its beginning may be in the prompt. An earlier turn may lack reasoning that the
        template writes in the last one."""
        words = self.talk.turns[index].content.strip()
        written, meant = _without_spaces(spoken), _without_spaces(words)
        if written.endswith(meant):
            return True
        is_end = bool(written) and meant.endswith(written)
        if is_end and _without_spaces(self.full[:start] + spoken).endswith(meant):
            return True
        is_answer = bool(written) and written.endswith(_without_spaces(words.rpartition(REASONING_END)[2]))
        return (is_end or is_answer) and self._has_whole_text_when_last(index)

    def _has_whole_text_when_last(self, index: int) -> bool:
        """Whether the template writes an earlier turn's whole text, with its reasoning, when it is the last turn."""
        if index == len(self.talk.turns) - 1:
            return False
        talk = self.talk.before(index + 1)
        last = replace(self, talk=talk, full=_render_or_empty(self.tokenizer, talk))
        return last.end(index, last.start(index, 0)) is not None

    def _end_around(self, index: int) -> tuple[int, int] | None:
        """The end of a turn's text and the length of the closing behind it, found with another turn in its place; None
        when the template puts something else there."""
        around = self._around(index)
        if around is None or not self.full.endswith(around[1]):
            return None
        return len(self.full) - len(around[1]), self._closed(around[1])

    def _end_when_last(self, index: int) -> tuple[int, int] | None:
        """The end of a turn's text and the length of its closing, if the conversation up to this turn is rendered as in
        the full text; else None. A turn that calls tools may close with another special token than answers do
        (gpt-oss's '<|call|>'), and some templates accept no other turn in its place."""
        until = _render_or_empty(self.tokenizer, self.talk.before(index + 1)).rstrip()
        closings = self.closings
        if self.talk.turns[index].called:
            closings += tuple(special_tokens(self.tokenizer).values())
        closing = next((each for each in closings if until.endswith(each)), None)
        if closing is None or not self.full.startswith(until):
            return None
        return len(until) - len(closing), len(closing)

    def reasoning(self, index: int, as_last: bool = False) -> int:
        """The position of a turn's reasoning in the text (``as_last``: in that of the conversation up to this turn), or
        -1 when the template leaves it out."""
        talk = self.talk.before(index + 1) if as_last else self.talk
        probe = talk.with_turn(index, self.talk.turns[index].with_reasoning(PROBE))
        return _render_or_empty(self.tokenizer, probe).find(PROBE)

    def _around(self, index: int, probe: Message = PROBES.turns[1]) -> tuple[str, str] | None:
        """The text before and after a turn's content, with ``probe`` in its place; None when PROBE is missing."""
        head, found, tail = _render_or_empty(self.tokenizer, self.talk.with_turn(index, probe)).partition(PROBE)
        return (head, tail) if found else None

    def _before_calls(self, index: int, start: int, end: int) -> str | None:
        """A turn's text from ``start`` to its tool calls, or to ``end`` when it has none; None when the names of the
        called tools do not follow."""
        turn = self.talk.turns[index]
        if not turn.called:
            return self.full[start:end]
        begin = start
        if turn.content.strip():
            around = self._around(index, replace(turn, content=PROBE))
            if around is None or not self.full.endswith(around[1]):
                return None
            begin = len(self.full) - len(around[1])
        behind = self.full[begin:end]
        for name in turn.called:
            _, found, behind = behind.partition(name)
            if not found:
                return None
        return self.full[start:begin]

    def _closed(self, tail: str) -> int:
        """How many characters of ``tail``, which follows a turn's content, close the turn, or 0 when none do."""
        for closing in self.closings:
            before, found, _ = tail.partition(closing)
            if found and not before.strip():
                return len(before) + len(closing)
        return 0
