"""From chat messages to tokens, and which of the tokens the assistant wrote."""

import os
from typing import Any

from distill.errors import DataError

_STAND_IN = "\u2063"  # an invisible character that no message begins or ends with


def encode_chat(tokenizer: Any, messages: Any, where: str) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, by the tokenizer's chat template, and for each token whether the assistant wrote it.

    Some templates mark what the assistant wrote. With any other, a turn's words are what changes in the rendered text
    when the turn is replaced by another one; the end-of-turn token after them belongs to the turn.
    where: names the chat in error messages. Raises DataError for what is not a list of {role, content}, and for what
    the template refuses.
    """
    if not messages:
        return [], []
    if not (
        isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    ):
        found = f"{repr(messages)[:40]} ({type(messages).__name__})"
        raise DataError(f"dataset.messages_column: expected a list of {{role, content}} in {where}, found {found}")
    turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            marked = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
            return list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
        text = _render(tokenizer, turns)
        others = [
            _render(tokenizer, [*turns[:i], {"role": "assistant", "content": _STAND_IN}, *turns[i + 1 :]])
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
    except Exception as error:  # jinja's own, or whatever a template raises on purpose
        raise DataError(f"dataset.messages_column: the chat template refuses {where}: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    from_assistant = [False] * len(tokens)
    for start, end in (_changed(text, other) for other in others):
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > start), len(tokens))
        following = next((i for i in range(first, len(tokens)) if offsets[i][0] >= end), len(tokens))
        for i in range(first, _end_of_turn(tokenizer, tokens, following)):
            from_assistant[i] = True
    return tokens, from_assistant


def _render(tokenizer: Any, turns: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _changed(text: str, other: str) -> tuple[int, int]:
    """The range of characters in which `text` differs from `other`."""
    start = len(os.path.commonprefix([text, other]))
    return start, len(text) - len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))


def _end_of_turn(tokenizer: Any, tokens: list[int], following: int) -> int:
    """The position after the special token that ends the turn whose words end before `following`.

    White space may come before that token. Where there is none, the turn ends with its words.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    for i in range(following, len(tokens)):
        if tokens[i] in special:
            return i + 1
        if tokenizer.decode([tokens[i]]).strip():
            break
    return following
