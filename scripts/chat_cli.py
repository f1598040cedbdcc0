"""Talk to the model in a terminal.

    python -m scripts.chat_cli
    python -m scripts.chat_cli -i sft -g d20 -t 0
    python -m scripts.chat_cli -p "What is the capital of Peru?"

A reply is printed as it comes, tool calls in brackets with their results: [12+7 = 19]. Ctrl-C stops it. Every line is a
message, and so it is where the messages come from a pipe; /help lists the commands. stdout has the replies and nothing
else, all that is said about them goes to stderr. What was said is not stored, and neither is the history of the lines.
"""

import contextlib
import io
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.checkpoint_manager import CHAT_SOURCES, find_chat_source, load_model
from nanochat.common import UserError, autocast, compute_init, printable, user_errors
from nanochat.configurator import opt, parse
from nanochat.conversation import ConversationError, ReplyReader, fit_conversation
from nanochat.engine import GenerationBatch, Request

HELP = """\
/clear  forget what was said and begin anew
/help   show this
/quit   leave, as /exit and Ctrl-D do
Ctrl-C stops a reply, and what came of it stays. A message that begins with a slash: put a space before it."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# (kind of the piece before, kind of the piece after) -> what is printed between them
JOINTS = {
    ("text", "python"): "[",
    ("text", "python_output"): "[",
    ("python", "python_output"): " = ",
    ("python_output", "python"): "] [",
    ("python", "text"): "]",
    ("python_output", "text"): "]",
}


@dataclass
class Config:
    source: str = opt(
        "", "rl, sft or mid; empty is the furthest stage there is", short="i", choices=("", *CHAT_SOURCES)
    )
    model_tag: str = opt("", "checkpoint folder; empty is the largest model", short="g")
    step: int = opt(-1, "checkpoint step; -1 is the last", short="s")
    prompt: str = opt("", "reply to this and end; empty is a chat", short="p")
    temperature: float = opt(0.6, "0 takes the likeliest token", short="t")
    top_k: int = opt(50, "sample among the k likeliest tokens; 0 is all", short="k")
    max_tokens: int = opt(512, "longest reply", short="m")
    seed: int = opt(-1, "equal seeds give equal replies; -1 is different each time")
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")


def check(config: Config) -> None:
    """Raise UserError for a setting out of its range."""
    for name, low in {"temperature": 0, "top_k": 0, "max_tokens": 1}.items():
        if not getattr(config, name) >= low:
            raise UserError(f"--{name}={getattr(config, name)} must be at least {low}")


def note(text: object) -> None:
    """Tell the user something that is not the model's."""
    print(f"({text})", file=sys.stderr, flush=True)


def has_color() -> bool:
    """Whether stdout is a terminal that may be sent colors (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def joint(before: str, after: str, is_dim: bool) -> str:
    """What is printed between two pieces of a reply, by their kinds, so that tool calls stand in brackets.

    joint("python", "python_output", False)  ->  " = "
    """
    text = JOINTS.get((before, after), "")
    if not is_dim or (before == "text") == (after == "text"):
        return text
    return DIM + text if before == "text" else text + PLAIN


class Writer:
    """Prints the pieces of a reply as they come."""

    def __init__(self, is_dim: bool):
        self.is_dim, self.kind = is_dim, "text"

    def write(self, kind: str, text: str) -> None:
        """Print a piece, whatever leads over to it first. The model cannot send escape sequences to the terminal."""
        print(joint(self.kind, kind, self.is_dim) + printable(text), end="", flush=True)
        self.kind = kind

    def end(self) -> None:
        """Close an open bracket and end the line."""
        self.write("text", "\n")


class Chat:
    """A conversation under way: whole exchanges, of which the oldest leave when the context is full."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, config: Config):
        self.model, self.tokenizer, self.device, self.config = model, tokenizer, device, config
        self.is_dim = has_color()
        self.messages: list[dict[str, Any]] = []
        self.num_replies = 0  # each has a seed of its own

    def reply(self, text: str) -> None:
        """Generate and print the reply to a message. Both join the conversation, though Ctrl-C cut the reply short.

        Raises ConversationError for a message that is too long for the context; the conversation is as it was.
        """
        c, user = self.config, {"role": "user", "content": text}
        conversation = {"messages": [*self.messages, user]}
        prompt = fit_conversation(self.tokenizer, conversation, self.model.config.sequence_len, c.max_tokens)
        if prompt.dropped:
            del self.messages[: prompt.dropped]
            note(f"the context is full: the {prompt.dropped} oldest messages are forgotten")
        seed = None if c.seed == -1 else f"{c.seed}/{self.num_replies}"
        self.num_replies += 1
        request = Request(prompt.tokens, prompt.max_tokens, c.temperature, c.top_k, seed)
        batch = GenerationBatch(self.model, self.tokenizer)  # a new one: Ctrl-C may have left the last one half done
        reader, writer = ReplyReader(self.tokenizer), Writer(self.is_dim)
        try:
            with autocast(self.device):
                (completion,) = batch.add([request])
                while len(batch):
                    for _, token, _ in batch.step():
                        for piece in reader.push(token):
                            writer.write(*piece)
            for piece in reader.finish():
                writer.write(*piece)
        finally:
            if reader.content:
                self.messages += [user, {"role": "assistant", "content": reader.content}]
            writer.end()
        if completion.finish_reason == "length":
            note(f"cut after {prompt.max_tokens} tokens")


def obey(chat: Chat, line: str) -> bool:
    """Do what a line of the user's wants: a command, a message, or nothing. Returns False where that is to leave."""
    text = line.strip()
    if not line.startswith("/"):
        if text:
            try:
                chat.reply(text)
            except ConversationError as error:
                note(error)
    elif text in ("/quit", "/exit"):
        return False
    elif text == "/clear":
        chat.messages.clear()
        note("a new conversation")
    elif text == "/help":
        print(HELP, file=sys.stderr, flush=True)
    else:
        note(f"there is no command {printable(text)}: /help lists them; put a space before a slash that is to be said")
    return True


def converse(chat: Chat, is_interactive: bool) -> None:
    """Do what the lines of stdin want until they end, or one of them is to leave.

    Interactive: there is a prompt, Ctrl-C stops a reply, and twice at the prompt it leaves. Otherwise Ctrl-C raises
    KeyboardInterrupt.
    """
    has_hinted = False
    while True:
        line = None
        try:
            line = input("> " if is_interactive else "")
            if not obey(chat, line):
                return
            has_hinted = False
        except EOFError:
            if is_interactive:
                print()
            return
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            if line is None:  # at the prompt
                print()
                if has_hinted:
                    return
            has_hinted = line is None
            note("Ctrl-C again or /quit leaves" if has_hinted else "stopped")


@user_errors
def main(config: Config) -> None:
    """Reply to the prompt, or to what is typed or piped in."""
    # Setup
    check(config)
    for stream in (sys.stdin, sys.stdout):  # bytes that are no text, and text that the terminal has no bytes for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    is_interactive = not config.prompt and sys.stdin.isatty() and sys.stdout.isatty()
    device = compute_init(config.device_type).device

    # Model
    with contextlib.redirect_stdout(sys.stderr):
        source = config.source or find_chat_source(config.model_tag)
        model, tokenizer, _ = load_model(source, device, "eval", config.model_tag, config.step)
    chat = Chat(model, tokenizer, device, config)

    # Chat
    if config.prompt:
        chat.reply(config.prompt)
        return
    if is_interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() editing and a history
        note("/help lists the commands, Ctrl-D leaves")
    converse(chat, is_interactive)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends this as any other program, without an error
    main(parse(Config))
