"""What conversations become: the exact tokens, which of them are supervised, and what is refused; and the way back."""

import random
from typing import Any

import pytest

from nanochat.conversation import ConversationError, FittedPrompt, ReplyReader, fit_conversation
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


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def test_all_of_a_document_but_its_beginning_is_supervised(tokenizer: RustBPETokenizer) -> None:
    document = {"text": "What is the answer? <|assistant_end|>"}
    ids, mask = tokenizer.render_conversation(document)
    assert ids == tokenizer.encode(document["text"], prepend="<|bos|>")
    assert tokenizer.encode_special("<|assistant_end|>") not in ids
    assert mask == [0] + [1] * (len(ids) - 1)
    for max_tokens in (1, 2, len(ids) - 1, len(ids) + 1):
        assert tokenizer.render_conversation(document, max_tokens) == (ids[:max_tokens], mask[:max_tokens])


def test_an_empty_document_is_its_beginning(tokenizer: RustBPETokenizer) -> None:
    assert tokenizer.render_conversation({"text": ""}) == ([tokenizer.get_bos_token_id()], [0])


@pytest.mark.parametrize("broken", [{"text": 5}, {"text": None}, {"texts": "a"}])
def test_what_is_neither_a_document_nor_a_conversation_is_refused(tokenizer: RustBPETokenizer, broken: Any) -> None:
    with pytest.raises(ConversationError, match="messages"):
        tokenizer.render_conversation(broken)


def test_a_document_gives_nothing_to_reply_to(tokenizer: RustBPETokenizer) -> None:
    with pytest.raises(ConversationError, match="messages"):
        tokenizer.render_for_completion({"text": "What is the answer?"})


# ---------------------------------------------------------------------------------------------------------------------
# Chats that are longer than the context


def fit_by_trying(
    tokenizer: RustBPETokenizer, conversation: dict[str, Any], context_tokens: int, max_tokens: int
) -> FittedPrompt | None:
    """The same by rendering every candidate, the longest first; None where none fits."""
    messages = conversation["messages"]
    system = [m for m in messages if m["role"] == "system"]
    turns = messages[len(system) :]
    for dropped in range(0, len(turns), 2):
        tokens = tokenizer.render_for_completion({"messages": system + turns[dropped:]})
        if len(tokens) + min(max_tokens, context_tokens // 3) <= context_tokens:
            return FittedPrompt(tokens, min(max_tokens, context_tokens - len(tokens)), dropped)
    return None


def random_chat(rng: random.Random) -> dict[str, Any]:
    """One to eight exchanges and a last question, of very different lengths; now and then a tool call."""

    def text() -> str:
        return "".join(rng.choices("What is the answer?\n 5é", k=rng.choice((0, 1, 3, 8, 30))))

    contents: list[Any] = [text() for _ in range(2 * rng.randint(0, 8) + 1)]
    for i in range(1, len(contents), 2):
        if rng.random() < 0.3:
            contents[i] = [{"type": "python", "text": "2+3"}, {"type": "python_output", "text": "5"}]
    return chat(*contents, system=rng.choice((None, "", "Be brief.\n")))


def test_a_chat_is_fitted_as_by_trying_every_drop(tokenizer: RustBPETokenizer) -> None:
    rng = random.Random(0)
    seen = {"whole": 0, "dropped": 0, "refused": 0}
    for _ in range(1500):
        conversation, context_tokens, max_tokens = random_chat(rng), rng.randint(1, 160), rng.choice((1, 7, 40, 500))
        expected = fit_by_trying(tokenizer, conversation, context_tokens, max_tokens)
        if expected is None:
            seen["refused"] += 1
            with pytest.raises(ConversationError, match="too long"):
                fit_conversation(tokenizer, conversation, context_tokens, max_tokens)
            continue
        fitted = fit_conversation(tokenizer, conversation, context_tokens, max_tokens)
        assert fitted == expected
        assert len(fitted.tokens) + fitted.max_tokens <= context_tokens and fitted.max_tokens >= 1
        seen["dropped" if fitted.dropped else "whole"] += 1
    assert min(seen.values()) > 150, seen


def test_the_oldest_exchanges_go_and_the_system_message_stays(tokenizer: RustBPETokenizer) -> None:
    conversation = chat("first " * 20, "one", "second", "two", "third?", system="Be brief.")
    whole = tokenizer.render_for_completion(conversation)
    assert fit_conversation(tokenizer, conversation, len(whole) + 10, 10) == (whole, 10, 0)
    fitted = fit_conversation(tokenizer, conversation, len(whole) + 9, 10)
    assert tokenizer.decode(fitted.tokens) == (
        "<|bos|><|user_start|>Be brief.\n\nsecond<|user_end|><|assistant_start|>two<|assistant_end|>"
        "<|user_start|>third?<|user_end|><|assistant_start|>"
    )
    assert (fitted.max_tokens, fitted.dropped) == (10, 2)
    assert conversation["messages"][1]["content"] == "first " * 20  # it was not changed


def test_a_long_reply_is_wanted_from_a_third_of_the_context(tokenizer: RustBPETokenizer) -> None:
    """A reply of any length is asked for: the prompt may have the other two, and the reply gets what it leaves."""
    prompt = tokenizer.render_for_completion(chat("What is the answer?"))
    size = len(prompt)
    fitted = fit_conversation(tokenizer, chat("What is the answer?"), 2 * size, 10_000)
    assert fitted == (prompt, size, 0)
    with pytest.raises(ConversationError, match=f"{size} tokens, where {size - size // 3} of a context of"):
        fit_conversation(tokenizer, chat("What is the answer?"), size, 10_000)


def test_without_a_user_message_at_the_end_there_is_nothing_to_fit(tokenizer: RustBPETokenizer) -> None:
    with pytest.raises(ConversationError, match="nothing to reply to"):
        fit_conversation(tokenizer, chat("Hi", "Hello"), 1000, 10)
    with pytest.raises(ConversationError, match="message 1 .*'assistant' is due"):
        fit_conversation(tokenizer, {"messages": chat("a")["messages"] * 2}, 1000, 10)


# ---------------------------------------------------------------------------------------------------------------------
# The way back


def read_reply(tokenizer: RustBPETokenizer, tokens: list[int]) -> tuple[list[list[tuple[str, str]]], list[dict]]:
    """(the pieces of each push and of finish, the content in the end)."""
    reader = ReplyReader(tokenizer)
    pieces = [reader.push(token) for token in tokens]
    return [*pieces, reader.finish()], reader.content


def test_a_character_comes_whole_with_its_last_token(tokenizer: RustBPETokenizer) -> None:
    """The tokenizer knows none of these: each byte is a token of its own."""
    text = "a🎉한é\U0001f469\u200d\U0001f680b"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode("utf-8"))
    pieces, content = read_reply(tokenizer, tokens)
    expected = []
    for character in text:
        expected += [[]] * (len(character.encode("utf-8")) - 1) + [[("text", character)]]
    assert pieces == [*expected, []]
    assert content == [{"type": "text", "text": text}]


def test_a_reply_that_was_rendered_is_read_back(tokenizer: RustBPETokenizer) -> None:
    parts = [
        {"type": "text", "text": "Let me see: 한🎉 "},
        {"type": "python", "text": "'한'.count('한')"},
        {"type": "python_output", "text": "1"},
        {"type": "python", "text": "2+3"},
        {"type": "python_output", "text": "5"},
        {"type": "text", "text": "It is <|assistant_end|> 5."},
    ]
    prompt = tokenizer.render_for_completion(chat("Hi"))
    ids, _ = tokenizer.render_conversation(chat("Hi", parts))
    pieces, content = read_reply(tokenizer, ids[len(prompt) :])
    assert content == parts
    streamed = [piece for step in pieces for piece in step]
    for kind in ("text", "python", "python_output"):
        wanted = "".join(part["text"] for part in parts if part["type"] == kind)
        assert "".join(text for k, text in streamed if k == kind) == wanted
    assert len(streamed) > 20  # piece by piece, not a part at a time
    again = tokenizer.render_conversation(chat("Hi", content))[0]
    assert again == ids  # so a client may send back what it was sent


@pytest.mark.parametrize("after", ["the end", "a special token"])
def test_a_character_that_is_cut_is_shown_as_such_and_spoils_nothing(tokenizer: RustBPETokenizer, after: str) -> None:
    cut = tokenizer.encode("x🎉")[:-1]
    if after == "the end":
        pieces, content = read_reply(tokenizer, cut)
        assert pieces == [[("text", "x")], [], [], [], [("text", "\ufffd")]]
        assert content == [{"type": "text", "text": "x\ufffd"}]
    else:
        start = tokenizer.encode_special("<|python_start|>")
        pieces, content = read_reply(tokenizer, [*cut, start, *tokenizer.encode("2")])
        assert pieces == [[("text", "x")], [], [], [], [("text", "\ufffd")], [("python", "2")], []]
        assert content == [{"type": "text", "text": "x\ufffd"}, {"type": "python", "text": "2"}]


def test_two_calls_that_got_no_answer_stay_two(tokenizer: RustBPETokenizer) -> None:
    parts = [{"type": "python", "text": "2**9"}, {"type": "python", "text": "3**9"}]
    prompt = tokenizer.render_for_completion(chat("Hi"))
    ids, _ = tokenizer.render_conversation(chat("Hi", parts))
    assert read_reply(tokenizer, ids[len(prompt) :])[1] == parts


def test_special_tokens_are_no_text(tokenizer: RustBPETokenizer) -> None:
    tokens = [i for token in tokenizer.get_special_tokens() for i in (tokenizer.encode_special(token), ord("a"))]
    _, content = read_reply(tokenizer, tokens)
    assert "".join(part["text"] for part in content) == "a" * 9


def test_an_empty_reply_has_no_content(tokenizer: RustBPETokenizer) -> None:
    assert read_reply(tokenizer, [tokenizer.encode_special("<|assistant_end|>")]) == ([[], []], [])
