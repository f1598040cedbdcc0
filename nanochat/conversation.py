"""Conversations become token ids and a mask that says which of them the model is to learn.

A conversation is

    {"messages": [{"role": "user", "content": "What is 2+3?"},
                  {"role": "assistant", "content": [{"type": "text", "text": "2+3="},
                                                    {"type": "python", "text": "2+3"},
                                                    {"type": "python_output", "text": "5"},
                                                    {"type": "text", "text": "5"}]}]}

Users and assistants take turns, a user first. A system message may come before them: it is joined to the first user
message with a blank line, as the model has no token for the role. A conversation may end on a user turn. The example is
rendered as follows, on one line in truth; the marked part is supervised:

    <|bos|><|user_start|>What is 2+3?<|user_end|><|assistant_start|>
    2+3=<|python_start|>2+3<|python_end|>
    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    <|output_start|>5<|output_end|>5<|assistant_end|>
                                   ^^^^^^^^^^^^^^^^^^
Tool output is not supervised: the engine writes it, not the model. Text is encoded as ordinary text, so nothing that a
message says can end it or begin another.

A training example may also be a document, {"text": "..."}: <|bos|> and its text, all of it supervised.

The way back is ReplyReader: the tokens of a reply become text and tool calls again, one by one as they come.

What it does not do: say which conversation of a data set is broken (the caller knows its index), pad, or pack.
"""

import codecs
from typing import Any, NamedTuple

from nanochat.common import UserError

# part type -> (special token before, special token after, 1 where the model is to learn it)
ASSISTANT_PARTS = {
    "text": ("", "", 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


class ConversationError(UserError):
    """A conversation that breaks the rules above; the text says which message does, and how."""


def check_conversation(conversation: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation after checking them; raise ConversationError where they break the rules.

    Messages are counted from 0, the system message included.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConversationError('a conversation is {"messages": [...]} with at least one message')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ConversationError(f'message {index} is not of the form {{"role": ..., "content": ...}}')
    num_system = int(messages[0]["role"] == "system")
    if len(messages) == num_system:
        raise ConversationError("message 0 is a system message with no user message after it")
    for index, message in enumerate(messages):
        expected = "system" if index < num_system else ("user", "assistant")[(index - num_system) % 2]
        if message["role"] != expected:
            raise ConversationError(
                f"message {index} has the role {message['role']!r} where {expected!r} is due: a system message may "
                "come first, then user and assistant take turns"
            )
        _check_content(index, message)
    return messages


def _check_content(index: int, message: dict[str, Any]) -> None:
    content, role = message["content"], message["role"]
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ConversationError(f"message {index} has content of type {type(content).__name__}: str or list is wanted")
    legal_types = tuple(ASSISTANT_PARTS) if role == "assistant" else ("text",)
    for number, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ConversationError(f'message {index}, part {number} is not of the form {{"type": ..., "text": str}}')
        if part.get("type") not in legal_types:
            raise ConversationError(
                f"message {index}, part {number} has the type {part.get('type')!r}: the {role} may have "
                f"{', '.join(legal_types)}"
            )


def render_conversation(
    tokenizer: Any, conversation: dict[str, Any], max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation, equally long and at most max_tokens; mask is 1 on what the assistant should learn.

    What does not fit is cut off at the end. A document, {"text": ...}, is accepted, too. Raises ConversationError for a
    conversation that breaks the rules.
    """
    if isinstance(conversation, dict) and isinstance(conversation.get("text"), str):
        ids = tokenizer.encode(conversation["text"], prepend=tokenizer.get_bos_token_id())[:max_tokens]
        return ids, [0] + [1] * (len(ids) - 1)
    ids, mask = _render_messages(tokenizer, check_conversation(conversation))
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Any, conversation: dict[str, Any]) -> list[int]:
    """The ids that make the model give the next reply: all up to the last user message, then <|assistant_start|>.

    An assistant message at the end (the reference answer of a training example) is left out. Nothing is cut: the caller
    knows how long the context is. Raises ConversationError for a conversation that breaks the rules.
    """
    messages = check_conversation(conversation)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = _render_messages(tokenizer, messages)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


class FittedPrompt(NamedTuple):
    """What a chat that may be longer than the context becomes."""

    tokens: list[int]  # the prompt
    max_tokens: int  # how long the reply may be
    dropped: int  # messages that were left out


def fit_conversation(
    tokenizer: Any, conversation: dict[str, Any], context_tokens: int, max_tokens: int
) -> FittedPrompt:
    """The prompt for the next reply of a chat, within a context of context_tokens, prompt and reply together.

    The oldest exchanges, a user's message and its reply, are left out until what remains leaves room for a reply of
    max_tokens, or of a third of the context where that is less; a system message stays. Raises ConversationError where
    even the last user message alone does not fit, or where there is none to reply to.
    """
    messages = list(check_conversation(conversation))
    if messages[-1]["role"] != "user":
        raise ConversationError("the last message is not the user's: there is nothing to reply to")
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    room = min(max_tokens, context_tokens // 3)
    # What each message adds, computed once: only the few candidates near the limit are rendered as a whole
    sizes = [len(_render_messages(tokenizer, [message])[0]) - 1 for message in turns]
    first = 0
    while first + 2 < len(turns) and sum(sizes[first:]) + room > context_tokens:
        first += 2
    tokens: list[int] = []
    for dropped in range(first, len(turns), 2):
        tokens = render_for_completion(tokenizer, {"messages": [*system, *turns[dropped:]]})
        if len(tokens) + room <= context_tokens:
            return FittedPrompt(tokens, min(max_tokens, context_tokens - len(tokens)), dropped)
    raise ConversationError(
        f"the message is too long: {len(tokens)} tokens, where {context_tokens - room} of a context of "
        f"{context_tokens} are left beside the reply"
    )


class ReplyReader:
    """Reads the tokens of a reply one by one: pieces of text, in whole characters, and what kind of part they are of.

        reader = ReplyReader(tokenizer)
        reader.push(token)  ->  [("text", "2+3=")] or, inside a tool call, [("python", "2+3")]
        reader.content      ->  [{"type": "text", "text": "2+3="}, {"type": "python", "text": "2+3"}, ...]

    A character whose bytes are spread over tokens comes with its last one. Special tokens are never text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.content: list[dict[str, str]] = []
        self._special = set(tokenizer.special_ids.values())
        markers = {marker: kind for kind, (marker, _, _) in ASSISTANT_PARTS.items() if marker}
        self._begins = {tokenizer.encode_special(marker): kind for marker, kind in markers.items()}
        self._kind = "text"
        self._is_new_part = True
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> list[tuple[str, str]]:
        """The pieces (kind, text) that a token completes: none, or one, or one of each part at a part's end."""
        if token not in self._special:
            return self._keep(self._decoder.decode(self.tokenizer.id_to_bytes(token)))
        pieces = self.finish()
        self._kind, self._is_new_part = self._begins.get(token, "text"), True
        return pieces

    def finish(self) -> list[tuple[str, str]]:
        """What is left when the reply is over: a character that was cut, as U+FFFD."""
        return self._keep(self._decoder.decode(b"", final=True))

    def _keep(self, text: str) -> list[tuple[str, str]]:
        if not text:
            return []
        if self._is_new_part:
            self.content.append({"type": self._kind, "text": text})
            self._is_new_part = False
        else:
            self.content[-1]["text"] += text
        return [(self._kind, text)]


def _render_messages(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """(ids, mask) of checked messages, uncut."""
    ids = [tokenizer.get_bos_token_id()]
    mask = [0]

    def add(new_ids: list[int], supervised: int) -> None:
        ids.extend(new_ids)
        mask.extend([supervised] * len(new_ids))

    def add_special(token: str, supervised: int) -> None:
        add([tokenizer.encode_special(token)], supervised)

    for message in _merge_system_message(messages):
        if message["role"] == "user":
            add_special("<|user_start|>", 0)
            add(tokenizer.encode(_plain_text(message["content"])), 0)
            add_special("<|user_end|>", 0)
            continue
        add_special("<|assistant_start|>", 0)
        for part in _as_parts(message["content"]):
            before, after, supervised = ASSISTANT_PARTS[part["type"]]
            if before:
                add_special(before, supervised)
            add(tokenizer.encode(part["text"]), supervised)
            if after:
                add_special(after, supervised)
        add_special("<|assistant_end|>", 1)
    return ids, mask


def _merge_system_message(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a leading system message joined to the first user message; the arguments are not changed."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    content = f"{_plain_text(system['content'])}\n\n{_plain_text(user['content'])}"
    return [{"role": "user", "content": content}, *rest]


def _as_parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _plain_text(content: str | list[dict[str, str]]) -> str:
    """The text of a user or system message, whose parts are all of type text."""
    return "".join(part["text"] for part in _as_parts(content))
