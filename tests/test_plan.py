"""The plan of a run: processes, batch sizes, and the memory that they are estimated to need."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from nanochat import plan
from nanochat.common import PEAK_FLOPS, UserError
from nanochat.gpt import GPT, config_from_depth
from nanochat.plan import (
    ACTIVATION_BYTES,
    GPU_MEMORY,
    Config,
    choose_batch_size,
    count_parameters,
    count_processes,
    count_shards,
    describe_run,
    estimate_memory,
    fit_batch_size,
    make_plan,
    parse_gpus,
)
from scripts import base_train

H100, RTX4090, SMALL = int(85.0e9), int(25.3e9), int(12.5e9)  # bytes that CUDA reports
D20 = config_from_depth(20, 65_536, 2048)


def test_the_published_run_fits_eight_h100s_with_32_rows_each():
    assert count_parameters(D20) == 560_988_160
    assert make_plan(Config(), 8, H100) == (8, 32)


def test_smaller_gpus_take_fewer_rows():
    assert make_plan(Config(), 1, RTX4090)[1] < make_plan(Config(), 1, H100)[1]
    batch_size = choose_batch_size(D20, 1, RTX4090)
    assert estimate_memory(D20, batch_size, 1) <= RTX4090 < estimate_memory(D20, 2 * batch_size, 1)


def test_a_model_that_does_not_fit_is_refused_with_the_largest_that_does():
    with pytest.raises(UserError, match=r"depth 20 needs about [\d.]+ GiB .*`DEPTH=\d+ NUM_SHARDS=\d+ bash") as error:
        make_plan(Config(), 1, SMALL)
    depth = int(str(error.value).split("DEPTH=")[1].split()[0])
    assert make_plan(Config(depth=depth), 1, SMALL)[1] >= 1
    with pytest.raises(UserError):
        make_plan(Config(depth=depth + 1), 1, SMALL)


def test_where_nothing_fits_the_pocket_recipe_is_named():
    with pytest.raises(UserError, match="what fits: `RECIPE=pocket bash speedrun.sh`"):
        make_plan(Config(), 1, 2**20)


def test_processes_divide_the_batch_and_the_data_lanes():
    assert [count_processes(n) for n in (0, 1, 2, 3, 4, 6, 8, 16)] == [1, 1, 2, 2, 4, 4, 8, 8]


def test_depth_20_wants_the_shards_that_speedrun_fetches():
    assert 216 < count_shards(D20) <= 240


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_estimated_as_autograd_counts_them(dtype):
    config = config_from_depth(4, 512, 64, aspect_ratio=16, head_dim=16)
    model = GPT(config)
    model.init_weights()
    is_cast = dtype == torch.bfloat16
    model.transformer.wte.to(dtype)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), model.cos, model.sin)}

    def kept_bytes(batch: int) -> int:
        kept = {}  # address -> storage; keeping it alive keeps the address its own

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype) if is_cast else contextlib.nullcontext():
                model.hidden(torch.zeros(batch, config.sequence_len, dtype=torch.int64))
        return sum(storage.nbytes() for storage in kept.values())

    tokens = 4 * config.sequence_len
    measured = (kept_bytes(8) - kept_bytes(4)) / (tokens * config.n_layer * config.n_embd)
    # not compiled here, which in bfloat16 keeps somewhat more
    assert ACTIVATION_BYTES[dtype] == pytest.approx(measured, rel=0.25 if is_cast else 0.15)


TRAIN_ONCE = """
import json, sys, torch
from nanochat.gpt import GPT, config_from_depth
from nanochat.train import accumulate_gradients, step_optimizers
torch.set_num_threads(1)

def memory(name):
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))

def grown_by(depth, vocab_size, sequence_len, rows):
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
        f.write("5")  # the peak starts anew
    before = memory("VmRSS")
    with torch.device("meta"):
        model = GPT(config_from_depth(depth, vocab_size, sequence_len))
    model.to_empty(device="cpu")
    model.init_weights()
    optimizers = model.setup_optimizers()
    batches = [(ids[:, :-1], ids[:, 1:]) for ids in torch.randint(vocab_size, (2, rows, sequence_len + 1))]
    accumulate_gradients(model, batches, 2 * rows * sequence_len, torch.device("cpu"))
    step_optimizers(optimizers, 1.0, 0.95, 1.0)
    return memory("VmHWM") - before

grown_by(1, 512, 32, 1)  # what torch loads on the way
print(json.dumps([grown_by(*sizes) for sizes in json.loads(sys.argv[1])]))
"""
# depth, vocabulary, context, rows: the backward pass needs the most in all but the third, there the optimizer step
MEASURED = [(2, 4096, 256, 4), (4, 4096, 256, 4), (6, 512, 64, 1), (2, 32_768, 64, 1)]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_the_estimate_is_what_a_training_step_takes_on_a_cpu():
    """Measured 0.86 to 1.0 times the estimate. With a heap without holes: each tensor by mmap."""
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN_ONCE, json.dumps(MEASURED)]
    result = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", timeout=240)
    assert result.returncode == 0, result.stderr
    for (depth, vocab_size, sequence_len, rows), measured in zip(MEASURED, json.loads(result.stdout), strict=True):
        config = config_from_depth(depth, vocab_size, sequence_len)
        estimate = estimate_memory(config, rows, 1, "cpu", torch.float32)
        assert 0.8 * estimate < measured < 1.14 * estimate, (depth, measured / estimate)


def test_every_depth_is_estimated_and_takes_more_than_the_one_before():
    needed = [estimate_memory(config_from_depth(depth, 65_536, 2048), 4, 8) for depth in range(1, 33)]
    assert needed == sorted(set(needed))
    assert estimate_memory(D20, 4, 8, "cuda", torch.float32) > 1.15 * needed[19]  # no bfloat16 there


# ---------------------------------------------------------------------------------------------------------------------
# --device_batch_size=-1


@pytest.mark.parametrize(("rows", "fits"), [(64, 32), (24, 24), (20, 20), (7, 7), (1, 1), (66, 22)])
def test_the_largest_batch_divides_the_rows_of_a_step(rows, fits):
    assert choose_batch_size(D20, 8, H100, rows) == fits


def test_the_automatic_batch_size_is_that_of_the_smallest_device(monkeypatch):
    config, cpu = config_from_depth(4, 4096, 256), torch.device("cpu")
    needed = estimate_memory(config, 8, 2, "cpu", torch.float32)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(plan, "gather_objects", lambda own: [own, 2 * needed])
    monkeypatch.setattr(plan, "usable_memory_bytes", lambda device: 100 * needed)
    assert fit_batch_size(-1, config, 2 * 32 * 256, cpu) == 8  # half of the memory is the heap's
    assert fit_batch_size(-1, config, 2 * 12 * 256, cpu) == 6
    assert fit_batch_size(5, config, 2 * 32 * 256, cpu) == 5
    monkeypatch.setattr(plan, "gather_objects", lambda own: [own, 0])
    assert fit_batch_size(-1, config, 2 * 32 * 256, cpu) == 1


# ---------------------------------------------------------------------------------------------------------------------
# --plan=1


def test_the_plan_of_the_published_run_has_its_figures(base_dir, capsys, monkeypatch):
    """Without data, tokenizer and GPUs."""
    monkeypatch.delenv("NANOCHAT_GPU_PRICE", raising=False)
    assert base_train.main(base_train.Config(plan=True, plan_gpus="8xH100,1x4090", device_batch_size=-1)) == {}
    output = capsys.readouterr().out
    for figure in ("560,988,160 parameters", "21,400 steps of 524,288 tokens", "11.2B in all", "3.92e+19 FLOPs"):
        assert figure in output
    assert "8 x H100: 3h03m, $73; 8 processes x 1 micro-batches x 32 rows" in output
    assert "1 x 4090: 146h33m, $73; 1 processes x 64 micro-batches x 4 rows" in output
    assert "assumed: 45% of the peak FLOPs" in output and "$3.00 (H100), $0.50 (4090)" in output
    assert not (base_dir / "base_checkpoints").exists()


def test_the_plan_says_what_does_not_fit_and_takes_ones_own_price(monkeypatch):
    with torch.device("meta"):
        model = GPT(D20)
    monkeypatch.setenv("NANOCHAT_GPU_PRICE", "1")
    line = describe_run(model, 21_400, 524_288, 32, 8, "2x4090")[2]
    assert "2 x 4090: 73h16m, $147;" in line and "do not fit 22.4" in line


def test_gpus_are_a_list_of_counts_and_names():
    assert parse_gpus("8xH100, 4090,2xA100") == [(8, "H100"), (1, "4090"), (2, "A100")]
    assert all(name in PEAK_FLOPS for name in GPU_MEMORY)
    for wrong in ("", "8xH10", "0xH100", "axH100", "H100x8"):
        with pytest.raises(UserError, match="8xH100 is wanted"):
            parse_gpus(wrong)
