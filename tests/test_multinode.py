"""Several hosts: who writes where, what happens without a shared disk, what is sent, and the launchers in runs/.

The hosts of the longest test are network namespaces that are joined by a virtual cable, so nothing but what crosses it
connects them. Making them takes root; elsewhere that test is skipped. The ranks of the others are on one host and are
told that they are on several.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ByteTokenizer, random_tokens, randomized_model, write_shards
from test_distributed import run_ranks

from dev.bench_scaling import counted_collectives, exchanged_bytes, sent_bytes
from nanochat import common
from nanochat.checkpoint_manager import complete_steps, find_common_step, load_model, save_checkpoint
from nanochat.common import Runtime, UserError
from nanochat.dataloader import tokenizing_distributed_data_loader
from nanochat.report import get_report
from nanochat.train import MetricsLog, accumulate_gradients, step_optimizers
from scripts import base_train, tok_train

ROOT = Path(__file__).parent.parent


def hosts(*folders: Path) -> list[dict[str, str]]:
    """The environments of ranks that are on as many hosts, with these base directories."""
    return [{"NANOCHAT_BASE_DIR": str(folder), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for folder in folders]


# ---------------------------------------------------------------------------------------------------------------------
# Who writes


def writes(runtime: Runtime) -> bool:
    return common.is_writer()


def test_one_rank_writes_in_each_base_directory(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folders, expected in (
        ((a, a, a), [True, False, False]),
        ((a, b, b), [True, True, False]),
        ((a, b, a), [True, True, False]),
    ):
        assert run_ranks(3, writes, each=hosts(*folders)) == expected
        assert not list(a.iterdir()) and (b not in folders or not list(b.iterdir()))


def test_on_one_host_and_without_a_process_group_rank_0_writes(monkeypatch):
    assert common.is_writer()
    assert run_ranks(2, writes) == [True, False]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not common.is_writer()


def leave_results(runtime: Runtime) -> bool:
    """What a stage leaves behind; returns whether the body of on_rank0_first had been run before on this disk."""
    folder = common.get_base_dir() / "base_checkpoints" / "d2"
    metrics = MetricsLog(folder)
    metrics.log(1, loss=2.0)
    save_checkpoint(folder, 1, {"w": torch.ones(3)}, {"m": torch.ones(3)}, {})
    get_report().log("base_train", [{"loss": 2.0}])
    with common.on_rank0_first():
        mark = common.get_base_dir() / "fetched"
        was_there = mark.exists()
        mark.touch()
    return was_there


def test_without_a_shared_disk_every_host_has_all_results(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_ranks(3, leave_results, each=hosts(a, b, b)) == [False, False, True]
    for folder in (a, b):
        checkpoints = folder / "base_checkpoints" / "d2"
        assert complete_steps(checkpoints) == [1]
        assert (checkpoints / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1, "loss": 2.0}\n'
        assert (folder / "report" / "base_train.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Replicas that differ


def common_step(runtime: Runtime, folder_name: str) -> Any:
    try:
        return find_common_step(common.get_base_dir() / folder_name)
    except UserError as error:
        return str(error)


def test_a_run_goes_on_from_the_last_step_that_no_host_lacks(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, steps in ((a, (10, 20, 30)), (b, (10, 20))):
        for step in steps:
            save_checkpoint(folder / "both", step, {"w": torch.ones(1)}, None, {})
    save_checkpoint(a / "one", 10, {"w": torch.ones(1)}, None, {})
    assert run_ranks(2, common_step, "both", each=hosts(a, b)) == [20, 20]
    assert run_ranks(2, common_step, "neither", each=hosts(a, b)) == [None, None]
    for message in run_ranks(2, common_step, "one", each=hosts(a, b)):
        assert "no checkpoint in common" in message and "copy" in message and "--resume=never" in message


def metadata_of_others(runtime: Runtime, folder: Path) -> list[bool]:
    """Save; rank 1 is slow. Whether each host had the metadata when rank 1 had written nothing yet."""
    save = torch.save
    early = []

    def slow(data: Any, f: Any) -> None:
        if runtime.rank == 1:
            time.sleep(0.5)
            early.append((folder / "a" / "meta_000010.json").exists())
        save(data, f)

    torch.save = slow
    save_checkpoint(common.get_base_dir(), 10, {"w": torch.ones(1)}, None, {})
    return early


def test_a_checkpoint_becomes_complete_on_all_hosts_at_once(tmp_path):
    """A host that was killed while it saved then lacks what the others lack, too."""
    assert run_ranks(2, metadata_of_others, tmp_path, each=hosts(tmp_path / "a", tmp_path / "b")) == [[], [False]]
    assert complete_steps(tmp_path / "a") == complete_steps(tmp_path / "b") == [10]


def first_batch(runtime: Runtime) -> str:
    try:
        next(tokenizing_distributed_data_loader(2, 16, "train", ByteTokenizer(), 2))
        return "a batch"
    except UserError as error:
        return str(error)


def test_other_shards_on_another_host_are_an_error_on_all(tmp_path):
    texts = [[f"{i} and {j}" for j in range(8)] for i in range(3)]
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write_shards(a, texts)
    write_shards(b, texts)
    write_shards(c, texts[1:])
    assert run_ranks(2, first_batch, each=hosts(a, b)) == ["a batch"] * 2
    for message in run_ranks(2, first_batch, each=hosts(a, c)):
        assert "differ in the shards of the train split" in message and "copy" in message


def loaded_step(runtime: Runtime, step: int) -> Any:
    try:
        return load_model("base", runtime.device, "eval", step=step + runtime.rank)[2]["step"]
    except UserError as error:
        return str(error)


def test_another_checkpoint_on_another_host_is_an_error_on_all(tmp_path, tokenizer):
    model = randomized_model()
    meta = {"model_config": vars(model.config)}
    for name in ("a", "b"):
        shutil.copytree(tokenizer, tmp_path / name / "tokenizer")
        for step in (1, 2):
            save_checkpoint(tmp_path / name / "base_checkpoints" / "d2", step, model.state_dict(), None, meta)
    assert run_ranks(2, loaded_step, -2, each=hosts(tmp_path / "a", tmp_path / "b")) == [2, 2]
    for message in run_ranks(2, loaded_step, 1, each=hosts(tmp_path / "a", tmp_path / "b")):
        assert "differ in the checkpoints" in message


# ---------------------------------------------------------------------------------------------------------------------
# Restarts on one host


def meet_again(runtime: Runtime) -> float:
    """Meet once more, over the store that the ranks of this test have met over already."""
    common.compute_cleanup()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    common.compute_init("cpu")
    return common.all_reduce_sum(1.0)


def test_another_attempt_is_not_misled_by_what_the_first_left_in_the_store():
    assert run_ranks(2, meet_again) == [2.0, 2.0]


# ---------------------------------------------------------------------------------------------------------------------
# What is sent


def sent_in_a_step(runtime: Runtime) -> tuple[int, int]:
    """Bytes that this rank sends in a training step of the random tiny model: (counted, of the formula)."""
    model = randomized_model()
    optimizers = model.setup_optimizers()
    ids = random_tokens(model.config, 1, 9, seed=runtime.rank)
    with counted_collectives() as counts:
        accumulate_gradients(model, [(ids[:, :-1], ids[:, 1:])], 8 * runtime.world_size, runtime.device)
        step_optimizers(optimizers, 1.0, 0.95, grad_clip=1.0)
    scalars = (2 * 4, 4)  # the loss and whether memory ran out; the norm
    assert counts["all_reduce"] == sum(2 * n * (runtime.world_size - 1) // runtime.world_size for n in scalars)
    exchanged = sum(exchanged_bytes(model, optimizers, runtime.world_size).values())
    return counts["reduce_scatter"] + counts["all_gather"], sent_bytes(exchanged, runtime.world_size)


@pytest.mark.parametrize(
    ("world_size", "values"),
    # wte and lm_head of 320 x 32; two layers of 2 x (32 x 32), 2 x (16 x 32), 128 x 32 and 32 x 128
    [(2, 2 * 10_240 + 4 * 1024 + 4 * 512 + 4 * 4096), (3, 2 * 10_242 + 6 * 1024 + 6 * 512 + 6 * 4096)],
)
def test_a_step_sends_what_the_formula_says(world_size, values):
    expected = 2 * 4 * values * (world_size - 1) // world_size
    assert run_ranks(world_size, sent_in_a_step) == [(expected, expected)] * world_size


# ---------------------------------------------------------------------------------------------------------------------
# Recipes on two hosts

RECIPE = """
set -euo pipefail
source {stage_sh}
on_all_gpus() {{
    echo "$HOST trains $*" >>"$LOG"
    echo "$RANDOM $RANDOM" >"$NANOCHAT_BASE_DIR/meta_$HOST.json"
}}
stage alone "" "alone" sh -c 'echo "$HOST is alone" >>"$LOG"; echo >"$NANOCHAT_BASE_DIR/alone"'
stage train "" "meta_*.json" on_all_gpus --resume=auto
"""


def start_recipe(folder: Path, host: int, base: Path, **environment: str) -> subprocess.Popen:
    recipe = folder / f"recipe{host}.sh"  # a file of its own: bash may still be reading that of another host
    recipe.write_text(RECIPE.format(stage_sh=ROOT / "runs" / "stage.sh"), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "HOME": "/", "LOG": str(folder / "log"), "HOST": str(host), "NANOCHAT_BASE_DIR": str(base)}
    return subprocess.Popen(["bash", recipe], env={**env, **environment}, start_new_session=True)


def run_recipe_on_two_hosts(folder: Path, *bases: Path) -> list[str]:
    """What was run, in any order, by a recipe that torchrun has started on two hosts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (folder / "log").write_text("", encoding="utf-8")
    torchrun = {"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        start_recipe(folder, host, base, GROUP_RANK=str(host), RANK=str(host), **torchrun)
        for host, base in enumerate(bases)
    ]
    try:
        assert [process.wait(timeout=120) for process in started] == [0, 0]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return sorted((folder / "log").read_text(encoding="utf-8").splitlines())


def test_hosts_that_share_a_disk_run_what_is_one_process_once(tmp_path):
    ran = run_recipe_on_two_hosts(tmp_path, tmp_path / "base", tmp_path / "base")
    assert ran == ["0 is alone", "0 trains --resume=auto", "1 trains --resume=auto"]
    assert sorted(path.name for path in (tmp_path / "base" / "stages").iterdir()) == ["alone.done", "train.done"]


def test_hosts_with_disks_of_their_own_train_together_until_all_have_finished(tmp_path):
    """The first host has finished everything, the second one comes with an empty disk."""
    assert start_recipe(tmp_path, 0, tmp_path / "a").wait(timeout=60) == 0
    ran = run_recipe_on_two_hosts(tmp_path, tmp_path / "a", tmp_path / "b")
    assert ran == ["0 trains --resume=auto", "1 is alone", "1 trains --resume=auto"]
    for name in ("a", "b"):
        assert sorted(path.name for path in (tmp_path / name / "stages").iterdir()) == ["alone.done", "train.done"]


# ---------------------------------------------------------------------------------------------------------------------
# The launchers


def launch(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{environment.pop('BIN', '')}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"HOME": "/", "PATH": path, "VIRTUAL_ENV": sys.prefix, **environment}
    command = ["bash", str(ROOT / "runs" / script), *args]
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=60)


def stub(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("args", "environment", "message"),
    [
        ((), {"NUM_HOSTS": "2", "FIRST_HOST": "127.0.0.1"}, "what is to run"),
        (("speedrun.sh",), {"FIRST_HOST": "127.0.0.1"}, "set NUM_HOSTS and FIRST_HOST"),
        (("speedrun.sh",), {"NUM_HOSTS": "2", "FIRST_HOST": "127.0.0.1", "FRESH": "1"}, "FRESH=1 is for one host"),
        (("speedrun.sh",), {"NUM_HOSTS": "2", "FIRST_HOST": "no.such.host.invalid"}, "FIRST_HOST=no.such.host.invalid"),
        (("speedrun.sh",), {"NUM_HOSTS": "2", "FIRST_HOST": "localhost"}, "which no other host can reach"),
    ],
)
def test_a_wrong_call_is_one_line(args, environment, message):
    done = launch("multinode.sh", *args, **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_slurm_job_starts_multinode_on_its_hosts(tmp_path):
    """With stand-ins for the programs of Slurm."""
    stub(tmp_path, "scontrol", 'echo "$*" >>"$CALLS"; printf "node7\\nnode8\\n"')
    stub(tmp_path, "srun", 'echo "srun $* NUM_HOSTS=$NUM_HOSTS FIRST_HOST=$FIRST_HOST PORT=$PORT" >>"$CALLS"')
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456"}
    calls = {"CALLS": str(tmp_path / "calls"), "BIN": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT)}
    done = launch("slurm.sbatch", "-m", "scripts.base_loss", **job, **calls)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines() == [
        "show hostnames node[7-8]",
        "srun --kill-on-bad-exit=1 bash runs/multinode.sh -m scripts.base_loss NUM_HOSTS=2 FIRST_HOST=node7 PORT=23456",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Two hosts

STEPS = 150
SETTINGS = {
    "depth": 2,
    "aspect_ratio": 16,
    "head_dim": 16,
    "max_seq_len": 32,
    "device_batch_size": 4,
    "total_batch_size": 256,
    "num_iterations": STEPS,
    "data_lanes": 4,
    "core_metric_every": -1,
    "sample_every": -1,
    "eval_every": -1,
    "save_every": 10,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A base directory with three small shards and a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = random.Random(0)
    words = "the cat dog bird sees likes finds a red small old house tree river".split()
    write_shards(folder, [[" ".join(rng.choices(words, k=rng.randint(5, 40))) for _ in range(32)] for _ in range(3)], 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        tok_train.main(tok_train.Config(vocab_size=300))
    return folder


@pytest.fixture(scope="module")
def tokenizer(prepared) -> Path:
    return prepared / "tokenizer"


class Host:
    """A network namespace with an address of its own, and a base directory."""

    def __init__(self, number: int, base: Path):
        self.name, self.address, self.base = f"nanochat-{os.getpid()}-{number}", f"10.77.0.{number}", base

    def start(self, log: Path) -> subprocess.Popen:
        """The same command on each host; what it prints is appended to log."""
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            "NANOCHAT_BASE_DIR": str(self.base),
            "NUM_HOSTS": "2",
            "FIRST_HOST": "10.77.0.1",
            "PROCESSES": "1",
            "RENDEZVOUS": "keep_alive_interval=1,keep_alive_max_attempt=5",
        }
        stage = ["-m", "scripts.base_train", "--", *(f"--{name}={value}" for name, value in SETTINGS.items())]
        command = ["ip", "netns", "exec", self.name, "bash", str(ROOT / "runs" / "multinode.sh"), *stage]
        with open(log, "a", encoding="utf-8") as f:
            return subprocess.Popen(command, env=env, stdout=f, stderr=f)

    def kill(self) -> None:
        """kill -9 for every process on it."""
        for pid in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    @property
    def checkpoints(self) -> Path:
        return self.base / "base_checkpoints" / "d2"


def ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, encoding="utf-8").stdout


@pytest.fixture
def two_hosts(prepared, tmp_path) -> Iterator[list[Host]]:
    """Two hosts with a cable between them, each with a copy of the data and the tokenizer."""
    if shutil.which("ip") is None:
        pytest.skip("no ip is here, which makes hosts to test with (apt-get install iproute2)")
    pair = [Host(number, tmp_path / f"base{number}") for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        try:
            for host in pair:
                ip("netns", "add", host.name)
                stack.callback(ip, "netns", "del", host.name)
            ip("-n", pair[0].name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", pair[1].name)
            for host in pair:
                ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
                for interface in ("eth0", "lo"):
                    ip("-n", host.name, "link", "set", interface, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no hosts to test with can be made here: {error.stderr.strip()} (it takes root)")
        for host in pair:
            stack.callback(host.kill)
            shutil.copytree(prepared, host.base)
        yield pair


def train_on_ranks(runtime: Runtime) -> None:
    base_train.main.__wrapped__(base_train.Config(**SETTINGS))


def losses(checkpoints: Path) -> dict[int, float]:
    with open(checkpoints / "metrics.jsonl", encoding="utf-8") as f:
        return {line["step"]: line["loss"] for line in map(json.loads, f)}


@pytest.mark.slow
def test_a_host_that_is_killed_and_comes_back_changes_nothing(two_hosts, prepared, tmp_path):
    """Two hosts without a shared disk end in the losses and the weights of two processes on one host, bit for bit.

    One of them loses all its processes in the middle, and its newest checkpoint, as if it had just been saving it.
    """
    first, second = two_hosts
    running = [host.start(tmp_path / f"log{number}") for number, host in enumerate(two_hosts, 1)]
    log = tmp_path / "log1"
    deadline = time.monotonic() + 120
    while not (second.checkpoints / "meta_000040.json").exists():
        assert time.monotonic() < deadline and running[0].poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.02)
    second.kill()
    saved = complete_steps(second.checkpoints)
    (second.checkpoints / f"meta_{saved[-1]:06d}.json").unlink()
    again = second.start(tmp_path / "log2")
    assert [process.wait(timeout=180) for process in (running[0], again)] == [0, 0], log.read_text(encoding="utf-8")
    assert f"resumed from step {saved[-2]} " in log.read_text(encoding="utf-8")

    alone = tmp_path / "alone"
    shutil.copytree(prepared, alone)
    run_ranks(2, train_on_ranks, each=[{"NANOCHAT_BASE_DIR": str(alone)}] * 2)
    expected = alone / "base_checkpoints" / "d2"
    weights = torch.load(expected / f"model_{STEPS:06d}.pt", weights_only=True)
    for host in two_hosts:
        assert losses(host.checkpoints) == losses(expected)
        found = torch.load(host.checkpoints / f"model_{STEPS:06d}.pt", weights_only=True)
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
