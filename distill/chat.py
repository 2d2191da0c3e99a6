"""From chat messages to tokens, and which of them the assistant wrote."""

import os
from typing import Any

from distill.errors import DataError

_STAND_IN = "\u2063"  # an invisible character that no message begins or ends with


def encode_chat(tokenizer: Any, messages: Any, where: str) -> tuple[list[int], list[bool]]:
    """Tokens of a chat by the tokenizer's template, and for each whether the assistant wrote it.

    A template that marks the assistant's words itself is asked. For any other, a turn's words are what changes in the
    rendered text when the turn is replaced by another, and the end-of-turn token after them. where: for the messages
    of DataError, which is raised for what is not a list of {role, content}, or what the template refuses.
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
    """Where `text` differs from `other`, as a range of characters."""
    start = len(os.path.commonprefix([text, other]))
    return start, len(text) - len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))


def _end_of_turn(tokenizer: Any, tokens: list[int], following: int) -> int:
    """The position after the special token that ends a turn whose words end before `following`.

    Blanks may stand between; without such a token, the words end the turn.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    for i in range(following, len(tokens)):
        if tokens[i] in special:
            return i + 1
        if tokenizer.decode([tokens[i]]).strip():
            break
    return following
