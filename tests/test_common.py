"""What everything stands on, on one process: errors, devices, collectives, output, files."""

import contextlib
import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import common
from nanochat.common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    "error", [UserError("no shards:\n  run this"), FileNotFoundError(2, "No such file", "a.txt"), OSError("disk full")]
)
def test_what_a_user_can_mend_ends_in_one_line_and_status_1(error, capsys):
    @common.user_errors
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_info:
        main()
    output = capsys.readouterr()
    assert exit_info.value.code == 1
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert all(word in output.err for word in str(error).split())


def test_an_interrupt_ends_in_status_130(capsys):
    @common.user_errors
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_defect_keeps_its_traceback():
    @common.user_errors
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        main()


def test_the_traceback_of_a_user_error_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("NANOCHAT_TRACEBACK", "1")

    @common.user_errors
    def main():
        raise UserError("wrong")

    with pytest.raises(UserError):
        main()


def test_a_decorated_main_returns_its_value_and_passes_arguments():
    @common.user_errors
    def main(a: int, b: int = 0) -> int:
        """Add."""
        return a + b

    assert main(1, b=2) == 3 and main.__doc__ == "Add."


# ---------------------------------------------------------------------------------------------------------------------
# The base directory


def test_the_base_directory_is_the_exported_one_and_is_created(base_dir):
    assert not base_dir.exists()
    assert common.get_base_dir() == base_dir and base_dir.is_dir()


@pytest.mark.parametrize("value", [None, ""])
def test_without_an_exported_one_it_is_in_the_home_directory(value, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    if value is not None:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", value)
    assert common.get_base_dir() == tmp_path / ".cache" / "nanochat"


def test_a_tilde_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/data")
    assert common.get_base_dir() == tmp_path / "data"


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices, dtypes


def test_importing_does_no_work():
    """No output, no folder, no random number drawn, no CUDA context, and none of the slow optional packages."""
    code = (
        "import sys, torch; before = torch.get_rng_state(); import nanochat.common, nanochat.configurator;"
        "assert torch.equal(before, torch.get_rng_state()); assert not torch.cuda.is_initialized();"
        "assert 'wandb' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not Path(os.environ["NANOCHAT_BASE_DIR"]).exists()


def test_one_process_without_torchrun():
    assert common.get_dist_info() == (False, 0, 0, 1)
    runtime = common.compute_init("cpu")
    ddp, rank, local_rank, world_size, device = runtime
    assert (ddp, rank, local_rank, world_size, device) == (False, 0, 0, 1, torch.device("cpu"))
    assert runtime.world_size == 1 and not common.is_distributed()


def test_torchruns_environment_says_who_this_is(monkeypatch):
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert common.get_dist_info() == (True, 5, 1, 8)


def test_compute_init_seeds_torch():
    draws = []
    for seed in (1, 1, 2):
        common.compute_init("cpu", seed=seed)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] != draws[2]


def test_a_device_that_is_not_there_is_a_user_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device_type=cuda"):
        common.compute_init("cuda")
    with pytest.raises(UserError, match="cuda, mps, cpu"):
        common.compute_init("tpu")


def test_the_best_device_is_found(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert common.autodetect_device_type() == best


def test_cleanup_without_a_process_group_does_nothing():
    common.compute_cleanup()


def test_collectives_are_the_identity_on_one_process():
    x = torch.arange(6.0).view(3, 2)
    assert common.all_reduce_sum(x) is x and common.all_reduce_mean(x) is x
    assert common.all_reduce_sum(3) == 3 and common.all_reduce_mean(0.5) == 0.5
    assert common.any_rank(True) is True and common.any_rank(False) is False
    assert common.gather_objects({"a": 1}) == [{"a": 1}]
    assert common.reduce_scatter_mean(x)() is x
    assert common.all_gather_shares(x) is x
    common.barrier()
    with common.on_rank0_first():
        pass
    torch.testing.assert_close(x, torch.arange(6.0).view(3, 2))


def test_no_bf16_and_no_autocast_on_a_cpu():
    assert common.compute_dtype("cpu") == common.compute_dtype(torch.device("mps")) == torch.float32
    with common.autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_on_cuda_devices_that_have_it(has_bf16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: has_bf16)
    assert common.compute_dtype("cuda") == common.compute_dtype(torch.device("cuda", 1)) == dtype


@pytest.mark.parametrize(("setting", "on_cuda", "on_cpu"), [(-1, True, False), (1, True, True), (0, False, False)])
def test_models_are_compiled_on_cuda_unless_a_setting_says_otherwise(setting, on_cuda, on_cpu, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: ("compiled", model))
    for device, is_compiled in (("cuda", on_cuda), ("cpu", on_cpu)):
        model = SimpleNamespace(get_device=lambda device=device: torch.device(device))
        assert common.compile_model(model, setting) == (("compiled", model) if is_compiled else model)


def test_only_what_is_bound_for_cuda_is_pinned(monkeypatch):
    pinned = torch.ones(1)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    x = torch.zeros(2)
    assert common.pin(x, "cpu") is common.pin(x, torch.device("mps")) is x
    assert common.pin(x, "cuda") is common.pin(x, torch.device("cuda", 1)) is pinned


ON_A_GPU = """
import torch
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, lambda device: None
from nanochat import common
assert common.compute_init("cuda").device == torch.device("cuda", 0)
assert torch.get_float32_matmul_precision() == "high"
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.parametrize(
    ("environ", "settings"),
    [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64")],
    ids=["by default", "the user's own"],
)
def test_the_cuda_allocator_is_set_before_it_starts_unless_the_user_did(environ, settings):
    """Asked of torch itself: that importing it and looking for a GPU is not yet a start."""
    clean = {name: value for name, value in os.environ.items() if name not in common.ALLOCATOR_VARIABLES}
    command = [sys.executable, "-c", ON_A_GPU]
    result = subprocess.run(command, env={**clean, **environ}, capture_output=True, encoding="utf-8", timeout=120)
    assert (result.returncode, result.stdout) == (0, settings + "\n"), result.stderr


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_a_part_of_the_name(name, peak):
    assert common.peak_flops(name) == peak


def test_peak_memory_is_in_bytes_and_sees_what_was_in_use():
    before = common.peak_memory_bytes("cpu")
    torch.ones(64 * 2**20)  # 256 MiB, touched
    assert 128 * 2**20 < common.peak_memory_bytes("cpu") < before + 1024 * 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Output


def test_print0_prints_on_rank_0_alone(capsys, monkeypatch):
    common.print0("one", 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    common.print0("two")
    assert capsys.readouterr().out == "one 1\n"


def test_a_dummy_run_touches_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    run = common.init_wandb("dummy", "nanochat", {"depth": 2})
    run.log({"loss": 1.0}, step=3)
    run.finish()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(common.init_wandb("real", "nanochat", {}), common.DummyWandb)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0s"), (7, "7s"), (59.6, "1m00s"), (187, "3m07s"), (3599.7, "1h00m"), (11220, "3h07m")]
)
def test_durations(seconds, text):
    assert common.format_seconds(seconds) == text


def test_progress_shows_share_rate_and_remaining_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = common.Progress(8_000_000, "download", unit="B")
    now[0] += 2
    progress.update(2_000_000)
    assert progress.line() == "download: 2.0M/8.0M B (25%), 1.0M B/s, 6s left"


def test_progress_in_a_log_is_a_line_every_few_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = common.Progress(10, "work", every_seconds=5.0)
    for _ in range(10):
        now[0] += 2
        progress.update()
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["3/10", "6/10", "9/10", "10/10"]
    assert all("\r" not in line for line in lines)


def test_progress_of_short_work_and_of_other_ranks_prints_nothing(monkeypatch, capsys):
    progress = common.Progress(10, "work")
    progress.update(10)
    progress.close()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    progress = common.Progress(10, "work", every_seconds=0.0)
    progress.update(5)
    progress.close()
    assert capsys.readouterr().err == ""


def test_progress_of_an_unknown_total_has_no_share(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = common.Progress(0, "read")
    now[0] += 2
    progress.update(3)
    assert progress.line() == "read: 3 it, 1.5 it/s"


def test_control_characters_are_shown_and_not_sent_to_the_terminal():
    assert common.printable("a\tb\n\x1b[31mü😀\x00") == "a\tb\n\\x1b[31mü😀\\x00"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_atomic_write_replaces_a_file_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "zweite Fassung: größer"):
        with common.atomic_write(path) as f:
            f.write(text)
            assert not path.exists() or path.read_text(encoding="utf-8") == "first"
        assert path.read_bytes() == text.encode("utf-8")
    assert os.listdir(path.parent) == ["a.txt"]


def test_atomic_write_takes_bytes_and_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    with common.atomic_write(tmp_path / "a.bin", "wb") as f:
        f.write(b"\x00\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "a.bin")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(type(error)), common.atomic_write(path) as f:
        f.write("half of the new")
        raise error
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["a.txt"]


def lock_elsewhere(path: Path) -> bool:
    """Whether another process gets the lock."""
    code = f"from nanochat.common import hold_lock; print(hold_lock({str(path)!r}, 0))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    return {"True\n": True, "False\n": False}[result.stdout]


def test_a_held_lock_is_released_with_the_process_group(tmp_path):
    path = tmp_path / "folder" / "thing"
    assert common.hold_lock(path, 0) and common.hold_lock(path, 0)
    assert not lock_elsewhere(path)
    common.compute_cleanup()
    assert lock_elsewhere(path)


@pytest.mark.parametrize(("number", "is_known"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_where_there_are_no_locks_everybody_gets_them(tmp_path, monkeypatch, number, is_known):
    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with contextlib.nullcontext() if is_known else pytest.raises(OSError, match="I/O|Input/output"):
        assert common.hold_lock(tmp_path / "thing", 0)


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    with common.file_lock(tmp_path / "folder" / "thing"):
        other = common.file_lock(tmp_path / "folder" / "thing")
        with pytest.raises(TimeoutError):
            other.acquire(timeout=0)
    with common.file_lock(tmp_path / "folder" / "thing"):
        assert not (tmp_path / "folder" / "thing").exists()
