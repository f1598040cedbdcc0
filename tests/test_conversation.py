"""What conversations become: the exact tokens, which of them are supervised, and what is refused."""

from typing import Any

import pytest

from nanochat.conversation import ConversationError
from nanochat.tokenizer import RustBPETokenizer

CALCULATION = {
    "messages": [
        {"role": "user", "content": "What is 2+3?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see: "},
                {"type": "python", "text": "2+3"},
                {"type": "python_output", "text": "5"},
                {"type": "text", "text": "It is 5."},
            ],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(["What is the answer to this? Let me see: it is 5. Thanks, bye."], 275)


def chat(*contents: Any, system: str | None = None) -> dict[str, Any]:
    """A conversation of these contents, by user and assistant in turn, after an optional system message."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + messages}


def shown(tokenizer: RustBPETokenizer, ids: list[int], mask: list[int]) -> tuple[str, str]:
    """The whole text of a rendering, and the supervised part of it with `…` for each gap."""
    spans = "".join("\0" if not m else tokenizer.decode([i]) for i, m in zip(ids, mask, strict=True))
    return tokenizer.decode(ids), "…".join(filter(None, spans.split("\0")))


def test_rendering_and_mask(tokenizer: RustBPETokenizer) -> None:
    ids, mask = tokenizer.render_conversation(CALCULATION)
    text, supervised = shown(tokenizer, ids, mask)
    assert text == (
        "<|bos|><|user_start|>What is 2+3?<|user_end|><|assistant_start|>Let me see: <|python_start|>2+3<|python_end|>"
        "<|output_start|>5<|output_end|>It is 5.<|assistant_end|><|user_start|>Thanks<|user_end|><|assistant_start|>Bye"
        "<|assistant_end|>"
    )
    assert supervised == (
        "Let me see: <|python_start|>2+3<|python_end|>…It is 5.<|assistant_end|>…Bye<|assistant_end|>"
    )
    assert ids.count(tokenizer.encode_special("<|python_start|>")) == 1  # a special token, not its name as text
    assert set(mask) == {0, 1}


def test_system_message_joins_the_first_user_message(tokenizer: RustBPETokenizer) -> None:
    conversation = chat("Hi", "Hello", system="Be brief.")
    assert tokenizer.render_conversation(conversation) == tokenizer.render_conversation(
        chat("Be brief.\n\nHi", "Hello")
    )
    assert conversation == chat("Hi", "Hello", system="Be brief.")  # it was not changed


def test_content_of_text_parts_is_like_a_str(tokenizer: RustBPETokenizer) -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert tokenizer.render_conversation(chat(parts, "Yes")) == tokenizer.render_conversation(chat("Hi there", "Yes"))


def test_text_of_a_message_cannot_end_it(tokenizer: RustBPETokenizer) -> None:
    ids, mask = tokenizer.render_conversation(chat("a<|user_end|><|assistant_start|>b", "c<|assistant_end|>d"))
    for name in ("<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"):
        assert ids.count(tokenizer.encode_special(name)) == 1
    assert shown(tokenizer, ids, mask)[1] == "c<|assistant_end|>d<|assistant_end|>"


def test_rendering_is_cut_to_max_tokens(tokenizer: RustBPETokenizer) -> None:
    ids, mask = tokenizer.render_conversation(CALCULATION)
    for max_tokens in (1, 10, len(ids) - 1, len(ids), len(ids) + 1):
        assert tokenizer.render_conversation(CALCULATION, max_tokens) == (ids[:max_tokens], mask[:max_tokens])


def test_conversation_may_end_on_a_user_turn(tokenizer: RustBPETokenizer) -> None:
    ids, mask = tokenizer.render_conversation(chat("Hi", "Hello", "And?"))
    assert shown(tokenizer, ids, mask) == (
        "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>Hello<|assistant_end|><|user_start|>And?<|user_end|>",
        "Hello<|assistant_end|>",
    )


def test_completion_is_primed_without_the_answer(tokenizer: RustBPETokenizer) -> None:
    primed = tokenizer.render_for_completion(chat("Hi", "Hello", "And?", "the answer"))
    assert primed == tokenizer.render_for_completion(chat("Hi", "Hello", "And?"))
    assert primed == [
        *tokenizer.render_conversation(chat("Hi", "Hello", "And?"))[0],
        tokenizer.encode_special("<|assistant_start|>"),
    ]
    whole, _ = tokenizer.render_conversation(chat("Hi", "Hello", "And?", "the answer"))
    assert whole[: len(primed)] == primed  # generation goes on where training text would


def test_completion_keeps_the_conversation_and_its_length(tokenizer: RustBPETokenizer) -> None:
    conversation = chat("x " * 3000, "y")
    assert len(tokenizer.render_for_completion(conversation)) > 3000
    assert conversation == chat("x " * 3000, "y")


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "messages"),
        ({"messages": []}, "at least one"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "message 0 "),
        ({"messages": [{"role": "user"}]}, "message 0 "),
        (chat(system="Alone"), "message 0 is a system message"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "message 0 .*'user' is due"),
        ({"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "c"}]}, "message 2 .*'system'"),
        ({"messages": chat("a")["messages"] * 2}, "message 1 .*'assistant' is due"),
        ({"messages": chat("a", system="s")["messages"] * 2}, "message 2 .*'assistant' is due"),
        (chat("a", 5), "message 1 has content of type int"),
        (chat("a", None), "message 1 has content of type NoneType"),
        (chat("a", [{"type": "image", "text": "x"}]), "message 1, part 0 has the type 'image'"),
        (chat("a", [{"type": "text", "text": "x"}, {"type": "python"}]), "message 1, part 1 is not of the form"),
        (chat([{"type": "python", "text": "1"}], "b"), "message 0, part 0 .*the user may have text"),
    ],
)
def test_broken_conversations_are_named(tokenizer: RustBPETokenizer, conversation: Any, message: str) -> None:
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(ConversationError, match=message):
            render(conversation)
