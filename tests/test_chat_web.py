"""The chat server: OpenAI's client against it, its errors and limits, the batch that requests join and leave.

Most tests talk to a scripted model (see chat_server.py), whose words and failures are known; those of sampling and of
the program as it is started have a tiny random model from a checkpoint.
"""

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import openai
import pytest
import requests
from chat_server import ChatServer, ScriptedBatch, byte_tokenizer
from conftest import randomized_model, tiny_config

from nanochat.chat_api import MAX_BODY_BYTES, Settings, StopFinder, parse_request
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError, get_base_dir
from nanochat.engine import GenerationBatch, Request
from nanochat.serving import Busy, Pool, Unfinished, Worker
from scripts import chat_web


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    """A server with the scripted model."""
    with ChatServer() as server:
        yield server


@pytest.fixture(scope="module")
def real_server() -> Iterator[ChatServer]:
    """A server with a tiny random model, twice."""
    model = randomized_model(tiny_config(vocab_size=byte_tokenizer().get_vocab_size(), sequence_len=512))
    workers = [Worker(lambda: GenerationBatch(model, byte_tokenizer())) for _ in range(2)]
    with ChatServer(workers, context_tokens=512) as server:
        yield server


def client(server: ChatServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def ask(server: ChatServer, text: str, **settings: Any) -> Any:
    return client(server).chat.completions.create(model="nanochat", messages=user(text), **settings)


def post(server: ChatServer, body: Any, **options: Any) -> requests.Response:
    return requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=30, **options)


def stream_text(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def save_chat_model(source: str = "chatsft_checkpoints", tag: str = "d2") -> None:
    """A tokenizer, and a checkpoint of a tiny random model as a stage leaves it."""
    byte_tokenizer().save(get_base_dir() / "tokenizer")
    model = randomized_model(tiny_config(vocab_size=byte_tokenizer().get_vocab_size(), sequence_len=512))
    meta = {"model_config": asdict(model.config), "tokenizer_hash": byte_tokenizer().hash, "val_bpb": 1.0}
    save_checkpoint(get_base_dir() / source / tag, 3, model.state_dict(), None, meta)


# ---------------------------------------------------------------------------------------------------------------------
# As OpenAI's client sees it


def test_a_plain_reply(server):
    reply = ask(server, "hello")
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.model == "test-sft"
    assert abs(reply.created - time.time()) < 60
    (choice,) = reply.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "You said: hello")
    prompt = byte_tokenizer().render_for_completion({"messages": user("hello")})
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len("You said: hello") + 1  # with <|assistant_end|>
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_the_same(server):
    chunks = list(ask(server, "hello", stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert stream_text(chunks) == "You said: hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == ask(server, "hello").usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_is_events_that_end_with_done(server):
    text = post(server, {"messages": user("hello"), "stream": True}).text
    assert text.endswith("data: [DONE]\n\n")
    events = text.split("\n\n")[:-1]
    assert all(event.startswith("data: ") for event in events) and "usage" not in text
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_a_stream_has_whole_characters(server):
    """Each token is a byte: a character cut in the middle would be U+FFFD, or a stream that is no UTF-8."""
    expected = "안녕하세요 👋🏽, 세계! 🌍"
    assert ask(server, "world").choices[0].message.content == expected
    chunks = list(ask(server, "slow world", stream=True))
    assert stream_text(chunks) == expected and len(chunks) > 15


def test_the_first_token_comes_long_before_the_last(server):
    start = time.monotonic()
    stream = ask(server, "slow forever", max_tokens=100, stream=True)
    next(iter(stream))
    first = time.monotonic() - start
    stream_text(stream)
    assert first < (time.monotonic() - start) / 4


def test_tool_calls_are_apart_from_the_text(server):
    parts = [("text", "It is "), ("python", "12+7"), ("python_output", "19"), ("text", "19, I think.")]
    message = ask(server, "sum").choices[0].message
    assert message.content == "It is 19, I think."
    assert [(part["type"], part["text"]) for part in message.parts] == parts
    deltas = [chunk.choices[0].delta for chunk in ask(server, "slow sum", stream=True)]
    streamed: list[tuple[str, str]] = []
    for delta in deltas:
        piece = getattr(delta, "tool", None) or {"type": "text", "text": delta.content or ""}
        if streamed and streamed[-1][0] == piece["type"]:
            streamed[-1] = (piece["type"], streamed[-1][1] + piece["text"])
        elif piece["text"]:
            streamed.append((piece["type"], piece["text"]))
    assert streamed == parts
    again = [*user("sum"), {"role": "assistant", "content": message.parts}, *user("hello")]
    assert post(server, {"messages": again}).json()["choices"][0]["message"]["content"] == "You said: hello"


def test_forms_of_messages(server):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "name": "Ann"},
    ]
    reply = post(server, {"messages": messages, "frequency_penalty": 0.1, "anything": {"else": 1}}).json()
    assert reply["choices"][0]["message"]["content"] == "You said: Be brief.\n\nhello"


def test_max_tokens_and_finish_reason(server):
    reply = ask(server, "forever", max_tokens=7)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 7
    assert reply.choices[0].message.content == "on and "
    assert ask(server, "forever", max_tokens=7, max_completion_tokens=3).usage.completion_tokens == 3
    assert ask(server, "forever").usage.completion_tokens == 256  # the server's own default
    assert list(ask(server, "forever", max_tokens=7, stream=True))[-1].choices[0].finish_reason == "length"


def test_an_empty_reply(server):
    assert ask(server, "nothing").choices[0].message.content == ""
    assert stream_text(ask(server, "nothing", stream=True)) == ""


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("low", "You said: s"), (["xx", "w h"], "You said: slo"), (["hello!"], "You said: slow hello")],
)
def test_stop_texts_end_a_reply_and_are_not_in_it(server, stop, expected):
    reply = ask(server, "slow hello", stop=stop)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (expected, "stop")
    assert stream_text(ask(server, "slow hello", stop=stop, stream=True)) == expected
    server.wait_until(lambda stats: stats["in_flight"] == 0)


def test_a_stop_text_may_be_spread_over_pieces():
    finder = StopFinder(["END", "N!"])
    assert [finder.push(text) for text in ("aE", "N", "x", "EN", "D", "b")][:3] == ["a", "", "ENx"]
    finder = StopFinder(["END"])
    assert [finder.push(text) for text in ("ab", "EE", "ND", "c")][:3] == ["ab", "E", ""] and finder.is_found
    finder = StopFinder(["END"])
    assert finder.push("the E") == "the " and finder.finish() == "E"
    assert StopFinder([]).push("anything") == "anything"


def test_models(server):
    (model,) = client(server).models.list().data
    assert (model.id, model.object) == ("test-sft", "model")
    assert client(server).models.retrieve("test-sft").id == "test-sft"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client(server).models.retrieve("other")


def test_sixteen_at_once_are_one_batch(server):
    before = server.pool.stats()
    with ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(lambda i: ask(server, f"slow number {i}"), range(16)))
    assert [reply.choices[0].message.content for reply in replies] == [f"You said: slow number {i}" for i in range(16)]
    after = server.pool.stats()
    tokens, steps = after["tokens"] - before["tokens"], after["steps"] - before["steps"]
    assert tokens == sum(reply.usage.completion_tokens for reply in replies) and tokens / steps > 8


# ---------------------------------------------------------------------------------------------------------------------
# Errors and limits

BAD_BODIES = [
    ({}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": [7]}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, 400, "messages"),
    ({"messages": [*user("a"), *user("b")]}, 400, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
    ({"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, 400, "messages"),
    ({"messages": user("x" * 8001)}, 400, "messages"),
    ({"messages": [*user("x"), {"role": "assistant", "content": "x" * 7000}] * 5 + user("x")}, 400, "messages"),
    ({"messages": [*user("x"), {"role": "assistant", "content": "x"}] * 250 + user("x")}, 400, "messages"),
    ({"messages": user("x"), "model": "gpt-4o"}, 404, "model"),
    ({"messages": user("x"), "temperature": 2.1}, 400, "temperature"),
    ({"messages": user("x"), "temperature": -0.1}, 400, "temperature"),
    ({"messages": user("x"), "temperature": "hot"}, 400, "temperature"),
    ({"messages": user("x"), "temperature": True}, 400, "temperature"),
    ({"messages": user("x"), "top_k": 201}, 400, "top_k"),
    ({"messages": user("x"), "top_k": 1.5}, 400, "top_k"),
    ({"messages": user("x"), "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": user("x"), "max_tokens": 4097}, 400, "max_tokens"),
    ({"messages": user("x"), "max_completion_tokens": -1}, 400, "max_completion_tokens"),
    ({"messages": user("x"), "seed": 2**63}, 400, "seed"),
    ({"messages": user("x"), "seed": 10**400}, 400, "seed"),
    ({"messages": user("x"), "n": 2}, 400, "n"),
    ({"messages": user("x"), "stop": [""]}, 400, "stop"),
    ({"messages": user("x"), "stop": ["a"] * 5}, 400, "stop"),
    ({"messages": user("x"), "stop": 7}, 400, "stop"),
    ({"messages": user("x"), "stream": "yes"}, 400, "stream"),
    ({"messages": user("x"), "stream_options": 1}, 400, "stream_options"),
    ([1, 2], 400, None),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD_BODIES)
def test_bad_requests_have_proper_error_bodies(server, body, status, param):
    response = post(server, body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert error["type"] == "invalid_request_error" and error["message"]


def test_the_client_raises_its_own_errors(server):
    with pytest.raises(openai.BadRequestError, match="temperature must be a number, 0 to 2"):
        ask(server, "x", temperature=3)
    with pytest.raises(openai.NotFoundError):
        client(server).chat.completions.create(model="gpt-4o", messages=user("x"))
    with pytest.raises(openai.InternalServerError, match="the model failed"):
        ask(server, "crash")


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"messages": \xff}', b"[" * 100_000, b"NaN", b'{"seed": ' + b"9" * 9999 + b"}"]
)
def test_bodies_that_are_no_json(server, body):
    response = post(server, None, data=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and "not " in response.json()["error"]["message"]


def test_not_a_number_is_refused(server):
    body = b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'
    response = post(server, None, data=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "temperature"


def test_lone_surrogates_are_no_crash(server):
    body = rb'{"messages": [{"role": "user", "content": "a\ud83d"}]}'
    response = post(server, None, data=body, headers={"Content-Type": "application/json"})
    assert response.json()["choices"][0]["message"]["content"] == "You said: a\ufffd"


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 20 << 20])
def test_bodies_that_are_too_large(server, size):
    with contextlib.suppress(requests.ConnectionError):  # of the largest the rest is not waited for
        response = post(server, None, data=b" " * size, headers={"Content-Type": "application/json"})
        assert response.status_code == 413 and response.json()["error"]["type"] == "invalid_request_error"
        return
    assert size > 16 << 20


def test_a_page_of_another_origin_gets_no_leave(server):
    url = f"{server.url}/v1/chat/completions"
    origin = {"Origin": "http://example.com"}
    assert requests.post(url, data=json.dumps({"messages": user("x")}), headers=origin).status_code == 415
    preflight = requests.options(url, headers={**origin, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405
    reply = requests.post(url, json={"messages": user("x")}, headers=origin)
    assert not any(name.lower().startswith("access-control") for name in [*reply.headers, *preflight.headers])


def test_unknown_paths_and_methods(server):
    for response, status in (
        (requests.get(f"{server.url}/v1/embeddings"), 404),
        (requests.get(f"{server.url}/v1/chat/completions"), 405),
        (requests.get(f"{server.url}/docs"), 404),
        (requests.get(f"{server.url}/openapi.json"), 404),
    ):
        assert response.status_code == status and response.json()["error"]["message"]


def test_a_full_queue_is_said_and_empties():
    with ChatServer(max_rows=2, max_queue=1) as server:
        streams = [ask(server, "slow forever", stream=True) for _ in range(2)]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(ask, server, "hello")
            server.wait_until(lambda stats: stats["queued"] == 1)
            response = post(server, {"messages": user("one too many")})
            assert response.status_code == 429 and int(response.headers["Retry-After"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                ask(server, "one too many")
            streams[0].close()
            assert waiting.result().choices[0].message.content == "You said: hello"
        streams[1].close()
        stats = server.wait_until(lambda stats: stats["in_flight"] == 0)
        assert (stats["refused"], stats["cancelled"], stats["done"]) == (2, 2, 1)


def test_the_time_of_a_request_is_limited():
    with ChatServer(max_rows=1, max_seconds=0.3) as server, ThreadPoolExecutor(2) as threads:
        running = threads.submit(ask, server, "slow forever")
        server.wait_until(lambda stats: stats["in_flight"] == 1)
        reply = running.result()
        assert reply.choices[0].finish_reason == "length" and 3 < reply.usage.completion_tokens < 100
        assert server.pool.stats()["timed_out"] == 1


def test_a_request_that_waits_for_too_long_is_given_up():
    with ChatServer(max_rows=1) as server, ThreadPoolExecutor(2) as threads:
        with ask(server, "slow forever", stream=True):
            server.pool.max_seconds = 0.1
            with pytest.raises(openai.InternalServerError, match="waited for too long") as raised:
                ask(server, "hello")
            assert raised.value.status_code == 503
        server.pool.max_seconds = 10
        assert threads.submit(ask, server, "hello").result().choices[0].finish_reason == "stop"


def test_a_step_that_fails_fails_its_requests_and_no_others(server):
    before = server.pool.stats()
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(post, server, {"messages": user("slow hello slow hello")})
        server.wait_until(lambda stats: stats["in_flight"] == 1)
        response = post(server, {"messages": user("crash")})
        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": "the model failed",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        assert other.result().status_code == 500
    stream = post(server, {"messages": user("slow crash"), "stream": True}).text
    assert json.loads(stream.split("\n\n")[-2].removeprefix("data: "))["error"]["message"] == "the model failed"
    with pytest.raises(openai.APIError, match="the model failed"):
        list(ask(server, "slow crash", stream=True))
    assert ask(server, "hello").choices[0].message.content == "You said: hello"
    assert server.pool.stats()["failed"] - before["failed"] == 4 and requests.get(f"{server.url}/health").ok


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_is_seen_and_nobody_waits_for_it():
    class Broken(ScriptedBatch):
        def add(self, requests):
            raise SystemExit

    with ChatServer(make_batch=Broken) as server:
        assert post(server, {"messages": user("hello")}).status_code == 503
        assert requests.get(f"{server.url}/health").status_code == 503
        assert post(server, {"messages": user("hello")}).status_code == 503


# ---------------------------------------------------------------------------------------------------------------------
# Going away


def test_a_client_that_goes_away_frees_its_place(server):
    for stream in (True, False):
        before = server.pool.stats()
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = json.dumps({"messages": user("slow forever"), "stream": stream, "max_tokens": 4096})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        server.wait_until(lambda stats: stats["in_flight"] == 1)
        connection.close()
        start = time.monotonic()
        stats = server.wait_until(lambda stats: stats["in_flight"] == 0)
        assert time.monotonic() - start < 0.5
        assert stats["cancelled"] == before["cancelled"] + 1 and stats["done"] == before["done"]


def test_generation_does_not_hold_up_the_event_loop():
    class Slow(ScriptedBatch):
        def step(self):
            time.sleep(0.5)
            return super().step()

    with ChatServer(make_batch=Slow) as server, ask_in_background(server, "forever"):
        start = time.monotonic()
        for _ in range(5):
            assert requests.get(f"{server.url}/health").ok
        assert time.monotonic() - start < 0.4


@contextlib.contextmanager
def ask_in_background(server: ChatServer, text: str) -> Iterator[None]:
    """Have a request in flight meanwhile."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": user(text)}), headers)
    server.wait_until(lambda stats: stats["in_flight"] == 1)
    yield
    connection.close()


def test_stopping_ends_open_streams():
    server = ChatServer()
    stream = ask(server, "slow forever", stream=True, max_tokens=4096)
    next(iter(stream))
    start = time.monotonic()
    server.stop()
    assert time.monotonic() - start < 3 and not server.thread.is_alive()
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(stream)


# ---------------------------------------------------------------------------------------------------------------------
# The pool, without HTTP


def run_pool(coroutine: Any, **settings: Any) -> Any:
    """Run a coroutine function of a started pool with one scripted worker of two rows."""

    async def main() -> Any:
        pool = Pool([Worker(ScriptedBatch, max_rows=2)], **settings)
        pool.start()
        try:
            return await coroutine(pool)
        finally:
            pool.stop(join_seconds=5)

    return asyncio.run(main())


def prompt(text: str, **settings: Any) -> Request:
    return Request(byte_tokenizer().render_for_completion({"messages": user(text)}), **settings)


async def read(job: Any) -> str:
    tokens = [token async for tokens in job for token in tokens]
    return byte_tokenizer().decode(tokens).removesuffix("<|assistant_end|>")


def test_requests_are_served_in_turn_and_waiting_ones_can_be_given_up():
    async def scenario(pool: Pool) -> None:
        first, second = pool.submit(prompt("slow forever")), pool.submit(prompt("slow forever"))
        third, fourth = pool.submit(prompt("three")), pool.submit(prompt("four"))
        third.end()
        third.end()
        second.end()
        assert await read(fourth) == "You said: four"
        first.end()
        stats = pool.stats()
        assert (stats["accepted"], stats["cancelled"], stats["done"]) == (4, 2, 1)

    run_pool(scenario)


def test_a_full_pool_refuses_and_an_idle_one_does_not():
    async def scenario(pool: Pool) -> None:
        jobs = [pool.submit(prompt("slow forever")) for _ in range(2)]
        with pytest.raises(Busy):
            pool.submit(prompt("three"))
        for job in jobs:
            job.end()
        while pool.stats()["in_flight"]:
            await asyncio.sleep(0.005)
        assert await read(pool.submit(prompt("four"))) == "You said: four"

    run_pool(scenario, max_queue=0)


def test_stopping_a_pool_fails_whoever_is_there():
    async def scenario(pool: Pool) -> None:
        jobs = [pool.submit(prompt("slow forever")) for _ in range(4)]
        await asyncio.sleep(0.05)
        pool.stop()
        for job in jobs:
            with pytest.raises(Unfinished, match="stopping"):
                await read(job)
        stats = pool.stats()
        assert (stats["accepted"], stats["failed"], stats["in_flight"], stats["queued"]) == (4, 4, 0, 0)

    run_pool(scenario)


def test_requests_go_to_the_worker_with_the_least_to_do():
    async def scenario() -> None:
        pool = Pool([Worker(ScriptedBatch), Worker(ScriptedBatch)])
        pool.start()
        jobs = [pool.submit(prompt("slow forever")) for _ in range(4)]
        assert [worker.load for worker in pool.workers] == [2, 2]
        pool.stop(join_seconds=5)
        assert len(jobs) == 4

    asyncio.run(scenario())


# ---------------------------------------------------------------------------------------------------------------------
# A real model


def test_seeds(real_server):
    texts = {ask(real_server, "x", temperature=1.0, max_tokens=40, seed=7).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1
    texts = {ask(real_server, "x", temperature=1.0, max_tokens=40).choices[0].message.content for _ in range(3)}
    assert len(texts) == 3
    seeds = {ask(real_server, "x", temperature=1.0, max_tokens=40, seed=s).choices[0].message.content for s in (1, -1)}
    assert len(seeds) == 2
    greedy = {ask(real_server, "x", temperature=0, max_tokens=40).choices[0].message.content for _ in range(2)}
    top_1 = ask(real_server, "x", max_tokens=40, extra_body={"top_k": 1}).choices[0].message.content
    assert greedy == {top_1}


def test_company_does_not_change_a_reply(real_server):
    def say(seed: int) -> str:
        reply = ask(real_server, f"question {seed}", seed=seed, max_tokens=60, temperature=1.0)
        return reply.choices[0].message.content

    alone = [say(seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(say, range(12))) == alone


def test_streams_and_whole_replies_agree(real_server):
    for seed in range(6):
        settings = {"seed": seed, "max_tokens": 80, "temperature": 1.5}
        whole = ask(real_server, "안녕 👋🏽", **settings).choices[0].message.content
        assert stream_text(ask(real_server, "안녕 👋🏽", stream=True, **settings)) == whole


def test_a_long_chat_loses_its_oldest_exchanges_and_says_so(real_server):
    turns = [message for i in range(8) for message in (*user(f"{i} " * 30), {"role": "assistant", "content": "yes"})]
    body = {"messages": [*turns, *user("and now?")], "max_tokens": 8, "seed": 1}
    reply = post(real_server, body).json()
    assert reply["dropped_messages"] > 0 and reply["dropped_messages"] % 2 == 0
    assert reply["usage"]["total_tokens"] <= 512
    rest = {**body, "messages": body["messages"][reply["dropped_messages"] :]}
    alone = post(real_server, rest).json()
    assert alone["dropped_messages"] == 0 and alone["choices"][0]["message"] == reply["choices"][0]["message"]
    stream = post(real_server, {**body, "stream": True}).text
    assert json.loads(stream.split("\n\n")[0].removeprefix("data: "))["dropped_messages"] == reply["dropped_messages"]
    assert real_server.pool.stats()["dropped_messages"] == 2 * reply["dropped_messages"]
    response = post(real_server, {"messages": user("x" * 600)})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_a_short_soak(real_server):
    """Random clients, half of them rude: afterwards nothing is left, and every accepted request is accounted for."""
    before = real_server.pool.stats()
    statuses: list[int] = []

    def behave(seed: int) -> None:
        rng = random.Random(seed)
        body = {
            "messages": user("x" * rng.randint(1, 300)),
            "max_tokens": rng.randint(1, 60),
            "stream": rng.random() < 0.5,
        }
        kind = rng.choice(["well", "well", "cut", "cut", "half", "large", "malformed", "bad"])
        if kind == "well":
            statuses.append(post(real_server, body).status_code)
        elif kind == "bad":
            statuses.append(post(real_server, {**body, "temperature": -1}).status_code)
        elif kind == "malformed":
            data = json.dumps(body)[: rng.randint(0, 40)]
            statuses.append(
                post(real_server, None, data=data, headers={"Content-Type": "application/json"}).status_code
            )
        elif kind == "large":
            data = b"[" + b" " * (MAX_BODY_BYTES + 9)
            statuses.append(
                post(real_server, None, data=data, headers={"Content-Type": "application/json"}).status_code
            )
        else:
            data = json.dumps({**body, "max_tokens": 400}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
            head += "Content-Type: application/json\r\n\r\n"
            with socket.create_connection(("127.0.0.1", real_server.port)) as connection:
                connection.sendall(head.encode() + (data[:20] if kind == "half" else data))
                time.sleep(rng.random() * 0.05)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(behave, range(200)))
    stats = real_server.wait_until(lambda stats: stats["in_flight"] == stats["queued"] == 0)
    counts = {name: stats[name] - before[name] for name in ("accepted", "done", "cancelled", "failed", "timed_out")}
    assert counts["failed"] == counts["timed_out"] == 0
    assert counts["accepted"] == counts["done"] + counts["cancelled"]
    assert counts["done"] >= statuses.count(200) > 20 and counts["cancelled"] > 5
    assert set(statuses) == {200, 400, 413}
    assert ask(real_server, "still there?", max_tokens=3).usage.completion_tokens == 3


# ---------------------------------------------------------------------------------------------------------------------
# The page and the program


def test_the_page_allows_its_own_script_and_nothing_from_elsewhere(server):
    response = requests.get(server.url)
    assert response.headers["Content-Type"].startswith("text/html")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and len(re.findall("'sha256-", policy)) == 2 and "unsafe" not in policy
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", response.text)
    assert "innerHTML" not in response.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is no model to chat with"),
        ({"temperature": 2.5}, "--temperature=2.5 must be from 0 to 2.0"),
        ({"max_tokens": 0}, "--max_tokens=0"),
        ({"port": 70000}, "--port=70000"),
        ({"num_gpus": 0}, "--num_gpus=0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        chat_web.main.__wrapped__(chat_web.Config(**settings))


def test_a_taken_port_is_one_line(server, capsys):
    save_chat_model()
    with pytest.raises(SystemExit):
        chat_web.main(chat_web.Config(port=server.port))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"port {server.port}" in error and "choose another --port" in error


@pytest.mark.parametrize("host", ["192.168..1", ".", "a" * 70, "no.such.host.invalid"])
def test_a_host_that_is_none_is_one_line(host):
    with pytest.raises(UserError, match=re.escape(f"cannot listen on {host}, port 0")):
        chat_web.listen(host, 0)


def test_a_reply_is_taken_back_however_long_it_was():
    """The model's own limit is in tokens: what it said must not end the conversation."""
    messages = [*user("x"), {"role": "assistant", "content": "y" * 9_000}, *user("z" * 8_000)]
    body = json.dumps({"messages": messages}).encode()
    assert parse_request(body, Settings(), "test").messages == messages


def start_program() -> subprocess.Popen:
    """Start the server as its users do, on a free port and with two workers."""
    command = [sys.executable, "-m", "scripts.chat_web", "-p", "0", "-n", "2", "--device_type=cpu"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_the_program_serves_and_ends_at_a_signal_with_streams_open():
    save_chat_model()
    programs = {sig: start_program() for sig in (signal.SIGTERM, signal.SIGINT)}  # both at once: they start slowly
    for sig, process in programs.items():
        addresses = (re.search(r"open (http://127\.0\.0\.1:\d+)", line) for line in process.stdout)
        url = next(match[1] for match in addresses if match)
        stats = requests.get(f"{url}/stats").json()
        assert stats["model"] == "d2-sft" and len(stats["workers"]) == 2
        chat = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).chat.completions
        # a random model may end a reply early: of several streams some are still open at the signal
        streams = [
            chat.create(model="nanochat", messages=user("secret"), max_tokens=400, stream=True) for _ in range(4)
        ]
        readers = [threading.Thread(target=exhaust, args=(stream,), daemon=True) for stream in streams]
        for reader in readers:
            reader.start()
        start = time.monotonic()
        process.send_signal(sig)
        output, _ = process.communicate(timeout=20)
        assert time.monotonic() - start < 5
        assert process.returncode in (0, -sig)
        assert "Traceback" not in output and "secret" not in output  # what is said is not logged
        for reader in readers:
            reader.join(5)


def exhaust(stream: Any) -> None:
    with contextlib.suppress(openai.APIError):
        list(stream)
