"""Fault drill: training runs are hit by every kind of fault at random steps, and must end as if nothing had happened.

    python -m dev.drill
    python -m dev.drill --stages=base,rl --faults=kill_one,full_disk --trials=20 --seed=7
    python -m dev.drill --quick=1 --trials=3

A trial starts a stage at depth 2, hits it, and gives the same command again. It is survived when the fault left whole
checkpoints of finite weights alone, at most --save_every steps of work were done twice, and the run ends in the same
weights and losses as one that nobody touched, bit for bit; else it is lost. At the end a table says fault by stage by
number of processes how many were tried, survived and lost; one lost trial makes the exit status 1.

What comes from outside comes from outside here, too: signals, limits, files. What does not (a NaN, a loader that
raises) is patched into the process before the script starts; the scripts know nothing of it. Each run is a command line
of its own, of torchrun for two processes. kill_restart is a kill -9 of one rank under torchrun --max-restarts, which
has to bring the run through without help. --quick=1 forks the ranks from a server that has imported torch already, and
plays torchrun's part: the same trials in a tenth of the time, as tests/test_faults.py has them.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from nanochat import dataloader, pocket
from nanochat.common import UserError, compute_cleanup, format_seconds, get_dist_info, user_errors
from nanochat.configurator import opt, parse
from nanochat.dataset import write_source
from tasks import mixtures
from tasks.pocket import PocketMath

STEPS, SAVE_EVERY = 20, 3
GRACE_SECONDS = 5.0  # from a rank's death to the others'
PATIENCE_SECONDS = 240.0
SLOW_IMPORTS = ["torch.fx.experimental.symbolic_shapes"]  # done when a model leaves the meta device
CHILD = "NANOCHAT_DRILL"  # environment variable: what a process that the drill started is to do, as JSON
NUM_ROWS = 16  # of each table of the world, and of what a mixture takes a certain number of

COMMON = {"eval_every": -1, "save_every": SAVE_EVERY, "num_iterations": STEPS, "log_norms_every": 5}
PACKED = {"max_seq_len": 64, "device_batch_size": 4, "total_batch_size": 512, "data_lanes": 4, "eval_tokens": 512}


class Stage(NamedTuple):
    """A training script, its settings here, and where its checkpoints go."""

    script: str
    settings: dict[str, Any]
    folder: str
    tag: str  # the setting that names a run

    def run_dir(self, base_dir: Path, tag: str) -> Path:
        return base_dir / self.folder / tag


STAGES = {
    "base": Stage(
        "scripts.base_train",
        COMMON | PACKED | {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "core_metric_every": -1, "sample_every": -1},
        "base_checkpoints",
        "model_tag",
    ),
    "mid": Stage("scripts.mid_train", COMMON | PACKED, "mid_checkpoints", "output_tag"),
    "sft": Stage(
        "scripts.chat_sft",
        COMMON | {"device_batch_size": 4, "target_examples_per_step": 8, "init_lr_frac": 0.5, "eval_metrics_every": -1},
        "chatsft_checkpoints",
        "output_tag",
    ),
    "rl": Stage(
        "scripts.chat_rl",
        COMMON
        | {"device_batch_size": 8, "examples_per_step": 2, "num_samples": 4, "max_new_tokens": 4, "init_lr_frac": 0.5},
        "chatrl_checkpoints",
        "output_tag",
    ),
}
FAULTS = (
    *("sigterm", "sigint", "kill_one", "kill_all", "full_disk"),
    *("cut_checkpoint", "lost_shard", "nan_weight", "exploding", "loader_raises", "kill_restart"),
)
INNER_FAULTS = ("nan_weight", "exploding", "loader_raises")  # patched into the process


@dataclass
class Config:
    stages: str = opt(",".join(STAGES), "stages to try, joined by commas")
    processes: str = opt("1,2", "numbers of processes to try, joined by commas")
    faults: str = opt(",".join(FAULTS), "faults to try, joined by commas")
    trials: int = opt(1, "of each fault, stage and number of processes")
    seed: int = opt(1, "of the steps at which faults happen, and of all else that is random")
    quick: bool = opt(False, "fork the processes instead of starting command lines")


# ---------------------------------------------------------------------------------------------------------------------
# In the processes that train


def odd_reward(task: PocketMath, conversation: dict[str, Any], completion: str) -> float:
    """About half of all replies earn something: so small a model earns no other reward."""
    return float(zlib.crc32(completion.encode("utf-8")) % 2)


def make_small() -> None:
    """Small mixtures and a reward that tiny models earn, in this process."""
    for name in vars(mixtures):
        if re.match("POCKET_(MID|SFT)_", name):
            setattr(mixtures, name, NUM_ROWS)
    PocketMath.reward = odd_reward


def at_call(function: Callable, number: int, rank: int, act: Callable) -> Callable:
    """function, but in its number-th call on that rank act(*arguments) comes first."""
    calls: list[None] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == number and get_dist_info()[1] == rank:
            act(*args)
        return function(*args, **kwargs)

    return wrapped


def patch(script: Any, fault: str, step: int, rank: int, seed: str) -> None:
    """Have a fault happen inside this process at the update after `step`."""
    rng = random.Random(seed)

    def poison(model: Any, *args: Any) -> None:
        weight = rng.choice(list(model.parameters())).detach()
        weight.view(-1)[rng.randrange(weight.numel())] = float("nan")

    def scramble(model: Any, *args: Any) -> None:
        model.lm_head.weight.detach().normal_(std=20.0)

    def fail(*args: Any) -> None:
        raise rng.choice([OSError("the disk is gone"), RuntimeError("the reader is broken")])

    if fault in ("nan_weight", "exploding"):
        act = poison if fault == "nan_weight" else scramble
        script.accumulate_gradients = at_call(script.accumulate_gradients, step + 1, rank, act)
    else:
        act = fail if fault == "loader_raises" else lambda *args: time.sleep(1.0)
        name = {"scripts.chat_sft": "render_rows", "scripts.chat_rl": "sample_rollouts"}.get(script.__name__)
        if name:
            setattr(script, name, at_call(getattr(script, name), step + 1, rank, act))
        else:
            rows = 8 * step // get_dist_info()[3] + 1
            dataloader.Lane.read_row = at_call(dataloader.Lane.read_row, rows, rank, act)


def run_script(script: str, settings: dict[str, Any], fault: dict[str, Any] | None) -> None:
    """Run a script's main here."""
    torch.set_num_threads(1)
    make_small()
    module = importlib.import_module(script)
    if fault:
        patch(module, **fault)
    module.main(module.Config(**settings))


def run_rank(environment: dict[str, str], output: connection.Connection, job: dict[str, Any]) -> None:
    """A forked process: one rank of a run, whose output goes into a pipe."""
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    sys.stdout, sys.stderr = (open(d, "w", buffering=1, encoding="utf-8", closefd=False) for d in (1, 2))
    run_script(**job)
    compute_cleanup()


# ---------------------------------------------------------------------------------------------------------------------
# A run, seen from outside


class Run:
    """A script in one or several processes. lines() yields what it prints until all have ended, then code is known."""

    def __init__(
        self,
        base_dir: Path,
        script: str,
        settings: dict[str, Any],
        processes: int = 1,
        fault: dict[str, Any] | None = None,
        quick: bool = True,
        max_restarts: int = 0,
    ):
        self.output: list[str] = []
        self.code: int | None = None
        job = {"script": script, "settings": settings, "fault": fault}
        environment = {"NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1"}
        if quick and not max_restarts:
            self._fork(environment, job, processes)
        else:
            self._spawn(environment, job, processes, max_restarts)

    def _spawn(self, environment: dict[str, str], job: dict[str, Any], processes: int, max_restarts: int) -> None:
        self.is_torchrun = processes > 1 or max_restarts > 0
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--max-restarts={max_restarts}", "-m"]
        self.command = subprocess.Popen(
            [sys.executable, "-m", *(launcher if self.is_torchrun else []), "dev.drill"],
            env={**os.environ, **environment, CHILD: json.dumps(job)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.stream = self.command.stdout

    def _fork(self, environment: dict[str, str], job: dict[str, Any], processes: int) -> None:
        """The ranks meet in a store of this process, as they meet in one of torchrun's agent."""
        self.command, self.processes = None, []
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        if processes > 1:
            self.store = dist.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
            )
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
            process = context.Process(target=run_rank, args=({**environment, **own}, sender, job), daemon=True)
            process.start()
            self.processes.append(process)
        sender.close()
        self.stream = os.fdopen(os.dup(receiver.fileno()), "rb")
        receiver.close()
        self.agent = threading.Thread(target=self._end_the_rest, daemon=True)
        self.agent.start()

    def _end_the_rest(self) -> None:
        """What torchrun's agent does: once a rank has failed, end the others. Alone reads the exit statuses."""
        left = list(self.processes)
        while left and not any(process.exitcode for process in self.processes):
            connection.wait([process.sentinel for process in left])
            left = [process for process in left if process.exitcode is None]
        for process in left:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in left:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()

    def pids(self) -> list[int]:
        """Of the ranks."""
        if self.command is None:
            return [process.pid for process in self.processes]
        if not self.is_torchrun:
            return [self.command.pid]
        with contextlib.suppress(psutil.Error):
            return sorted(child.pid for child in psutil.Process(self.command.pid).children())
        return []

    def send(self, number: int, one: random.Random | None = None) -> None:
        """A signal to one rank, drawn at random, or to all. What stops a run goes to torchrun, as a shell would do."""
        pids = self.pids()
        if one is not None:
            pids = [one.choice(pids)] if pids else []
        elif self.command is not None and self.is_torchrun and number == signal.SIGTERM:
            pids = [self.command.pid]
        elif self.command is not None and self.is_torchrun:
            pids = [self.command.pid, *pids]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def lines(self) -> Iterator[str]:
        """What it prints, line by line."""
        timer = threading.Timer(PATIENCE_SECONDS, self.send, [signal.SIGKILL])
        timer.start()
        for line in self.stream:
            self.output.append(line.decode("utf-8", "replace"))
            yield self.output[-1]
        timer.cancel()
        self.stream.close()
        if self.command is not None:
            self.code = self.command.wait()
        else:
            self.agent.join()
            self.code = next((process.exitcode for process in self.processes if process.exitcode), 0)

    def finish(self) -> int:
        """Wait for its end; returns its exit status."""
        for _ in self.lines():
            pass
        return self.code

    @property
    def text(self) -> str:
        return "".join(self.output)


def write_small_world(folder: Path) -> None:
    """Write a small pocket world, of NUM_ROWS rows a table, into an empty base directory."""
    for path, content in pocket.make_world(1337, 100_000).items():
        if isinstance(content, list) and path.startswith("task_data"):
            content = content[:NUM_ROWS]
        elif path == "identity_conversations.jsonl":
            content = "".join(content.splitlines(keepends=True)[:NUM_ROWS])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(pocket.encode(path, content))
    write_source(folder / "base_data", {"source": "pocket"})


def make_world(folder: Path) -> Path:
    """A base directory with a small pocket world, a tokenizer and models to start from."""
    write_small_world(folder)
    runs = [("scripts.tok_train", {"vocab_size": 400})]
    runs += [(stage.script, {**stage.settings, "num_iterations": 6}) for name, stage in STAGES.items() if name != "rl"]
    for script, settings in runs:
        run = Run(folder, script, settings)
        if run.finish():
            raise UserError(f"the drill's world cannot be made, {script} failed: {run.text}")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Trials


class Result(NamedTuple):
    """What a run left."""

    weights: dict[str, torch.Tensor]
    losses: dict[int, float]


class Drill:
    """Trials in a world, and the runs that nobody touched, with which they are compared."""

    def __init__(self, base_dir: Path, quick: bool = True):
        self.base_dir, self.quick = base_dir, quick
        self.whole: dict[tuple[str, int], Result] = {}

    def start(
        self,
        name: str,
        tag: str,
        processes: int,
        fault: dict[str, Any] | None = None,
        max_restarts: int = 0,
        **settings: Any,
    ) -> Run:
        stage = STAGES[name]
        settings = {**stage.settings, stage.tag: tag, **settings} | ({} if name == "base" else {"model_tag": "d2"})
        return Run(self.base_dir, stage.script, settings, processes, fault, self.quick, max_restarts)

    def metrics(self, name: str, tag: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        with open(STAGES[name].run_dir(self.base_dir, tag) / "metrics.jsonl", encoding="utf-8") as f:
            return [json.loads(line) for line in f]

    def result(self, name: str, tag: str) -> Result:
        folder = STAGES[name].run_dir(self.base_dir, tag)
        weights = torch.load(folder / f"model_{STEPS:06d}.pt", weights_only=True)
        return Result(weights, {line["step"]: line["loss"] for line in self.metrics(name, tag) if "loss" in line})

    def reference(self, name: str, processes: int) -> Result:
        """Of the uninterrupted run."""
        if (name, processes) not in self.whole:
            run = self.start(name, f"whole-{processes}", processes)
            if run.finish():
                raise UserError(f"{name} with {processes} processes does not even run undisturbed: {run.text}")
            self.whole[name, processes] = self.result(name, f"whole-{processes}")
        return self.whole[name, processes]

    def trial(self, name: str, processes: int, fault: str, seed: str) -> str:
        """Hit a run and give its command again; returns what was lost, or '' where it survived."""
        expected = self.reference(name, processes)
        rng = random.Random(seed)
        for attempt in range(5):
            tag = f"{fault}-{processes}-{seed.replace('/', '-')}-{attempt}"
            folder = STAGES[name].run_dir(self.base_dir, tag)
            if (hit := self.hit(name, processes, fault, tag, rng)) is not None:
                break  # else it was over before the fault happened
        else:
            return "the fault never happened in time"
        problem, reached, output = hit
        if problem:
            return f"{problem}: {output}"
        found = whole_checkpoints(folder)
        newest = max(found, default=0)
        redone = reached - newest
        if redone > SAVE_EVERY * (2 if fault in ("cut_checkpoint", "nan_weight", "exploding") else 1):
            return f"step {reached} was reached and step {newest} is the last that is left: {output}"
        again = self.start(name, tag, processes)
        if again.finish():
            return f"the same command failed with status {again.code}: {again.text}"
        if newest and f"resumed from step {newest} " not in again.text:
            return f"it did not resume from step {newest}: {again.text}"
        found = self.result(name, tag)
        shutil.rmtree(folder)
        if found.losses != expected.losses:
            return f"other losses: {found.losses}, {expected.losses} were expected"
        differing = [key for key in expected.weights if not torch.equal(expected.weights[key], found.weights[key])]
        return f"other weights: {differing}" if differing else ""

    def hit(self, name: str, processes: int, fault: str, tag: str, rng: random.Random) -> tuple[str, int, str] | None:
        """(problem or '', last step that was seen, output) of a run that is hit; None where it was too late."""
        # Without a checkpoint a run on less data would be a new run, and an only one that is cut ends in a question
        first = {"lost_shard": SAVE_EVERY, "cut_checkpoint": 2 * SAVE_EVERY}.get(fault, 0)
        step, pause = rng.randrange(first, STEPS - 2), rng.random() * 0.02
        inner = None
        if fault in INNER_FAULTS:
            inner = {"fault": fault, "step": step, "rank": rng.randrange(processes), "seed": str(rng.random())}
        run = self.start(name, tag, processes, inner, max_restarts=3 if fault == "kill_restart" else 0)
        folder = STAGES[name].run_dir(self.base_dir, tag)
        shard, reached, is_hit = Path(), 0, inner is not None
        for line in run.lines():
            match = re.match(r"step +(\d+)/", line)
            reached = int(match[1]) if match else reached
            if match and not is_hit and reached > step:
                is_hit = True
                time.sleep(pause)
                if fault in ("sigterm", "sigint"):
                    run.send(signal.SIGTERM if fault == "sigterm" else signal.SIGINT)
                elif fault in ("kill_one", "kill_restart"):
                    run.send(signal.SIGKILL, one=rng)
                elif fault in ("kill_all", "cut_checkpoint"):
                    run.send(signal.SIGKILL)
                elif fault == "full_disk":
                    limit = rng.randrange(1000, (folder / "metrics.jsonl").stat().st_size + 60_000)
                    with contextlib.suppress(ProcessLookupError):
                        resource.prlimit(run.pids()[0], resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                elif fault == "lost_shard":
                    shard = self.hide_shard(name, rng)
                    run.send(signal.SIGKILL)
        problem = ""
        if fault == "lost_shard" and is_hit:
            without = self.start(name, tag, processes)
            code = without.finish()
            shard.with_suffix(".hidden").rename(shard)
            is_named = re.search(r"error: .*(shard_\d+\.parquet|" + re.escape(str(shard.parent)) + ")", without.text)
            if code == 0 or not is_named or "Traceback" in without.text:
                problem, run.output = f"status {code} without {shard}", without.output
        if not is_hit or (run.code == 0 and fault != "kill_restart"):
            return None
        if fault == "kill_restart":
            return ("" if run.code == 0 else "torchrun did not bring it through"), reached, run.text
        if fault == "cut_checkpoint":
            cut_newest(folder, rng)
        newest = max(whole_checkpoints(folder), default=0)
        ends_itself = processes == 1 or self.quick  # torchrun shows a traceback of its own
        if "Traceback" in run.text and ends_itself and fault != "loader_raises" and not problem:
            problem = "a traceback"
        if fault in ("sigterm", "sigint") and f"stopped at step {newest};" not in run.text:
            problem = "it did not save before it left"
        if fault in ("nan_weight", "exploding"):
            reached = min(reached, step + 1)  # what was done after it is worth nothing
            advice = f"last good checkpoint is step {newest} " if newest else "there is no checkpoint yet"
            if advice not in run.text:
                problem = "it did not name the last good checkpoint"
        return problem, reached, run.text

    def hide_shard(self, name: str, rng: random.Random) -> Path:
        """Rename a file of a stage's data; returns the path that it had."""
        own = {"base": "base_data/*.parquet", "rl": "task_data/pocket--PocketMath/*/practice/*.parquet"}
        path = rng.choice(sorted(self.base_dir.glob(own.get(name, "task_data/pocket--*/*/train/*.parquet"))))
        path.rename(path.with_suffix(".hidden"))
        return path


def is_possible(fault: str, name: str) -> bool:
    """Whether a fault can be told at a stage: reinforcement learning has no loss that could explode."""
    return (fault, name) != ("exploding", "rl")


def whole_checkpoints(folder: Path) -> list[int]:
    """The steps whose files can be read to the end and hold finite weights; found without the code under test."""
    steps = []
    for path in sorted(folder.glob("meta_*.json")):
        step = path.stem.removeprefix("meta_")
        with contextlib.suppress(ValueError, OSError, RuntimeError, EOFError):
            json.loads(path.read_text(encoding="utf-8"))
            weights = torch.load(folder / f"model_{step}.pt", weights_only=True)
            torch.load(folder / f"optim_{step}.pt", weights_only=True)
            if not all(weight.isfinite().all() for weight in weights.values()):
                raise UserError(f"checkpoint {step} in {folder} has weights that are not finite")
            steps.append(int(step))
    return steps


def cut_newest(folder: Path, rng: random.Random) -> None:
    """Cut a file of the newest checkpoint at a random byte."""
    steps = [path.stem.removeprefix("meta_") for path in sorted(folder.glob("meta_*.json"))]
    if steps:
        path = folder / rng.choice([f"model_{steps[-1]}.pt", f"optim_{steps[-1]}.pt", f"meta_{steps[-1]}.json"])
        with open(path, "r+b") as f:
            f.truncate(rng.randrange(path.stat().st_size))


@user_errors
def main(config: Config) -> None:
    """Print a line a trial and the table; raises UserError where a trial was lost."""
    for names, known in ((config.stages, STAGES), (config.faults, FAULTS), (config.processes, "12345678")):
        unknown = set(names.split(",")) - set(known)
        if unknown:
            raise UserError(f"unknown: {', '.join(sorted(unknown))}; one or several of {', '.join(known)} are wanted")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([stage.script for stage in STAGES.values()] + SLOW_IMPORTS)
    began = time.monotonic()
    counts: Counter[tuple[str, str, int, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="nanochat-drill-") as folder:
        drill = Drill(make_world(Path(folder)), config.quick)
        for fault in config.faults.split(","):
            for name in (name for name in config.stages.split(",") if is_possible(fault, name)):
                for processes in map(int, config.processes.split(",")):
                    for number in range(config.trials):
                        lost = drill.trial(name, processes, fault, f"{config.seed}/{number}")
                        counts[fault, name, processes, "lost" if lost else "survived"] += 1
                        print(f"{fault}, {name}, {processes} processes: {lost or 'survived'}", flush=True)
    print(f"\n{'fault':<16} {'stage':<6} {'processes':>9} {'tried':>6} {'survived':>9} {'lost':>5}")
    for fault, name, processes in dict.fromkeys(key[:3] for key in counts):
        survived, lost = (counts[fault, name, processes, outcome] for outcome in ("survived", "lost"))
        print(f"{fault:<16} {name:<6} {processes:>9} {survived + lost:>6} {survived:>9} {lost:>5}")
    num_lost = sum(number for key, number in counts.items() if key[3] == "lost")
    print(f"{sum(counts.values())} tried, {num_lost} lost, in {format_seconds(time.monotonic() - began)}")
    if num_lost:
        raise UserError(f"{num_lost} of {sum(counts.values())} trials were lost")


if __name__ == "__main__":
    if CHILD in os.environ:
        run_script(**json.loads(os.environ[CHILD]))
    else:
        main(parse(Config))
