"""The plan of a run: processes, batch sizes, and the memory that they are estimated to need."""

import pytest
import torch

from nanochat.common import UserError
from nanochat.gpt import GPT, config_from_depth
from nanochat.plan import (
    ACTIVATION_BYTES,
    Config,
    choose_batch_size,
    count_parameters,
    count_processes,
    count_shards,
    estimate_memory,
    make_plan,
)

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


def test_activations_are_estimated_as_autograd_counts_them():
    config = config_from_depth(4, 512, 64, aspect_ratio=16, head_dim=16)
    model = GPT(config)
    model.init_weights()
    model.transformer.wte.bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept_bytes(batch: int) -> int:
        kept = {}  # address -> storage; keeping it alive keeps the address its own

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                model.hidden(torch.zeros(batch, config.sequence_len, dtype=torch.int64))
        return sum(storage.nbytes() for storage in kept.values())

    tokens = 4 * config.sequence_len
    measured = (kept_bytes(8) - kept_bytes(4)) / (tokens * config.n_layer * config.n_embd)
    assert ACTIVATION_BYTES == pytest.approx(measured, rel=0.25)  # not compiled here, which keeps somewhat more
