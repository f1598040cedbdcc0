"""How fast the chat server is for 1, 4 and 16 users at once: tokens per second, and the wait for the first token.

    python -m dev.bench_serve
    python -m dev.bench_serve --source=sft --model_tag=d20 --max_tokens=256
    python -m dev.bench_serve --url=http://127.0.0.1:8000

Without --url it starts the server itself, on a free port. Each user sends one request after the other, streamed, at
temperature 1, so that replies differ and may end before max_tokens; the server's own counts of tokens are summed. A
line a number of users: tokens/s of all together and of each, the median and the slowest of the waits for the first
token, and how many sequences a step had on average. Beside 16 users a new one waits for the step under way, for its
own prompt and for those that come with it.
"""

import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nanochat.common import UserError, user_errors
from nanochat.configurator import opt, parse

PROMPT = "Tell me a story about a small house by the river, the people who live in it, and what they find one morning."


@dataclass
class Config:
    url: str = opt("", "of a running server; empty starts one")
    source: str = opt("", "of the model to start with: rl, sft or mid; empty is the furthest there is")
    model_tag: str = opt("", "of the model to start with; empty is the largest")
    device_type: str = opt("", "of the server to start: cuda, mps or cpu; empty finds the best there is")
    users: str = opt("1,4,16", "numbers of users, joined by commas")
    requests_per_user: int = opt(4, "requests that each sends, one after the other")
    max_tokens: int = opt(128, "of a reply")


@contextlib.contextmanager
def running_server(url: str, **settings: Any) -> Iterator[tuple[str, int | None]]:
    """(address, process id) of a server that is started with these settings, those that are empty left out.

    With a url nothing is started, and the process id is None. Raises UserError where the server does not start.
    """
    if url:
        yield url.rstrip("/"), None
        return
    flags = [f"--{name}={value}" for name, value in settings.items() if value not in ("", None)]
    command = [sys.executable, "-m", "scripts.chat_web", "--port=0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if match := re.search(r"open (http://\S+)", line):
                    yield match[1], process.pid
                    return
            raise UserError("the server did not start; see above")
        finally:
            process.terminate()


def get_stats(url: str) -> dict[str, Any]:
    """The server's /stats."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/stats")
        return json.loads(connection.getresponse().read())


def time_request(url: str, max_tokens: int) -> tuple[float, int]:
    """(seconds until the first token, tokens) of one streamed request."""
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": max_tokens,
        "temperature": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, num_tokens = time.perf_counter(), None, 0
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise UserError(f"the server answered {response.status}: {response.read().decode('utf-8')}")
        for line in response:
            first = first or time.perf_counter() - start
            if line.startswith(b"data: {") and (usage := json.loads(line[6:]).get("usage")):
                num_tokens = usage["completion_tokens"]
    return first or 0.0, num_tokens


def run_users(url: str, num_users: int, config: Config) -> tuple[list[float], int, float]:
    """(waits for the first token in seconds, tokens, seconds in all) of so many users at once."""
    waits: list[float] = []
    totals: list[int] = []
    errors: list[Exception] = []

    def use() -> None:
        try:
            for _ in range(config.requests_per_user):
                wait, num_tokens = time_request(url, config.max_tokens)
                waits.append(wait)
                totals.append(num_tokens)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(num_users)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return waits, sum(totals), time.perf_counter() - start


@user_errors
def main(config: Config) -> None:
    """Print the table."""
    model = {"source": config.source, "model_tag": config.model_tag, "device_type": config.device_type}
    with running_server(config.url, **model) as (url, _):
        time_request(url, config.max_tokens)  # the first request pays for what is made once
        print(f"{'users':>5}  {'tok/s':>8}  {'tok/s each':>10}  {'first token':>11}  {'slowest':>8}  {'batch':>5}")
        for num_users in map(int, config.users.split(",")):
            before = get_stats(url)
            waits, num_tokens, seconds = run_users(url, num_users, config)
            after = get_stats(url)
            batch = (after["tokens"] - before["tokens"]) / max(1, after["steps"] - before["steps"])
            rate = num_tokens / seconds
            print(
                f"{num_users:>5}  {rate:>8.1f}  {rate / num_users:>10.1f}  {statistics.median(waits) * 1000:>8.0f} ms"
                f"  {max(waits) * 1000:>5.0f} ms  {batch:>5.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main(parse(Config))
