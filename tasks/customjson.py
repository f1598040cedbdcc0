r"""Conversations of one's own, from a JSONL file: one conversation a line, to train on.

A line is a list of messages, or an object that has one:

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am nanochat."}]
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am nanochat."}]}

What a conversation may look like says nanochat/conversation.py; one may end on a user turn. Empty lines are skipped.
dev/gen_identity_data.py shows how to write such a file with a program.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import ConversationError, check_conversation
from tasks.common import Conversation, Task
from tasks.hub import IDENTITY, find_file


class CustomJSON(Task):
    """The conversations of a JSONL file. A line that is none is an error which names the file and the line."""

    def __init__(self, path: str | Path, **bounds: Any):
        super().__init__(**bounds)
        self.path = Path(path).expanduser()
        self.name = self.path.name
        self.lines: list[tuple[int, Conversation]] = []  # (line number, conversation), filled by the first access

    def find(self) -> Path:
        """The path of the file."""
        return self.path

    def num_examples(self) -> int:
        if not self.lines:
            self.lines += read_conversations(self.find())  # in place: slices share the list
        return len(self.lines)

    def get_example(self, index: int) -> Conversation:
        return self.lines[index][1]

    def fingerprint(self) -> str:
        self.num_examples()  # reads the file, or says what is wrong with it
        return hashlib.sha256(repr(self.lines).encode()).hexdigest()[:16]

    def describe_example(self, index: int) -> str:
        return f"{self.name}, line {self.lines[index][0]}"


class IdentityConversations(CustomJSON):
    """What the model says about itself: identity_conversations.jsonl in the base directory, fetched if missing."""

    def __init__(self, **bounds: Any):
        super().__init__(IDENTITY.name, **bounds)

    def find(self) -> Path:
        return find_file(IDENTITY)


def read_conversations(path: Path) -> list[tuple[int, Conversation]]:
    """(line number, conversation) for every line of a JSONL file that is not empty. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): it should hold one JSON conversation a line"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if line.strip():
            found.append((number, _parse_line(path, number, line)))
    if not found:
        raise UserError(f"{path} holds no conversations: one JSON list of messages a line is wanted")
    return found


def _parse_line(path: Path, number: int, line: str) -> Conversation:
    try:
        content = json.loads(line)
        conversation = {"messages": content} if isinstance(content, list) else content
        check_conversation(conversation)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number} is no JSON ({error.msg} at column {error.colno})") from None
    except ConversationError as error:
        raise UserError(f"{path}, line {number}: {error}") from None
    return {"messages": conversation["messages"]}
