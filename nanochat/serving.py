"""Many requests, one batch: the thread that owns a model, and the queue before it.

    pool = Pool([Worker(lambda: GenerationBatch(model, tokenizer), device)])
    pool.start()
    job = pool.submit(Request(tokens, max_tokens=64))
    async for tokens in job: ...  # lists of tokens, as they come
    pool.stop()

A worker is a thread with one GenerationBatch on one device. Between two steps requests join the batch and leave it, so
that a new one begins at the next token and one that is given up frees its place at once. A pool has a worker for each
device and gives a request to the one with the least to do. Jobs are read in an event loop, which the threads never
hold up: a step's tokens are handed over in one call, and a job that is read slowly finds all of them when it looks.

What it does not do: HTTP, and text (see chat_api.py). Only numbers are counted here; no request is kept or logged.
"""

import asyncio
import contextlib
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch

from nanochat.common import autocast
from nanochat.engine import Completion, Request

RATE_SECONDS = 10.0  # tokens per second are those of the last so many seconds
JOIN_TOKENS = 4096  # tokens of prompts that are computed between two steps, lest the others wait for long


class Refused(Exception):
    """The request was not taken: the pool is stopping."""


class Busy(Refused):
    """The request was not taken: too many are waiting."""


class Unfinished(Exception):
    """A request that was taken has ended without a whole reply; the text says why."""


class Job:
    """A request on its way through a pool. Read it with `async for`, once; give it up at any time with end()."""

    def __init__(self, worker: "Worker", request: Request, deadline: float):
        self.worker, self.request = worker, request
        self.deadline = deadline  # on the monotonic clock
        self.ended_as: str | None = None  # set by end(): the worker lets the job go before its next step
        self.loop = asyncio.get_running_loop()
        self._tokens: list[int] = []  # that have come and were not read
        self._outcome: str | Exception | None = None
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        """Yield what has come since the last time, at least one token, until the reply ends. Raises Unfinished."""
        while True:
            await self._news.wait()
            self._news.clear()
            tokens, self._tokens, outcome = self._tokens, [], self._outcome
            if tokens:
                yield tokens
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is not None:
                return

    @property
    def finish_reason(self) -> str | None:
        """'stop' or 'length' once a whole reply has come."""
        return self._outcome if isinstance(self._outcome, str) else None

    def end(self, ended_as: str = "cancelled") -> None:
        """Free the job's place, and count it under that name; nothing happens where it is over already."""
        self.worker.end(self, ended_as)

    def deliver(self, token: int | None, outcome: str | Exception | None) -> None:
        """Add a token or an outcome. Runs in the event loop."""
        if token is not None:
            self._tokens.append(token)
        self._outcome = self._outcome or outcome
        self._news.set()


class Worker:
    """One model on one device: a thread that steps its batch while there is anything to do.

    make_batch builds the GenerationBatch; it is called in the thread, and again after a step that failed. max_rows is
    how many requests the batch holds; the others wait in line.
    """

    def __init__(self, make_batch: Callable[[], Any], device: torch.device | str = "cpu", max_rows: int = 16):
        self.make_batch, self.device, self.max_rows = make_batch, torch.device(device), max_rows
        self.counts: Counter[str] = Counter()  # of requests by how they ended, of tokens and of steps
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, Completion | None] = {}  # None while the prompt is computed
        self._recent: deque[tuple[float, int]] = deque()  # (time of a step, its tokens)
        self._is_stopping = False
        self._changed = threading.Condition()  # guards all of the above
        self._thread = threading.Thread(target=self._run, name=f"worker {self.device}", daemon=True)

    @property
    def load(self) -> int:
        """Requests that are here, running or waiting."""
        return len(self._waiting) + len(self._running)

    def is_alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._is_stopping

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request, deadline: float) -> Job:
        """Put a request in line. Call in an event loop. Raises Refused where the worker has stopped."""
        with self._changed:
            if self._is_stopping:
                raise Refused("the server is stopping")
            job = Job(self, request, deadline)
            self._waiting.append(job)
            self.counts["accepted"] += 1
            self._changed.notify()
        return job

    def end(self, job: Job, ended_as: str) -> None:
        """See Job.end."""
        with self._changed:
            if job in self._running:
                job.ended_as = job.ended_as or ended_as
                self._changed.notify()
            elif job in self._waiting:
                self._waiting.remove(job)
                self.counts[ended_as] += 1

    def stop(self) -> None:
        """End all requests with Unfinished, and the thread after the step that it is in. Any thread may call."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
            self._fail([*self._running, *self._waiting], "the server is stopping")

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread to end."""
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)

    def stats(self) -> dict[str, Any]:
        """Counts and rates, as numbers."""
        with self._changed:
            now = time.monotonic()
            tokens = sum(number for when, number in self._recent if now - when <= RATE_SECONDS)
            return {
                "device": str(self.device),
                "in_flight": len(self._running),
                "queued": len(self._waiting),
                "max_batch": self.max_rows,
                "tokens_per_second": round(tokens / RATE_SECONDS, 1),
                **{name: self.counts[name] for name in ("accepted", "done", "cancelled", "failed", "timed_out")},
                **{name: self.counts[name] for name in ("tokens", "steps")},
            }

    # -----------------------------------------------------------------------------------------------------------------
    # In the thread

    def _run(self) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            with torch.inference_mode(), autocast(self.device):
                self._serve()
        finally:  # also where the thread dies: nobody shall wait for it
            self.stop()

    def _serve(self) -> None:
        batch = self.make_batch()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping or self._waiting or self._running)
                if self._is_stopping:
                    return
                leaving, joining = self._plan()
            try:
                batch.remove(leaving)
                if joining:
                    completions = batch.add([job.request for job in joining])
                    with self._changed:
                        if not self._is_stopping:
                            self._running.update(zip(joining, completions, strict=True))
                results = batch.step() if len(batch) else []
            except Exception:  # whatever it is, the requests that are to come must not be lost with these
                traceback.print_exc()
                with self._changed:
                    self._fail(list(self._running), "the model failed")
                batch = self.make_batch()
            else:
                self._hand_over(results)

    def _plan(self) -> tuple[list[Completion], list[Job]]:
        """(who leaves the batch, who joins it) before the next step. The caller holds the lock."""
        now = time.monotonic()
        leaving, news = [], []
        for job, completion in list(self._running.items()):
            if job.ended_as or now > job.deadline:
                del self._running[job]
                leaving.append(completion)
                self.counts[job.ended_as or "timed_out"] += 1
                news.append((job, None, "length"))  # what there is of the reply is the reply
        for job in [job for job in self._waiting if now > job.deadline]:
            self._waiting.remove(job)
            self.counts["timed_out"] += 1
            news.append((job, None, Unfinished("the request has waited for too long")))
        _send(news)
        joining: list[Job] = []
        room = JOIN_TOKENS
        while self._waiting and len(self._running) < self.max_rows:
            room -= len(self._waiting[0].request.tokens)
            if joining and room < 0:
                break
            joining.append(self._waiting.popleft())
            self._running[joining[-1]] = None
        return leaving, joining

    def _hand_over(self, results: Sequence[tuple[Completion, int, int]]) -> None:
        """Give the tokens of a step to those who wait for them, and let go of who has ended."""
        with self._changed:
            jobs = {completion: job for job, completion in self._running.items()}
            news = [(jobs[c], token, c.finish_reason) for c, token, _ in results if c in jobs]  # none after a stop
            for job, _, finish_reason in news:
                if finish_reason:
                    del self._running[job]
                    self.counts["done"] += 1
            self.counts["tokens"] += len(news)
            self.counts["steps"] += bool(news)
            now = time.monotonic()
            self._recent.append((now, len(news)))
            while now - self._recent[0][0] > RATE_SECONDS:
                self._recent.popleft()
            _send(news)

    def _fail(self, jobs: Sequence[Job], reason: str) -> None:
        """End jobs with Unfinished. The caller holds the lock."""
        for job in jobs:
            if self._running.pop(job, None) is None and job in self._waiting:
                self._waiting.remove(job)
            self.counts["failed"] += 1
        _send([(job, None, Unfinished(reason)) for job in jobs])


def _send(news: Sequence[tuple[Job, int | None, str | Exception | None]]) -> None:
    """Deliver to jobs in their event loop, one call for all of them."""

    def deliver() -> None:
        for job, token, outcome in news:
            job.deliver(token, outcome)

    if news:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            news[0][0].loop.call_soon_threadsafe(deliver)


class Pool:
    """The workers of all devices, and how many requests may wait for them."""

    def __init__(self, workers: Sequence[Worker], max_queue: int = 64, max_seconds: float = 300.0):
        self.workers, self.max_queue, self.max_seconds = list(workers), max_queue, max_seconds
        self.num_refused = 0
        self.num_dropped = 0  # messages that did not fit the context: counted here by whoever leaves them out
        self.started = time.monotonic()

    def start(self) -> None:
        """Start the threads."""
        for worker in self.workers:
            worker.start()

    def submit(self, request: Request) -> Job:
        """Give a request to the worker with the least to do. Call in an event loop.

        It may take max_seconds: then what there is of its reply is the reply, with the finish_reason 'length'. Raises
        Refused where max_queue requests wait already, or no worker takes any.
        """
        try:
            workers = [worker for worker in self.workers if worker.is_alive()]
            if not workers:
                raise Refused("the server is stopping")
            least = min(workers, key=lambda worker: worker.load)
            waiting = sum(max(0, worker.load - worker.max_rows) for worker in workers)
            if least.load >= least.max_rows and waiting >= self.max_queue:
                raise Busy("too many requests are waiting; try again in a moment")
            return least.submit(request, time.monotonic() + self.max_seconds)
        except Refused:
            self.num_refused += 1
            raise

    def stop(self, join_seconds: float = 0.0) -> None:
        """End all requests and the threads; wait for these that long, together."""
        for worker in self.workers:
            worker.stop()
        deadline = time.monotonic() + join_seconds
        for worker in self.workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def is_healthy(self) -> bool:
        """Whether every worker runs."""
        return all(worker.is_alive() for worker in self.workers)

    def stats(self) -> dict[str, Any]:
        """The sums over the workers, and each worker's own numbers."""
        each = [worker.stats() for worker in self.workers]
        total = {name: sum(stats[name] for stats in each) for name in each[0] if name != "device"}
        return {
            "uptime_seconds": round(time.monotonic() - self.started, 1),
            **total,
            "batch_size": round(total["tokens"] / max(1, total["steps"]), 2),  # the mean over all steps so far
            "refused": self.num_refused,
            "dropped_messages": self.num_dropped,
            "max_queue": self.max_queue,
            "workers": each,
        }
