"""From chat messages to tokens, and which of the tokens the assistant writes.

Where a chat template marks what the assistant writes ({% generation %}), that is it. With any other, a turn begins
where the generation prompt ends that the model is given for it: the template is rendered for the messages before the
turn, with and without that prompt. The turn ends where the chat up to it ends. Some templates render the past otherwise
than the present (they leave out old thoughts, tools or dates), so the turn is looked up in the whole chat. What cannot
be found there is refused; nothing is guessed.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from distill.data.form import encoding
from distill.data.messages import Message, calls_of, variants
from distill.errors import DataError, first_line

_STAND_IN = "\u2063"  # an invisible character that no template writes
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

Render = Callable[..., str]


class ChatEncoder:
    """Chats to tokens, by a tokenizer's chat template or another one."""

    def __init__(self, tokenizer: Any, template: str | None, variables: Mapping[str, Any]) -> None:
        """template: instead of the tokenizer's own. variables: what it is given beside the messages."""
        self._tokenizer, self._template, self._variables = tokenizer, template, dict(variables)
        self._now = datetime.now()  # one moment for all chats: a date may be a part of them

    def encode(
        self,
        messages: list[Message],
        where: str,
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        first: int = 0,
    ) -> tuple[list[int], list[bool], tuple[str, ...]]:
        """The tokens of a chat; for each whether it is trained on: the assistant wrote it, in message `first` or later;
        and what a user should know about it, as in Encoded.

        messages: as from `normalize`. tools, variables: given to the template. where: names the chat in messages.
        Raises DataError where the template refuses the chat or loses words of it, and where it cannot be told which
        words are the assistant's.
        """
        render, messages, text, notes = self._begin(messages, where, tools, variables)
        if re.search(r"\{%-?\s*generation\s*-?%\}", self._template_for(tools)):
            _, ranges = render(messages, marks=True)
            ranges = ranges[0] if ranges and isinstance(ranges[0], list) else ranges
            boundary = _position(render(messages[:first]), messages[first - 1], text, 0, alone=False) if first else 0
            if boundary is None:
                raise DataError(
                    f"dataset: expected to find in the rendered chat where the completion of {where} begins"
                )
            ranges = [span for span in ranges if span[0] >= boundary]
            _check_calls(messages[first:], "".join(text[begin:end] for begin, end in ranges), where)
        else:
            ranges = _turns(render, messages, text, first, where)
        encoded = encoding(self._tokenizer, text, where, add_special_tokens=False, return_offsets_mapping=True)
        trained = [any(a < end and b > begin for begin, end in ranges) for a, b in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), trained, notes

    def prompt(
        self,
        messages: list[Message],
        where: str,
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], tuple[str, ...]]:
        """The tokens that the model is given to write the next message of a chat, and notes as in `encode`.

        Raises DataError as `encode` does, and where the template has no words before an answer.
        """
        render, messages, text, notes = self._begin(messages, where, tools, variables)
        try:
            before, opening = _before(render, messages, text)
        except Exception as error:  # whatever a template raises on purpose
            raise DataError(f"dataset: the chat template refuses {where}: {first_line(error)}") from error
        found = opening or _opening(render, messages, before)
        if found is None:
            raise DataError(f"dataset: expected a chat template with a generation prompt for {where}, found none in it")
        encoded = encoding(self._tokenizer, before + found, where, add_special_tokens=False)
        return list(encoded["input_ids"]), notes

    def _template_for(self, tools: list[Any] | None) -> str:
        return str(self._template or self._tokenizer.get_chat_template(None, tools))

    def _begin(
        self, messages: list[Message], where: str, tools: list[Any] | None, variables: Mapping[str, Any] | None
    ) -> tuple[Callable[..., Any], list[Message], str, tuple[str, ...]]:
        """How turns of a chat are rendered, the messages as the template wants them, their text, and notes."""
        template = self._template_for(tools)
        given = {**self._tokenizer.special_tokens_map, **self._variables, **(variables or {})}

        def render(turns: list[Message], prompt: bool = False, marks: bool = False) -> Any:
            return self._render(template, turns, tools, given, prompt, marks)

        given_words = json.dumps([messages, tools, list(given.values())], ensure_ascii=False, default=str) + template
        messages, text = _faithful(render, messages, given_words, where)
        lost = tools and not all(name in text for name in map(_name_of, tools))
        return render, messages, text, ("have tools, which the chat template leaves out",) if lost else ()

    def _render(
        self, template: str, turns: list[Message], tools: Any, given: dict[str, Any], prompt: bool, marks: bool
    ) -> Any:
        """The text of some turns; with `marks` also the ranges of characters that the template marks."""
        from transformers.utils import chat_template_utils

        compiled = chat_template_utils._compile_jinja_template(template)
        compiled.globals["strftime_now"] = self._now.strftime
        texts, ranges = chat_template_utils.render_jinja_template(
            [turns], tools=tools, chat_template=template, return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt, **given,
        )  # fmt: skip
        return (texts[0], ranges) if marks else texts[0]


def _faithful(render: Render, messages: list[Message], given: str, where: str) -> tuple[list[Message], str]:
    """The chat in the first of its variants whose text has all words of it, and that text.

    given: all that the text may have its words from. Python's own words for values are not among them.
    """
    complaints: dict[int, str] = {}
    said = " ".join(str(message.get("content")) for message in messages)
    arguments = [call.get("arguments") for message in messages for call in calls_of(message)]
    written = [str(found) for found in arguments if isinstance(found, dict) and found and str(found) not in said]
    reprs = [*written, *(words for words in ("None", "'type': 'text'", "'function': {") if words not in given)]
    for turns in variants(messages):
        try:
            text = render(turns)
        except Exception as error:  # jinja's own, or whatever a template raises on purpose
            complaints.setdefault(-1, f"the chat template refuses {where}: {first_line(error)}")
            continue
        at, lost = _lost(messages, text)
        if not lost and not any(words in text for words in reprs):
            return turns, text
        complaints.setdefault(at, f"the chat template leaves out {lost or 'words of a list or a mapping'} in {where}")
    worst = complaints[max(complaints)]
    raise DataError(f"dataset: {worst}; dataset.chat_template=FILE names another template")


def _lost(messages: list[Message], text: str) -> tuple[int, str]:
    """The first message of which words are not in the rendered text, and which; the last and "" if all are there.

    An answer may lose its thoughts when another one follows: many templates do that on purpose.
    """
    last = len(messages) - 1
    for i, message in enumerate(messages):
        if isinstance(words := message.get("content"), str):
            spoken = words.rpartition("</think>")[2] if message["role"] == "assistant" and i < last else words
            if (word := _missing(spoken, text)) is not None:
                return i, f"the word {word!r} of message {i}"
        thoughts = next((t for key in _THOUGHTS if isinstance(t := message.get(key), str) and t.strip()), "")
        if i == last and (word := _missing(thoughts, text)) is not None:
            return i, f"the word {word!r} of the reasoning in message {i}"
    return last, ""


def _check_calls(messages: list[Message], written: str, where: str) -> None:
    """Raise DataError where a tool call of these messages is not in what the assistant writes in them."""
    for message in messages:
        for call in calls_of(message) if message["role"] == "assistant" else ():
            if _name_of(call) not in written:
                raise DataError(f"dataset: the chat template leaves out the call of {_name_of(call)} in {where}")


def _missing(words: str, text: str) -> str | None:
    if words.strip() in text:
        return None
    return next((word for word in re.findall(r"\w+", words) if word not in text), None)


def _name_of(tool: Any) -> str:
    """The name of a tool or of a tool call; empty where it has none."""
    while isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        tool = tool["function"]
    return str(tool.get("name", "")) if isinstance(tool, dict) else ""


def _turns(render: Render, messages: list[Message], text: str, first: int, where: str) -> list[tuple[int, int]]:
    """The range of characters of `text` that the assistant writes in each of its turns from message `first` on."""
    ranges: dict[int, tuple[int, int]] = {}
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        between = [message for message in messages[max(ranges, default=-1) + 1 : i] if message["role"] != "system"]
        least = max(ranges.values())[1] if ranges else 0
        try:
            found = _turn(render, messages, i, text, least, alone=len(between) == 1)
        except Exception as error:  # whatever a template raises on purpose
            raise DataError(
                f"dataset: the chat template refuses {where} up to message {i}, so that it cannot be told what the "
                f"assistant writes: {first_line(error)}"
            ) from error
        if found is None or _missing(_words_of(messages[i]), text[slice(*found)]) is not None:
            raise DataError(
                f"dataset: expected to find in the rendered chat what the assistant writes in message {i} of {where}; "
                "the chat template renders it in another way when it is the last one"
            )
        begin, end = found
        ranges[i] = begin, begin + len(text[begin:end].rstrip())  # the model stops at the end of its turn
        _check_calls(messages[i : i + 1], text[begin:end], f"message {i} of {where}")
    return [span for i, span in ranges.items() if i >= first]


def _turn(
    render: Render, messages: list[Message], i: int, text: str, least: int, alone: bool
) -> tuple[int, int] | None:
    """The range of message i, which the assistant wrote; None where that is not clear. It begins at `least` or later.

    alone: there is one message between this and the assistant's message before
    """
    previous = messages[i - 1] if i else {}
    before, prompt = _before(render, messages[:i], text)
    at = _position(before, previous, text, least, alone)
    if at is None:
        return None
    begin = at + len(prompt)
    if not prompt or not text.startswith(prompt, at):  # then it begins where the words of any answer would
        opening = prompt or _opening(render, messages[:i], before)
        if opening is None:
            return None
        begin = at + len(_common(text[at:], opening))
    closed = render(messages[: i + 1], prompt=True).removesuffix(prompt)
    if i == len(messages) - 1:
        return begin, len(closed) if text.startswith(closed) else len(text)
    renderings = [closed, render(messages[: i + 1])]
    starts = [
        at if whole.startswith(text[:at]) else _position(before, previous, whole, 0, alone) for whole in renderings
    ]
    turns = [whole[start:] for whole, start in zip(renderings, starts, strict=True) if start is not None]
    for turn in turns:
        if text.startswith(turn, at):
            return begin, at + len(turn)
    # The past lacks something in the middle of the turn: it is the turn's beginning, and an end of it.
    middles = [at + len(os.path.commonprefix([turn, text[at : at + len(turn)]])) for turn in turns]
    ends = [middle + len(_longest_end(turn, text, middle)) for turn, middle in zip(turns, middles, strict=True)]
    end = max((end for end, middle in zip(ends, middles, strict=True) if end > middle), default=begin)
    return (begin, end) if end > begin else None


def _before(render: Render, turns: list[Message], text: str) -> tuple[str, str]:
    """What a chat is before its next turn, without what some templates write at its end; and the generation prompt."""
    try:
        plain, prompted = render(turns), render(turns, prompt=True)
        before = _common(plain, prompted)
    except Exception:  # some templates want a user's turn, and a chat may begin with the assistant's
        asked = [{"role": "user", "content": _STAND_IN}]
        if turns or (at := text.find(_before(render, asked, text)[1])) < 0:
            raise
        before, prompted = text[:at], text[:at] + _before(render, asked, text)[1]
    return before, prompted[len(before) :]


def _common(text: str, other: str) -> str:
    """What both begin with. It does not end inside a tag: <think> and <tool_call> have nothing in common."""
    common = os.path.commonprefix([text, other])
    if len(common) == min(len(text), len(other)):
        return common
    for opening, closing in ("<>", "[]"):
        tag = common.rfind(opening)
        if tag > common.rfind(closing):
            return common[:tag]
    return common


def _position(before: str, previous: Message, text: str, least: int, alone: bool) -> int | None:
    """Where the chat goes on after what is `before`, of which the message `previous` is the last; None if unclear."""
    if text.startswith(before) and len(before) >= least:
        return len(before)
    if previous.get("role") == "assistant" and least:
        return least + len(text[least:]) - len(text[least:].lstrip())
    words = _words_of(previous)
    tail = before[before.rfind(words) :] if words and words in before else ""
    found = [match.end() for match in re.finditer(re.escape(tail), text[least:])] if tail else []
    return least + found[0] if len(found) == 1 or (found and alone) else None


def _opening(render: Render, turns: list[Message], before: str) -> str | None:
    """What a template without generation prompt writes before the words of an answer; None if it writes no words."""
    for content in (_STAND_IN, [{"type": "text", "text": _STAND_IN}]):
        with contextlib.suppress(Exception):  # a template that knows only the other one
            found = render([*turns, {"role": "assistant", "content": content}])
            if found.startswith(before) and found.count(_STAND_IN) == 1:
                return str(found[len(before) : found.index(_STAND_IN)])
    return None


def _words_of(message: Message) -> str:
    """The words of a message that a template certainly shows."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""


def _longest_end(turn: str, text: str, begin: int) -> str:
    """The longest end of `turn` that `text` has at `begin`."""
    at = turn.find(text[begin : begin + 1]) if begin < len(text) else -1
    while at >= 0:
        if text.startswith(turn[at:], begin):
            return turn[at:]
        at = turn.find(text[begin], at + 1)
    return ""
