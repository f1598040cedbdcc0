"""The chat over HTTP, as OpenAI's clients speak it, and the page.

    GET  /                      the page, ui.html
    POST /v1/chat/completions   a reply, whole or as server-sent events
    GET  /v1/models             the one model that is served
    GET  /health                200 while all workers run, else 503
    GET  /stats                 numbers of requests and tokens, see serving.Pool.stats

Of a request these fields count; others are ignored:
    messages          roles system (or developer), user, assistant, the last two in turns; content: text, or a list of
                      {"type": "text"} parts. An assistant's may be the parts of conversation.py, tool calls included.
                      At most 500, of 8,000 characters each where they are not the assistant's, 32,000 in all
    model             the name that /v1/models gives, or "nanochat", or nothing
    temperature, seed, stop, max_tokens (or max_completion_tokens), stream, stream_options.include_usage
    n                 1
    top_k             an extension: sample among the k likeliest tokens, 0 is all
What a response has beyond OpenAI's:
    message.parts               the whole reply as the parts of conversation.py; content is its text alone
    delta.tool                  {"type": "python" or "python_output", "text": ...}, a piece of a tool call or its output
    dropped_messages            how many of the oldest messages were left out, as they do not fit the model's context

An error is {"error": {"message", "type", "param", "code"}} with a status of its kind; one that comes when a stream has
begun is its last event. A client that goes away frees its place at once. A request that comes from a page of another
origin needs the browser's leave, which is never given: there is no CORS, and bodies must be declared as JSON.

What it does not do: users, keys, TLS (put a proxy before it), and logging what is said.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nanochat import engine
from nanochat.conversation import ConversationError, FittedPrompt, ReplyReader, check_conversation, fit_conversation
from nanochat.serving import Busy, Job, Pool, Refused, Unfinished

PAGE = Path(__file__).with_name("ui.html")
ANY_MODEL = "nanochat"  # a name that means whatever model is served

MAX_BODY_BYTES = 1 << 20  # 32,000 characters take at most 12 bytes each in JSON
MAX_DISCARD_BYTES = 1 << 24  # of a larger body so much is read and thrown away, for the client to see the answer
BODY_SECONDS = 30.0  # for the body to arrive
GRACE_SECONDS = 60.0  # for a reply that is over to be read by its client
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CONVERSATION_CHARS = 32_000
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 200
MAX_TOKENS = 4_096
MAX_STOPS = 4
RETRY_SECONDS = 2  # what a client is told to wait where too many others do


class ApiError(Exception):
    """A request that is answered with an error body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The body, in OpenAI's form."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status == 429 else {}
        return JSONResponse(self.body(), self.status, headers)


# ---------------------------------------------------------------------------------------------------------------------
# Requests


@dataclass
class Settings:
    """What a request that does not say otherwise is given."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512


@dataclass
class ChatRequest:
    """A checked request for a reply."""

    messages: list[dict[str, Any]]
    temperature: float
    top_k: int
    max_tokens: int
    seed: int | None
    stops: list[str]
    stream: bool
    include_usage: bool


def parse_request(body: bytes, settings: Settings, model_name: str) -> ChatRequest:
    """The request that a body holds. Raises ApiError, which names the field, for whatever is wrong with it."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object")
    model = data.get("model")
    if model not in (None, "", ANY_MODEL, model_name):
        raise ApiError(404, f"there is no model {model!r} here: it is {model_name!r}", "model", "model_not_found")
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", "stream_options")
    _number(data, "n", 1, 1, 1, int)
    max_tokens = _number(data, "max_tokens", settings.max_tokens, 1, MAX_TOKENS, int)
    return ChatRequest(
        messages=_messages(data.get("messages")),
        temperature=_number(data, "temperature", settings.temperature, 0, MAX_TEMPERATURE, float),
        top_k=_number(data, "top_k", settings.top_k, 0, MAX_TOP_K, int),
        max_tokens=_number(data, "max_completion_tokens", max_tokens, 1, MAX_TOKENS, int),
        seed=_number(data, "seed", None, -(2**63), 2**63 - 1, int),
        stops=_stops(data.get("stop")),
        stream=_flag(data, "stream"),
        include_usage=_flag(options, "include_usage"),
    )


def _number(data: dict[str, Any], name: str, default: Any, low: float, high: float, kind: type) -> Any:
    """A number of the body within low..high; the default where it is missing or null."""
    value = data.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is not
    if not is_number or not low <= value <= high or value != kind(value):
        wanted = "an integer" if kind is int else "a number"
        limits = f"{low}" if low == high else f"{low} to {high}"
        raise ApiError(400, f"{name} must be {wanted}, {limits}", name)
    return kind(value)


def _flag(data: dict[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", name)
    return bool(value)


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    is_legal = isinstance(stops, list) and len(stops) <= MAX_STOPS and all(isinstance(s, str) and s for s in stops)
    if not is_legal:
        raise ApiError(400, f"stop must be a text or a list of at most {MAX_STOPS} texts, none of them empty", "stop")
    return stops


def _messages(messages: Any) -> list[dict[str, Any]]:
    """The messages, checked, without the fields that do not count."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        raise ApiError(400, f"{len(messages)} messages: at most {MAX_MESSAGES} are taken", "messages")
    roles = {"developer": "system"}
    with contextlib.suppress(TypeError, KeyError):  # what is wrong then is found and named by check_conversation
        messages = [{"role": roles.get(m["role"], m["role"]), "content": m["content"]} for m in messages]
    try:
        check_conversation({"messages": messages})
    except ConversationError as error:
        raise ApiError(400, str(error), "messages") from None
    if messages[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's: it is what the reply answers", "messages")
    lengths = [_num_chars(message["content"]) for message in messages]
    # a reply may be as long as the model made it: what was sent is taken back
    asked = {i: n for i, (m, n) in enumerate(zip(messages, lengths, strict=True)) if m["role"] != "assistant"}
    index = max(asked, key=asked.get)
    if asked[index] > MAX_MESSAGE_CHARS:
        text = f"message {index} has {lengths[index]:,} characters: at most {MAX_MESSAGE_CHARS:,} are taken"
        raise ApiError(400, text, "messages")
    if sum(lengths) > MAX_CONVERSATION_CHARS:
        text = f"the messages have {sum(lengths):,} characters: at most {MAX_CONVERSATION_CHARS:,} in all are taken"
        raise ApiError(400, text, "messages")
    return messages


def _num_chars(content: str | list[dict[str, str]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ApiError where it is too large, too slow or not declared as JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the Content-Type must be application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BODY_BYTES:
                    body += chunk
                elif size > MAX_DISCARD_BYTES:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    except ClientDisconnect:  # nobody reads this answer
        raise ApiError(400, "the body is cut off") from None
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


# ---------------------------------------------------------------------------------------------------------------------
# Replies


class StopFinder:
    """Cuts a text that comes in pieces before the first of some stop texts, which may be spread over pieces."""

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""  # the end of the text so far that may be the beginning of a stop
        self.is_found = False

    def push(self, text: str) -> str:
        """What of the text so far is certain, and was not returned before."""
        text = self.held + text
        found = [index for stop in self.stops if (index := text.find(stop)) >= 0]
        if found:
            self.is_found, self.held = True, ""
            return text[: min(found)]
        longest = max(map(len, self.stops), default=1) - 1
        starts = range(max(0, len(text) - longest), len(text))
        cut = next((i for i in starts if any(stop.startswith(text[i:]) for stop in self.stops)), len(text))
        self.held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back and is no stop after all."""
        text, self.held = self.held, ""
        return text


@dataclass
class Reply:
    """A reply under way: reads a job's tokens as pieces of text, and writes what clients are sent."""

    chat: ChatRequest
    prompt: FittedPrompt
    job: Job
    reader: ReplyReader
    model_name: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    num_tokens: int = 0
    finish_reason: str | None = None
    parts: list[dict[str, str]] = field(default_factory=list)  # what has been said

    async def pieces(self) -> AsyncIterator[list[tuple[str, str]]]:
        """Yield pieces (kind, text) as they come, at least one at a time, until the reply ends. Raises Unfinished."""
        finder = StopFinder(self.chat.stops)
        async for tokens in self.job:
            news: list[tuple[str, str]] = []
            for token in tokens:
                self.num_tokens += 1
                news += self._cut(self.reader.push(token), finder)
                if finder.is_found:
                    break
            if said := self._say(news):
                yield said
            if finder.is_found:
                self.job.end("done")
                break
        rest = [] if finder.is_found else [*self._cut(self.reader.finish(), finder), ("text", finder.finish())]
        if said := self._say(rest):
            yield said
        self.finish_reason = "stop" if finder.is_found else self.job.finish_reason

    def _cut(self, pieces: list[tuple[str, str]], finder: StopFinder) -> list[tuple[str, str]]:
        """The pieces up to a stop text; tool calls are not searched for it."""
        result = []
        for kind, text in pieces:
            if finder.is_found:
                break
            if kind == "text":
                result.append((kind, finder.push(text)))
            else:
                result += [("text", finder.finish()), (kind, text)]
        return result

    def _say(self, pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Keep pieces, adjacent ones of a kind joined; returns them without empty ones."""
        joined: list[tuple[str, str]] = []
        for kind, text in pieces:
            if text and joined and joined[-1][0] == kind:
                joined[-1] = (kind, joined[-1][1] + text)
            elif text:
                joined.append((kind, text))
        for kind, text in joined:
            if self.parts and self.parts[-1]["type"] == kind:
                self.parts[-1]["text"] += text
            else:
                self.parts.append({"type": kind, "text": text})
        return joined

    def completion(self) -> dict[str, Any]:
        """The body of the response where it is not streamed."""
        content = "".join(part["text"] for part in self.parts if part["type"] == "text")
        message = {"role": "assistant", "content": content, "refusal": None, "parts": self.parts}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return {**self._header("chat.completion"), "choices": [choice], "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The bodies of the events where it is streamed. The first comes with the first token."""
        is_first = True
        async for pieces in self.pieces():
            if is_first:
                yield self._chunk({"role": "assistant", "content": ""})
                is_first = False
            for kind, text in pieces:
                yield self._chunk({"content": text} if kind == "text" else {"tool": {"type": kind, "text": text}})
        if is_first:  # not a word was said
            yield self._chunk({"role": "assistant", "content": ""})
        yield self._chunk({}, self.finish_reason)
        if self.chat.include_usage:
            yield {**self._header("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.chat.include_usage else {}
        return {**self._header("chat.completion.chunk"), "choices": [choice], **usage}

    def _header(self, kind: str) -> dict[str, Any]:
        header = {"id": self.id, "object": kind, "created": self.created, "model": self.model_name}
        return {**header, "dropped_messages": self.prompt.dropped}

    def _usage(self) -> dict[str, int]:
        prompt = len(self.prompt.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
        }


class ReplyResponse(Response):
    """Sends a reply, whole or as events, and gives it up when the client goes away.

    Nothing is sent before the first token has come, so that an error until then has its own status.
    """

    def __init__(self, reply: Reply, max_seconds: float):
        super().__init__()
        self.reply, self.max_seconds = reply, max_seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        writing = asyncio.create_task(self._write(scope, receive, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({writing, leaving}, timeout=self.max_seconds, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()  # raises what it raised
        finally:
            self.reply.job.end()
            writing.cancel()
            leaving.cancel()

    async def _write(self, scope: Any, receive: Any, send: Any) -> None:
        chunks = self.reply.chunks()
        try:
            if not self.reply.chat.stream:
                async for _ in chunks:
                    pass
                await JSONResponse(self.reply.completion())(scope, receive, send)
                return
            first = await anext(chunks)
        except Unfinished as error:
            await _unfinished(error).response()(scope, receive, send)
            return
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        await _send_event(send, first)
        try:
            async for chunk in chunks:
                await _send_event(send, chunk)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        except Unfinished as error:
            await _send_event(send, _unfinished(error).body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _unfinished(error: Unfinished) -> ApiError:
    return ApiError(500 if "failed" in str(error) else 503, str(error))


async def _send_event(send: Callable[[dict[str, Any]], Awaitable[None]], data: dict[str, Any]) -> None:
    body = b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The application


def create_app(pool: Pool, tokenizer: Any, context_tokens: int, model_name: str, settings: Settings) -> FastAPI:
    """The application over a pool, which it starts and stops. context_tokens is how long prompt and reply may be."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pool.start()
        yield
        await asyncio.to_thread(pool.stop, join_seconds=5.0)

    page = PAGE.read_text(encoding="utf-8")
    page_headers = {"Content-Security-Policy": content_security_policy(page), "Cache-Control": "no-cache"}
    model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}
    # FastAPI's pages of documentation load scripts from elsewhere
    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def on_any_error(_: Request, error: Exception) -> Response:
        return ApiError(500, "the server made a mistake; its log says more").response()

    @app.get("/")
    async def get_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name}")
    async def get_model(name: str) -> Response:
        if name not in (model_name, ANY_MODEL):
            raise ApiError(404, f"there is no model {name!r} here: it is {model_name!r}", "model", "model_not_found")
        return JSONResponse(model)

    @app.get("/health")
    async def get_health() -> Response:
        is_healthy = pool.is_healthy()
        return JSONResponse({"status": "ok" if is_healthy else "a worker has stopped"}, 200 if is_healthy else 503)

    @app.get("/stats")
    async def get_stats() -> Response:
        return JSONResponse({"model": model_name, **pool.stats()})

    @app.post("/v1/chat/completions")
    async def complete_chat(request: Request) -> Response:
        chat = parse_request(await read_body(request), settings, model_name)
        conversation = {"messages": chat.messages}
        try:  # in a thread: a long text takes milliseconds to encode
            prompt = await asyncio.to_thread(fit_conversation, tokenizer, conversation, context_tokens, chat.max_tokens)
            job = pool.submit(engine.Request(prompt.tokens, prompt.max_tokens, chat.temperature, chat.top_k, chat.seed))
        except ConversationError as error:
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
        except Refused as error:
            raise ApiError(429 if isinstance(error, Busy) else 503, str(error)) from None
        pool.num_dropped += prompt.dropped
        reply = Reply(chat, prompt, job, ReplyReader(tokenizer), model_name)
        return ReplyResponse(reply, pool.max_seconds + GRACE_SECONDS)

    return app


def content_security_policy(page: str) -> str:
    """The header that lets a page run its own inline script and style, talk to its own server, and nothing else."""

    def digests(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() for text in contents]
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
