"""What is trained on in a chat, token by token, for templates with the traps of well-known models."""

import copy
import json
from typing import Any

import pytest

from distill.data.chat import ChatEncoder
from distill.data.messages import normalize
from distill.errors import DataError
from tests.data import templates
from tests.support import make_tokenizer


def says(*turns):
    """A chat: user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(turns)]


CALL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
THOUGHT = says("a?", "<think>\none\n</think>\n\nA.", "b?", "<think>\ntwo\n</think>\n\nB.")


def learned(template, messages, tools=None, variables=None, first=0, tokenizer=None):
    """The runs of text that a student of this chat learns to say, token by token."""
    tokenizer = tokenizer or make_tokenizer()
    encoder = ChatEncoder(tokenizer, template, variables or {})
    tokens, trained, _ = encoder.encode(normalize(copy.deepcopy(messages), "a chat"), "a chat", tools, None, first)
    assert len(tokens) == len(trained)
    runs: list[list[int]] = []
    before = False
    for token, is_trained in zip(tokens, trained, strict=True):
        if is_trained:
            runs = [*runs[:-1], runs[-1] + [token]] if before else [*runs, [token]]
        before = is_trained
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


WRITTEN = '{"name": "weather", "arguments": {"city": "Rome"}}'
SUNNY = "It is sunny."
TWO = says("hi yo", "yo", "yo", "hi yo")


NO_BEGINNING = "{{ '' if messages[0].role else '' }}System.\n" + templates.CHATML  # it fails without a message


@pytest.mark.parametrize(
    ("template", "chat", "more", "expected"),
    [
        (templates.CHATML, TWO, {}, ["yo<|im_end|>", "hi yo<|im_end|>"]),
        (templates.LLAMA, says("q", "  a\n", "r", "b "), {}, ["a<|eot_id|>", "b<|eot_id|>"]),
        (templates.LLAMA, TOOL_CHAT, {}, [f"{WRITTEN}<|eot_id|>", f"{SUNNY}<|eot_id|>"]),
        (templates.MISTRAL, TWO, {}, ["yo</s>", "hi yo</s>"]),
        (templates.MISTRAL, TOOL_CHAT, {"tools": TOOLS}, [f"[TOOL_CALLS] [{WRITTEN}]</s>", f"{SUNNY}</s>"]),
        (
            templates.MISTRAL,
            [*TOOL_CHAT, *TWO],
            {"tools": TOOLS},
            [f"[TOOL_CALLS] [{WRITTEN}]</s>", f"{SUNNY}</s>", "yo</s>", "hi yo</s>"],
        ),
        (templates.GEMMA, says("q", " a ", "r", "b"), {}, ["a<end_of_turn>", "b<end_of_turn>"]),
        (templates.DEEPSEEK_R1, THOUGHT, {}, ["\n\nA.</s>", "two\n</think>\n\nB.</s>"]),
        (templates.DEEPSEEK_R1, says("q", "a", "r", "b"), {}, ["a</s>", "b</s>"]),
        (templates.QWEN3, THOUGHT, {}, ["A.<|im_end|>", "<think>\ntwo\n</think>\n\nB.<|im_end|>"]),
        (templates.QWEN3, TWO, {}, ["yo<|im_end|>", "<think>\n\n</think>\n\nhi yo<|im_end|>"]),
        (templates.QWEN3, TWO, {"variables": {"enable_thinking": False}}, ["yo<|im_end|>", "hi yo<|im_end|>"]),
        (
            templates.QWEN3,
            says("a?", "<b>bold</b>", "b?", "B."),
            {"variables": {"enable_thinking": False}},
            ["<b>bold</b><|im_end|>", "B.<|im_end|>"],
        ),
        (
            templates.QWEN3,
            [TOOL_CHAT[0], {**TOOL_CHAT[1], "reasoning_content": "look"}, *TOOL_CHAT[2:], *TWO],
            {},
            [
                f"\n<tool_call>\n{WRITTEN}\n</tool_call><|im_end|>",
                "It is sunny.<|im_end|>",
                "yo<|im_end|>",
                "<think>\n\n</think>\n\nhi yo<|im_end|>",
            ],
        ),
        (
            templates.HARMONY,
            TWO,
            {},
            ["<|channel|>final<|message|>yo<|end|>", "<|channel|>final<|message|>hi yo<|return|>"],
        ),
        (
            templates.HARMONY,
            [*TOOL_CHAT[:3], {**TOOL_CHAT[3], "thinking": "so"}, *TWO[:1], {**TWO[1], "thinking": "hm"}],
            {},
            [
                ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
                "<|channel|>final<|message|>It is sunny.<|end|>",
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yo<|return|>",
            ],
        ),
        (templates.QWEN3, TWO[1:], {}, ["yo<|im_end|>", "<think>\n\n</think>\n\nhi yo<|im_end|>"]),
        (NO_BEGINNING, TWO[1:], {}, ["yo<|im_end|>", "hi yo<|im_end|>"]),
        (
            templates.QWEN3,
            [TWO[0], TWO[1], {"role": "assistant", "content": "yo"}, *TWO],
            {},
            ["yo<|im_end|>", "yo<|im_end|>", "yo<|im_end|>", "<think>\n\n</think>\n\nhi yo<|im_end|>"],
        ),
        (
            templates.QWEN3,
            [*TWO, {"role": "assistant", "content": "more"}],
            {},
            ["yo<|im_end|>", "hi yo<|im_end|>", "<think>\n\n</think>\n\nmore<|im_end|>"],
        ),
        (templates.PARTS, TWO, {}, ["yo<|im_end|>", "hi yo<|im_end|>"]),
        (templates.LOOKS_AHEAD, TWO, {}, ["yo<|im_end|>", "hi yo<|im_end|>"]),
        (templates.MARKED, says("q", "猫 and 😀", "r", "é"), {}, ["猫 and 😀", "é"]),
        (templates.PLAIN, TWO, {}, ["yo", "hi yo"]),
        (templates.PHI3, TWO, {}, ["yo<|end|>", "hi yo<|end|>"]),
        (templates.GLM, THOUGHT, {}, ["\n<think></think>\nA.", "\n<think>two</think>\nB."]),
        (
            templates.QWEN35,
            [*TOOL_CHAT, *TWO],
            {},
            [
                f"<tool_call>{WRITTEN}</tool_call><|im_end|>",
                f"{SUNNY}<|im_end|>",
                "yo<|im_end|>",
                "\n</think>\n\nhi yo<|im_end|>",
            ],
        ),
        (templates.DEEPSEEK_V3, TOOL_CHAT, {}, ['<|call|>weather {"city": "Rome"}</s>', f"{SUNNY}</s>"]),
    ],
)  # fmt: skip
def test_what_is_trained_on(template, chat, more, expected):
    assert learned(template, chat, **more) == expected


def test_a_chat_as_users_write_it():
    """Roles of other programs, parts, nulls, and arguments as JSON text are one chat."""
    chat: list[dict[str, Any]] = [
        {"from": "human", "value": "Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    assert normalize(chat, "a chat") == normalize(json.dumps(chat), "a chat") == TOOL_CHAT
    chat = copy.deepcopy(TOOL_CHAT)
    chat[0]["content"] = [{"type": "text", "text": "Ro"}, {"type": "text", "text": "me?"}]
    chat[1] |= {
        "content": None,
        "tool_calls": [{"type": "function", "function": {**CALL["function"], "arguments": '{"city": "Rome"}'}}],
    }
    chat[3] |= {"role": "Model", "tool_calls": None}
    assert normalize(chat, "a chat") == TOOL_CHAT
    returned = {**TOOL_CHAT[2], "content": [{"degrees": 30}]}  # what a tool returns may be any JSON
    assert normalize([returned], "a chat") == [{**TOOL_CHAT[2], "content": '[{"degrees": 30}]'}]


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (templates.GEMMA, [{"role": "system", "content": "s"}, *TWO], "refuses a chat: no system"),
        (templates.CHATML, [TOOL_CHAT[0], TOOL_CHAT[1], *TWO], "leaves out the call of weather in message 1 of a chat"),
        (templates.DEEPSEEK_R1.replace("m.content if loop.last else ", ""), THOUGHT, "the word 'think' of message 3"),
        (templates.CHATML, [TWO[0], {**TWO[1], "reasoning_content": "hm"}], "the word 'hm' of the reasoning"),
        (templates.CHATML, [TWO[0], {"role": "user", "content": [{"type": "image", "url": "x"}]}], "found image"),
        (templates.CHATML, [{"from": "narrator", "value": "x"}], "expected a role of .* in a chat, message 0"),
        (templates.CHATML.replace("m.content", "m.content | replace('yo', '')"), TWO, "the word 'yo' of message 0"),
        (templates.HARMONY, [TWO[0], TOOL_CHAT[2]], "a tool message needs a call before it"),
        ("weather" + templates.PHI3, TOOL_CHAT, "leaves out the call of weather in message 1 of a chat"),
        (
            templates.CHATML.replace("m.content", "m.tool_calls or m.content"),
            TOOL_CHAT,
            "leaves out words of a .* mapping",
        ),
        (templates.CHATML.replace("content }}", "content | upper }}"), TWO, "the word 'hi' of message 0 in a chat"),
    ],
)
def test_what_cannot_be_rendered_or_decided_is_refused(template, chat, message):

    with pytest.raises(DataError, match=message):
        learned(template, chat)


def test_only_the_completion_of_a_chat_is_trained_on():
    for template in (
        templates.CHATML,
        templates.MARKED.replace("{% endgeneration %}", "<|im_end|>{% endgeneration %}"),
    ):
        assert learned(template, TWO, first=3)[0].startswith("hi yo<|im_end|>")
        assert len(learned(template, TWO, first=3)) == 1


def test_a_prompt_that_is_rendered_otherwise_before_its_completion():
    """Its thought is deleted in the whole chat: the completion begins earlier than the prompt alone is long."""
    marked = templates.QWEN3.replace("{{- content }}", "{% generation %}{{- content }}")
    marked = marked.replace("{{- '<|im_end|>\\n' }}", "{{- '<|im_end|>\\n' }}{% endgeneration %}", 1)
    asked = {"reasoning_content": "a long thought " * 9, **says("", "A1")[1]}
    chat = [*says("q1"), asked, *says("q2", "A2 second", "q3", "A3")]
    for template in (templates.QWEN3, marked):
        found = learned(template, chat, first=3)
        assert [
            run.strip().endswith(end) for run, end in zip(found, ("A2 second<|im_end|>", "A3<|im_end|>"), strict=True)
        ]


def test_words_of_python_are_words_where_they_are_given():
    tools = [{"type": "function", "function": {"name": "weather", "description": "None if unknown"}}]
    template = "{{ tools | tojson }} " + templates.QWEN3
    assert learned(template, TOOL_CHAT[:1] + TOOL_CHAT[3:], tools=tools) == [
        f"<think>\n\n</think>\n\n{SUNNY}<|im_end|>"
    ]
    assert learned("None " + templates.CHATML, TWO) == ["yo<|im_end|>", "hi yo<|im_end|>"]


def test_one_moment_for_all_chats_of_a_run():
    encoder = ChatEncoder(make_tokenizer(), templates.LLAMA, {})
    assert encoder.encode(TWO, "a")[0] == encoder.encode(TWO, "b")[0]
