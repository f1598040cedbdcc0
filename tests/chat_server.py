"""A chat server in a thread for the tests, with a scripted model: what it says depends on the last user message alone.

    with ChatServer() as server:
        requests.post(f"{server.url}/v1/chat/completions", json={"messages": [...]})

The script is in reply_to. The tokens of the tokenizer are bytes, so that most characters of the world take several.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.chat_api import Settings, create_app
from nanochat.engine import Completion, Request
from nanochat.serving import Pool, Worker
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from scripts.chat_web import Server, address_of, listen

STEP_SECONDS = 0.02  # of a step in which somebody's message begins with "slow"


@functools.cache
def byte_tokenizer() -> RustBPETokenizer:
    """A tokenizer whose tokens are the bytes and the special ones."""
    return RustBPETokenizer.train_from_iterator(["bytes"], 256 + len(SPECIAL_TOKENS))


def reply_to(text: str) -> str:
    """What the scripted model says; the names of special tokens in it are those tokens."""
    if "sum" in text:
        return "It is <|python_start|>12+7<|python_end|><|output_start|>19<|output_end|>19, I think."
    if "world" in text:
        return "안녕하세요 👋🏽, 세계! 🌍"
    if "forever" in text:
        return "on and on " * 500
    if "nothing" in text:
        return ""
    return f"You said: {text}"


class ScriptedBatch:
    """Stands in for a GenerationBatch. A "crash" in a message makes its fourth step fail, "crash now" its first."""

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.scripts: dict[Completion, tuple[str, list[int]]] = {}

    def __len__(self) -> int:
        return len(self.scripts)

    def add(self, requests: Sequence[Request]) -> list[Completion]:
        completions = [Completion(request) for request in requests]
        for completion in completions:
            prompt = self.tokenizer.decode(list(completion.request.tokens))
            text = prompt.split("<|user_start|>")[-1].split("<|user_end|>")[0]
            reply = reply_to(text)
            ids = self.tokenizer.encoding.encode(reply, allowed_special="all")
            self.scripts[completion] = (text, [*ids, self.tokenizer.encode_special("<|assistant_end|>")])
        return completions

    def step(self) -> list[tuple[Completion, int, int]]:
        if any(text.startswith("slow") for text, _ in self.scripts.values()):
            time.sleep(STEP_SECONDS)
        results = []
        for completion, (text, ids) in list(self.scripts.items()):
            if "crash" in text and len(completion.tokens) == (0 if "crash now" in text else 3):
                raise RuntimeError("scripted")
            completion.tokens.append(ids[len(completion.tokens)])
            if len(completion.tokens) == len(ids):
                completion.finish_reason = "stop"
            elif len(completion.tokens) == completion.request.max_tokens:
                completion.finish_reason = "length"
            results.append((completion, completion.tokens[-1], 1))
        self.remove([completion for completion in self.scripts if completion.finish_reason])
        return results

    def remove(self, completions: Sequence[Completion]) -> None:
        for completion in completions:
            self.scripts.pop(completion, None)


class ChatServer:
    """Serves on 127.0.0.1 with scripted workers, or those given; a port of 0 takes a free one."""

    def __init__(
        self,
        workers: Sequence[Worker] | None = None,
        tokenizer: Any = None,
        context_tokens: int = 2048,
        port: int = 0,
        make_batch: Callable[[], Any] = ScriptedBatch,
        max_rows: int = 16,
        **limits: Any,
    ):
        self.pool = Pool(workers or [Worker(make_batch, max_rows=max_rows)], **limits)
        self.tokenizer = tokenizer or byte_tokenizer()
        self.listener = listen("127.0.0.1", port)
        self.url = address_of(self.listener)
        self.port = self.listener.getsockname()[1]
        app = create_app(self.pool, self.tokenizer, context_tokens, "test-sft", Settings(0.8, 50, 256))
        is_ready = threading.Event()
        self.server = Server(app, is_ready.set, self.pool.stop)
        self.server.config.timeout_graceful_shutdown = 1
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        assert is_ready.wait(20)

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server as a signal does."""
        with contextlib.suppress(RuntimeError):  # it is over already
            self.server.loop.call_soon_threadsafe(self.pool.stop)
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()

    def wait_until(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 5.0) -> dict[str, Any]:
        """Wait until the pool's stats are as wanted; returns them."""
        deadline = time.monotonic() + seconds
        while not condition(stats := self.pool.stats()):
            assert time.monotonic() < deadline, stats
            time.sleep(0.005)
        return stats
