"""Talk to the model in a browser, or with any client of OpenAI's API.

    python -m scripts.chat_web
    python -m scripts.chat_web -i sft -g d20 -p 8080
    python -m scripts.chat_web -n 8 --host=0.0.0.0

Prints the address to open. It listens on this machine alone unless --host says otherwise: whoever reaches the address
may talk to the model. Everybody is served at once, by one batch a GPU that requests join and leave at any token; what
is said is not logged. The API is described in nanochat/chat_api.py:

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of Peru?"}]}'
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from nanochat.chat_api import MAX_TEMPERATURE, MAX_TOKENS, MAX_TOP_K, Settings, create_app
from nanochat.checkpoint_manager import CHAT_SOURCES, find_chat_source, load_model
from nanochat.common import UserError, compute_init, device_name, print0, user_errors
from nanochat.configurator import opt, parse
from nanochat.engine import GenerationBatch
from nanochat.serving import Pool, Worker


@dataclass
class Config:
    num_gpus: int = opt(1, "GPUs to use, each with the model and a batch of its own", short="n")
    source: str = opt(
        "", "rl, sft or mid; empty is the furthest stage there is", short="i", choices=("", *CHAT_SOURCES)
    )
    model_tag: str = opt("", "checkpoint folder; empty is the largest model", short="g")
    step: int = opt(-1, "checkpoint step; -1 is the last", short="s")
    temperature: float = opt(0.8, "for requests that name none; 0 takes the likeliest token", short="t")
    top_k: int = opt(50, "sample among the k likeliest tokens, for requests that name no k; 0 is all", short="k")
    max_tokens: int = opt(512, "of a reply, for requests that name no number", short="m")
    host: str = opt("127.0.0.1", "address to listen on; 0.0.0.0 is every one of this machine's")
    port: int = opt(8000, "port to listen on; 0 takes a free one", short="p")
    max_batch: int = opt(16, "requests that a GPU works on at once; more wait")
    max_queue: int = opt(64, "requests that may wait; more are refused with status 429")
    max_seconds: float = opt(300.0, "for a request; a reply that takes longer is cut")
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")


def check(config: Config) -> None:
    """Raise UserError for a setting out of its range."""
    limits = {
        "num_gpus": (1, 64),
        "temperature": (0, MAX_TEMPERATURE),
        "top_k": (0, MAX_TOP_K),
        "max_tokens": (1, MAX_TOKENS),
        "port": (0, 65535),
        "max_batch": (1, 1024),
        "max_queue": (0, 100_000),
        "max_seconds": (1, 86_400),
    }
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise UserError(f"--{name}={value} must be from {low} to {high}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address. Raises UserError where it is taken, or not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError is for a name that cannot be one
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port} ({reason}): choose another --port or --host") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """What to type into a browser on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server that says when it is ready, and that ends open streams when it is told to end."""

    def __init__(self, app: FastAPI, on_ready: Callable[[], None], on_exit: Callable[[], None]):
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3))
        self.on_ready, self.on_exit = on_ready, on_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.loop.call_soon_threadsafe(self.on_exit)  # not here: the signal may have come while a lock is held


@user_errors
def main(config: Config) -> None:
    """Serve until a signal ends it."""
    # Setup
    check(config)
    source = config.source or find_chat_source(config.model_tag)
    listener = listen(config.host, config.port)
    runtime = compute_init(config.device_type)
    if runtime.device.type == "cuda":
        if config.num_gpus > torch.cuda.device_count():
            raise UserError(f"-n {config.num_gpus}: there are {torch.cuda.device_count()} GPUs")
        devices = [torch.device("cuda", index) for index in range(config.num_gpus)]
    else:
        devices = [runtime.device] * config.num_gpus

    # Model
    workers = []
    for device in devices:
        model, tokenizer, meta = load_model(source, device, "eval", config.model_tag, config.step)
        workers.append(Worker(lambda m=model, t=tokenizer: GenerationBatch(m, t), device, config.max_batch))
    name = f"{meta['model_tag']}-{source}"
    pool = Pool(workers, config.max_queue, config.max_seconds)
    settings = Settings(config.temperature, config.top_k, config.max_tokens)
    app = create_app(pool, tokenizer, model.config.sequence_len, name, settings)

    # Serve
    def on_ready() -> None:
        others = " (and on this machine's other addresses)" if config.host in ("0.0.0.0", "::") else ""
        print0(f"{name} on {len(devices)} x {device_name(devices[0])}: open {address_of(listener)}{others}")

    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once all is closed
        Server(app, on_ready, pool.stop).run(sockets=[listener])


if __name__ == "__main__":
    main(parse(Config))
