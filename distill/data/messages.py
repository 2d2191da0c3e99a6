"""Chat messages as users have them, in the one form that chat templates expect: a list of {role, content, ...}."""

import json
from collections.abc import Iterator
from typing import Any

from distill.errors import DataError

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_OF_SHAREGPT = {*_ROLES, "user", "assistant", "system", "developer", "tool"}


def normalize(messages: Any, where: str) -> list[Message]:
    """Messages with the roles user, assistant, system, tool or a template's own, and with text as content.

    messages: a list of {role, content} or of ShareGPT's {from, value}, or its JSON; or one message. Parts of text are
    joined, entries that are null are left out, and a tool call's arguments become a mapping if they are its JSON.
    where: names the chat in error messages. Raises DataError for everything else.
    """
    if isinstance(messages, str) and messages.lstrip()[:1] == "[":
        messages = parsed(messages, list, "dataset: messages", where)
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"dataset: expected a list of {{role, content}} in {where}, found {show(messages)}")
    return [_normal(message, f"{where}, message {i}") for i, message in enumerate(messages)]


def parsed(value: Any, kind: type, what: str, where: str) -> Any:
    """A list or a mapping, or its JSON as text; None for null or nothing. Raises DataError for everything else."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{what}: expected JSON in {where}, found {show(value)}") from error
    if not value:
        return None
    if not isinstance(value, kind):
        raise DataError(f"{what}: expected a {kind.__name__} in {where}, found {show(value)}")
    return value


def variants(messages: list[Message]) -> Iterator[list[Message]]:
    """The same messages as different templates want them, the most usual first.

    A content that is not there is left out, or null, or empty; the arguments of a call are a mapping or its JSON; a
    text is a text, or a list of one part.
    """
    for turns in (messages, _with_contents(messages, None), _with_contents(messages, "")):
        yield turns
        if (written := [_written(message) for message in turns]) != turns:
            yield written
    yield _in_parts(_with_contents(messages, ""))


def calls_of(message: Message) -> list[Any]:
    """The functions that a message calls, each {name, arguments}."""
    calls = message.get("tool_calls")
    found = [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [call for call in found if isinstance(call, dict)]


def _written(message: Message) -> Message:
    """The message with its calls' arguments as JSON."""
    if not any(isinstance(call.get("arguments"), dict) for call in calls_of(message)):
        return message
    calls = [
        {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}
        for call, function in zip(message["tool_calls"], calls_of(message), strict=True)
    ]
    return {**message, "tool_calls": calls}


def _in_parts(messages: list[Message]) -> list[Message]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _with_contents(messages: list[Message], content: str | None) -> list[Message]:
    return [{"content": content, **message} for message in messages]


def show(value: Any) -> str:
    """The beginning of a value, and its type."""
    return f"{repr(value)[:40]} ({type(value).__name__})"


def _normal(message: Message, where: str) -> Message:
    message = {key: value for key, value in message.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if "content" not in message and "value" in message:
        if str(role).lower() not in _OF_SHAREGPT:
            raise DataError(f"dataset: expected a role of {', '.join(sorted(_OF_SHAREGPT))} in {where}, found {role!r}")
        message["content"] = message.pop("value")
    if not isinstance(role, str):
        raise DataError(f"dataset: expected a list of {{role, content}}, found no role in {where}: {show(message)}")
    if role.lower() == "function_call":
        message["tool_calls"] = [{"type": "function", "function": _call(message.pop("content", None), where)}]
    if "content" in message:
        message["content"] = _text_of(message["content"], str(_ROLES.get(role.lower(), role)), where)
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_with_arguments(call) for call in calls]
    role = role.lower() if role.lower() in _OF_SHAREGPT else role  # others are a template's own
    return {"role": _ROLES.get(role, role), **message}


def _text_of(content: Any, role: str, where: str) -> str:
    """The text of a content: as it is, its parts joined, or what a tool has returned as JSON."""
    if isinstance(content, str):
        return content
    is_parts = isinstance(content, list) and all(
        isinstance(part, str) or "text" in part or "type" in part for part in content
    )
    if _ROLES.get(role.lower(), role).lower() == "tool" and not is_parts:
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, list):
        raise DataError(f"dataset: expected text or parts of text in {where}, found {show(content)}")
    return "".join(_words(part, where) for part in content)


def _words(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else show(part)
        raise DataError(f"dataset: expected parts of text only in {where}, found {kind}")
    return str(part["text"])


def _call(content: Any, where: str) -> dict[str, Any]:
    try:
        call = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        call = None
    if not isinstance(call, dict) or "name" not in call:
        raise DataError(
            f"dataset: expected a function call as JSON, {{name, arguments}}, in {where}, found {show(content)}"
        )
    return dict(_with_arguments(call))


def _with_arguments(call: Any) -> Any:
    """A tool call whose arguments are a mapping, also where they are the JSON of one: templates write the JSON."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            arguments = json.loads(call["arguments"])
        except ValueError:
            return call
        return {**call, "arguments": arguments} if isinstance(arguments, dict) else call
    return call
