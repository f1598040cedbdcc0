"""A long trial of the chat server with clients of all kinds: no crash, no lost place, no growing memory.

    python -m dev.soak_serve
    python -m dev.soak_serve --num_requests=20000 --num_clients=32
    python -m dev.soak_serve --url=http://127.0.0.1:8000

Clients read whole replies and streams, hang up in the middle of them or before they have sent their request, and send
bodies that are too large, no JSON or against the limits; which of it is drawn from the seed. Without --url it starts
the server itself. Now and then a line says how far it is and how much memory the server has. The verdict at the end is
"passed" where the server is well, every accepted request was finished or cancelled, none is left, no answer had a
status that it must not have, and the most memory of the last third is at most 5% above that of the first.
"""

import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil

from dev.bench_serve import get_stats, running_server
from nanochat.common import UserError, user_errors
from nanochat.configurator import opt, parse

EXPECTED = {  # what a client does -> the statuses that it may be answered with
    "whole": (200, 429),
    "stream": (200, 429),
    "leave": (0, 200, 429),
    "half": (0,),
    "large": (413,),
    "malformed": (400,),
    "against limits": (400,),
    "unknown path": (404,),
}
WEIGHTS = (4, 4, 5, 1, 1, 1, 1, 1)
SAMPLE_SECONDS = 0.5


@dataclass
class Config:
    url: str = opt("", "of a running server on this machine; empty starts one")
    source: str = opt("", "of the model to start with: rl, sft or mid; empty is the furthest there is")
    model_tag: str = opt("", "of the model to start with; empty is the largest")
    num_requests: int = opt(2000, "requests in all")
    num_clients: int = opt(24, "clients at once")
    max_tokens: int = opt(64, "of a reply, at most")
    seed: int = opt(1, "of what the clients do")


def request_bytes(method: str, path: str, body: bytes) -> bytes:
    """A request as it goes over the wire."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def behave(kind: str, address: tuple[str, int], rng: random.Random, max_tokens: int) -> int:
    """Do what a client of that kind does; returns the status of the answer, 0 for none."""
    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": "question " * rng.randint(1, 20)}],
        "max_tokens": rng.randint(1, max_tokens),
        "stream": kind == "stream" or (kind == "leave" and rng.random() < 0.7),
    }
    if kind == "against limits":
        chat |= rng.choice([{"temperature": 9}, {"messages": []}, {"n": 3}, {"max_tokens": 10**9}, {"top_k": -1}])
    body = json.dumps(chat).encode()
    if kind == "malformed":
        body = body[: rng.randint(1, len(body) - 1)]
    if kind == "large":
        body = b"[" + b" " * (2 << 20)
    data = request_bytes("POST", "/v1/nothing" if kind == "unknown path" else "/v1/chat/completions", body)
    answer = b""
    with contextlib.suppress(ConnectionError), socket.create_connection(address, timeout=120) as connection:
        connection.sendall(data[: rng.randint(1, len(data) - 1)] if kind == "half" else data)
        if kind == "leave":
            time.sleep(rng.random() * 0.1)
        num_reads = {"half": 0, "leave": rng.randint(0, 6)}.get(kind, 10**9)
        while num_reads and (part := connection.recv(1 << 16)):
            answer += part
            num_reads -= 1
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def find_process(url: str, pid: int | None) -> psutil.Process | None:
    """The server's process; None where it cannot be told."""
    if pid is None:
        port = urlsplit(url).port or 80
        with contextlib.suppress(psutil.Error):
            connections = psutil.net_connections("tcp")
            listening = (c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
            pid = next(listening, None)
    return psutil.Process(pid) if pid else None


@user_errors
def main(config: Config) -> None:
    """Print the curve and the verdict; raises UserError where it has not passed."""
    kinds = random.Random(config.seed).choices(list(EXPECTED), WEIGHTS, k=config.num_requests)
    work = iter(list(enumerate(kinds)))
    lock = threading.Lock()
    statuses: Counter[tuple[str, int]] = Counter()

    model = {"source": config.source, "model_tag": config.model_tag}
    with running_server(config.url, **model, max_queue=8) as (url, pid):
        parts = urlsplit(url)
        address = (parts.hostname, parts.port or 80)
        process = find_process(url, pid)
        before = get_stats(url)

        def use() -> None:
            while True:
                with lock:
                    index, kind = next(work, (None, ""))
                if index is None:
                    return
                status = behave(kind, address, random.Random(f"{config.seed}/{index}"), config.max_tokens)
                with lock:
                    statuses[kind, status] += 1

        # The clients
        threads = [threading.Thread(target=use, daemon=True) for _ in range(config.num_clients)]
        for thread in threads:
            thread.start()
        curve: list[float] = []  # MB of the server's process
        last_print = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(SAMPLE_SECONDS)
            curve.append(process.memory_info().rss / 1e6 if process else 0.0)
            if time.monotonic() - last_print > 5:
                last_print = time.monotonic()
                print(f"{sum(statuses.values())}/{config.num_requests} requests, {curve[-1]:.0f} MB", flush=True)

        # What is left
        deadline = time.monotonic() + 30
        while (after := get_stats(url))["in_flight"] + after["queued"] and time.monotonic() < deadline:
            time.sleep(0.1)

    # The verdict
    names = ("accepted", "done", "cancelled", "failed", "timed_out", "refused")
    counts = {name: after[name] - before[name] for name in names}
    for kind, expected in EXPECTED.items():
        found = {status: number for (k, status), number in sorted(statuses.items()) if k == kind}
        print(f"{kind:<15} " + ", ".join(f"{number} x {status or 'no answer'}" for status, number in found.items()))
        if set(found) - set(expected):
            raise UserError(f"failed: {kind} was answered with {sorted(set(found) - set(expected))}")
    print(", ".join(f"{name} {number}" for name, number in counts.items()))
    if after["in_flight"] or after["queued"]:
        raise UserError(
            f"failed: {after['in_flight']} requests are in flight and {after['queued']} wait with no client"
        )
    if counts["failed"] or counts["accepted"] != counts["done"] + counts["cancelled"] + counts["timed_out"]:
        raise UserError("failed: some of the accepted requests were neither finished nor cancelled")
    third = max(1, len(curve) // 3)
    early, late = max(curve[:third], default=0), max(curve[-third:], default=0)
    print(f"memory: {early:.0f} MB at most in the first third, {late:.0f} MB in the last")
    if late > 1.05 * early:
        raise UserError("failed: the server's memory grows")
    print("passed")


if __name__ == "__main__":
    main(parse(Config))
