"""The terminal chat: with a scripted model in this process, and as a program, in pipes and in a pseudo-terminal."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomized_model, tiny_config

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from scripts import chat_cli
from scripts.chat_cli import DIM, HELP, PLAIN, Chat, Config, Writer, converse, has_color, obey

CALCULATION = "It is <|python_start|>12+7<|python_end|><|output_start|>..<|output_end|>19."  # dots: not the model's
WORLD = "안녕하세요 👋🏽 🌍"
CTRL_C = "\x03"


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    """Its tokens are the bytes and the special ones, so that most characters take several."""
    return RustBPETokenizer.train_from_iterator(["bytes"], 256 + len(SPECIAL_TOKENS))


class ScriptedModel:
    """As much of a GPT as a GenerationBatch needs; says the replies one after the other, and keeps the prompts.

    The names of special tokens in a reply are those tokens. Before it says CTRL_C, somebody presses it.
    """

    def __init__(self, tokenizer: RustBPETokenizer, *replies: str, sequence_len: int = 512):
        self.tokenizer, self.replies, self.prompts = tokenizer, list(replies), []
        self.config = GPTConfig(sequence_len=sequence_len, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def hidden(self, idx: torch.Tensor, cache: Any) -> torch.Tensor:
        if cache.longest == 0:  # a prompt, but for its last token
            self.prompts.append(self.tokenizer.decode(idx[0].tolist()))
            self.script = self.tokenizer.encoding.encode(self.replies.pop(0), allowed_special="all")
            self.script.append(self.tokenizer.encode_special("<|assistant_end|>"))
        cache.insert(0, *torch.zeros(2, len(idx), 1, idx.size(1), 2))
        cache.advance(idx.size(1))
        return idx[..., None]  # (B, T) -> (B, T, 1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        token = self.script.pop(0)
        if token == ord(CTRL_C):
            raise KeyboardInterrupt
        return torch.nn.functional.one_hot(torch.tensor([token]), self.tokenizer.get_vocab_size()).float()


def make_chat(tokenizer: RustBPETokenizer, *replies: str, sequence_len: int = 512, **settings: Any) -> Chat:
    model = ScriptedModel(tokenizer, *replies, sequence_len=sequence_len)
    return Chat(model, tokenizer, torch.device("cpu"), Config(**{"temperature": 0.0, **settings}))


# ---------------------------------------------------------------------------------------------------------------------
# Replies


@pytest.mark.parametrize(
    ("pieces", "plain"),
    [
        ([("text", "a"), ("python", "1+"), ("python", "2"), ("python_output", "3"), ("text", "b")], "a[1+2 = 3]b"),
        ([("python", "1+1"), ("python_output", "2"), ("python", "2+2"), ("python_output", "4")], "[1+1 = 2] [2+2 = 4]"),
        ([("text", "a"), ("python", "1+")], "a[1+]"),  # cut, or refused by the calculator
        ([("python_output", "3"), ("text", "b")], "[3]b"),
        ([], ""),
    ],
)
def test_tool_calls_stand_in_brackets_dim_where_wanted(capsys, pieces, plain):
    for is_dim in (False, True):
        writer = Writer(is_dim)
        for piece in pieces:
            writer.write(*piece)
        writer.end()
        out = capsys.readouterr().out
        assert out.replace(DIM, "").replace(PLAIN, "") == plain + "\n"
        assert out.count(DIM) == out.count(PLAIN) == (plain.replace("] [", "").count("[") if is_dim else 0)
        assert DIM + "]" not in out and not out.endswith(DIM)


def test_color_is_for_terminals_that_may_have_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not has_color()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert has_color()
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not has_color()


def test_the_model_cannot_send_escape_sequences(tokenizer, capsys):
    make_chat(tokenizer, "a\x1b[2Jb\rc\td\ne").reply("Hi")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\rc\td\ne\n"


def test_text_comes_in_whole_characters(tokenizer, monkeypatch):
    written = []
    monkeypatch.setattr(Writer, "write", lambda self, kind, text: written.append(text))
    make_chat(tokenizer, WORLD).reply("Hi")
    assert written == [*WORLD, "\n"]


def test_the_conversation_holds_the_parts_of_replies_and_is_what_the_next_prompt_shows(tokenizer, capsys):
    chat = make_chat(tokenizer, CALCULATION, "Bye")
    chat.reply("What is 12+7?")
    chat.reply("Thanks")
    assert capsys.readouterr().out == "It is [12+7 = 19]19.\nBye\n"
    parts = [("text", "It is "), ("python", "12+7"), ("python_output", "19"), ("text", "19.")]
    assert chat.messages[1] == {"role": "assistant", "content": [{"type": kind, "text": t} for kind, t in parts]}
    assert chat.model.prompts[1] == (
        "<|bos|><|user_start|>What is 12+7?<|user_end|><|assistant_start|>It is <|python_start|>12+7<|python_end|>"
        "<|output_start|>19<|output_end|>19.<|assistant_end|><|user_start|>Thanks<|user_end|>"
    )


def test_a_long_chat_forgets_its_oldest_exchanges_and_says_so(tokenizer, capsys):
    chat = make_chat(tokenizer, *["y" * 8] * 4, sequence_len=64, max_tokens=10)
    for number in range(4):
        chat.reply(f"message {number}")
    assert len(chat.messages) == 4 and chat.messages[0]["content"] == "message 2"
    assert "message 1" not in chat.model.prompts[3] and "message 2" in chat.model.prompts[3]
    assert capsys.readouterr().err == "(the context is full: the 2 oldest messages are forgotten)\n" * 2


def test_a_message_that_does_not_fit_is_one_line_and_the_conversation_goes_on_without_it(tokenizer, capsys):
    chat = make_chat(tokenizer, "One", "Two", sequence_len=64, max_tokens=10)
    for line in ("Hi", "x" * 100, "And you?"):
        assert obey(chat, line)
    captured = capsys.readouterr()
    assert captured.out == "One\nTwo\n"
    assert captured.err.count("\n") == 1 and "too long" in captured.err
    assert [message["content"] for message in chat.messages[::2]] == ["Hi", "And you?"]


def test_a_reply_that_is_cut_is_kept_and_said_to_be_cut(tokenizer, capsys):
    chat = make_chat(tokenizer, "a안b", max_tokens=3)  # a character of three bytes
    chat.reply("Hi")
    assert capsys.readouterr() == ("a\ufffd\n", "(cut after 3 tokens)\n")
    assert chat.messages[1]["content"] == [{"type": "text", "text": "a\ufffd"}]


def test_replies_repeat_with_a_seed_and_differ_within_a_chat(tokenizer, monkeypatch):
    seeds = []

    class Batch(chat_cli.GenerationBatch):
        def add(self, requests):
            seeds.append(requests[0].seed)
            return super().add(requests)

    monkeypatch.setattr(chat_cli, "GenerationBatch", Batch)
    for seed in (7, 7, -1):
        chat = make_chat(tokenizer, "a", "b", seed=seed)
        chat.reply("Hi")
        chat.reply("Hi")
    assert seeds[0] != seeds[1] and seeds[:2] == seeds[2:4] and seeds[4:] == [None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def test_commands(tokenizer, capsys):
    chat = make_chat(tokenizer, "One", "Two")
    assert obey(chat, "Hi") and len(chat.messages) == 2
    assert obey(chat, "/clear ") and chat.messages == []
    assert obey(chat, "/help") and obey(chat, "/cler \x1b[2J")
    assert not obey(chat, "/quit") and not obey(chat, "/exit")
    assert obey(chat, "") and obey(chat, "  \t") and len(chat.model.prompts) == 1  # nobody asked the model
    captured = capsys.readouterr()
    assert captured.out == "One\n" and HELP in captured.err
    assert "there is no command /cler \\x1b[2J: /help" in captured.err
    assert obey(chat, " /is a slash") and chat.messages[0]["content"] == "/is a slash"


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let somebody type these lines at a terminal, and then Ctrl-D; CTRL_C is no line but that key."""
    typed = iter(lines)

    def next_line(prompt: str) -> str:
        print(prompt, end="")
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line == CTRL_C:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", next_line)


def test_ctrl_c_stops_a_reply_and_what_came_stays(tokenizer, monkeypatch, capsys):
    type_lines(monkeypatch, "Count", "Go on", CTRL_C)
    chat = make_chat(tokenizer, f"One, {CTRL_C}two", "three")
    converse(chat, is_interactive=True)
    captured = capsys.readouterr()
    assert captured.out == "> One, \n> three\n> \n> \n"
    assert captured.err == "(stopped)\n(Ctrl-C again or /quit leaves)\n"
    assert [message["content"] for message in chat.messages[1::2]] == [
        [{"type": "text", "text": "One, "}],
        [{"type": "text", "text": "three"}],
    ]


def test_ctrl_c_before_the_first_character_leaves_no_half_exchange(tokenizer, monkeypatch):
    type_lines(monkeypatch, "Hi")
    chat = make_chat(tokenizer, CTRL_C)
    converse(chat, is_interactive=True)
    assert chat.messages == []


def test_ctrl_c_twice_at_the_prompt_leaves_but_not_with_something_in_between(tokenizer, monkeypatch, capsys):
    type_lines(monkeypatch, CTRL_C, "Hi", CTRL_C, CTRL_C, "never read")
    chat = make_chat(tokenizer, "One", "Two")
    converse(chat, is_interactive=True)
    assert len(chat.messages) == 2 and capsys.readouterr().err.count("again") == 2


def test_in_a_pipe_every_line_is_a_message_and_ctrl_c_is_not_caught(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\n/help\nAnd you?\nBye"))
    chat = make_chat(tokenizer, "One", "Two", f"3{CTRL_C}")
    with pytest.raises(KeyboardInterrupt):
        converse(chat, is_interactive=False)
    assert capsys.readouterr().out == "One\nTwo\n3\n"


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"max_tokens": 0}]
)
def test_settings_out_of_range_are_errors_before_anything_is_loaded(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}="):
        chat_cli.main.__wrapped__(Config(**wrong))


def test_without_a_model_one_line_says_what_makes_one(capsys):
    with pytest.raises(SystemExit) as exit:
        chat_cli.main(Config(prompt="Hi", device_type="cpu"))
    captured = capsys.readouterr()
    assert exit.value.code == 1 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "scripts.mid_train" in captured.err


# ---------------------------------------------------------------------------------------------------------------------
# The program


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory) -> Path:
    """A base directory with a midtrained model that says letters, and with temperature 0 never ends."""
    folder = tmp_path_factory.mktemp("prepared")
    model = randomized_model(tiny_config(sequence_len=20_000, vocab_size=tokenizer.get_vocab_size()))
    with torch.no_grad():  # some letter is likelier than what has the logit 0
        model.lm_head.weight[: ord("a")] = 0
        model.lm_head.weight[ord("z") + 1 :] = 0
    tokenizer.save(folder / "tokenizer")
    meta = {"model_config": asdict(model.config), "tokenizer_hash": tokenizer.hash, "val_bpb": None}
    save_checkpoint(folder / "mid_checkpoints" / "d2", 5, model.state_dict(), None, meta)
    return folder


@pytest.fixture
def environ(prepared) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(prepared), "OMP_NUM_THREADS": "1"}


COMMAND = [sys.executable, "-m", "scripts.chat_cli", "--device_type=cpu", "-t", "0"]


def run(environ: dict[str, str], *args: str, stdin: bytes = b"", **settings: Any) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *args], env=environ, input=stdin, capture_output=True, timeout=120, **settings)


def test_a_prompt_gives_the_reply_alone_on_stdout(environ):
    result = run(environ, "-m", "8", "-p", b"What? \xff".decode("utf-8", "surrogateescape"))
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 9 and result.stdout[:8].isalpha() and result.stdout.endswith(b"\n")
    assert b"step 5" in result.stderr  # which model it was


def test_a_pipe_with_bytes_that_are_no_text(environ):
    """And with a locale that is not UTF-8's."""
    lines = b"Hi\n\n/what\n\xff\xfe \xed\xa0\x80 \x00\n" + b"x" * 30_000 + "\n안녕 👋🏽".encode()
    result = run({**environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, "-m", "8", stdin=lines)
    assert result.returncode == 0, result.stderr
    replies = result.stdout.splitlines()
    assert len(replies) == 3 and all(len(reply) == 8 and reply.isalpha() for reply in replies)
    assert b"no command /what" in result.stderr and b"too long" in result.stderr and b"Traceback" not in result.stderr


def test_a_reader_that_goes_away_ends_it_quietly(environ):
    process = subprocess.Popen(
        [*COMMAND, "-m", "4000", "-p", "Hi"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(1).isalpha()
    process.stdout.close()
    try:
        errors = process.stderr.read()
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.stderr.close()
    assert b"rror" not in errors and b"Broken pipe" not in errors


class Terminal:
    """A program in a pseudo-terminal: what is typed is echoed among its output, and Ctrl-C is a signal."""

    def __init__(self, command: list[str], environ: dict[str, str]):
        self.own, theirs = pty.openpty()
        self.output = ""
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=self._own_terminal,
        )
        os.close(theirs)

    @staticmethod
    def _own_terminal() -> None:
        """In the child: without a terminal of its own Ctrl-C is no signal, and a shell's background job ignores it."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def type(self, text: str) -> None:
        os.write(self.own, text.encode("utf-8"))

    def read(self, seconds: float = 60) -> bool:
        """Wait for something to come and take it; False once the program has ended."""
        assert select.select([self.own], [], [], seconds)[0], self.output
        try:
            part = os.read(self.own, 4096)
        except OSError:  # EIO: nobody has the other end open
            return False
        self.output += part.decode("utf-8", "replace")
        return bool(part)

    def wait_for(self, text: str) -> str:
        """Read until a text has come; returns all up to its end, and forgets it."""
        while text not in self.output:
            assert self.read(), self.output
        before, self.output = self.output.split(text, 1)
        return before + text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.own)


@pytest.fixture
def terminal(environ) -> Iterator[Terminal]:
    terminal = Terminal([*COMMAND, "-m", "16000"], {**environ, "TERM": "xterm"})
    yield terminal
    terminal.close()


def test_in_a_terminal_one_types_stops_a_reply_edits_and_quits(terminal):
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("Hello")
    while sum(map(str.isalpha, terminal.output)) < 20:  # the reply has begun
        assert terminal.read(), terminal.output
    terminal.type(CTRL_C)
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type("/clXX\x7f\x7fear\n")  # readline takes two characters back
    terminal.wait_for("(a new conversation)")
    terminal.wait_for("> ")
    terminal.type(CTRL_C + "\n")  # readline may sleep through a signal that comes as it begins, but not through a key
    terminal.wait_for("again or /quit leaves")
    terminal.wait_for("> ")
    terminal.type("\x1b[A\x1b[A")  # up: the history
    terminal.wait_for("Hello")
    terminal.type("\x15/quit\n")
    while terminal.read():
        pass
    assert terminal.process.wait(30) == 0 and "Traceback" not in terminal.output
