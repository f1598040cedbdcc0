"""What every part needs: the base directory, processes and devices, dtypes, errors, output, files.

One code path serves every world size: the collectives below are the identity on one process, so no caller asks whether
there are several. compute_init starts NCCL on CUDA and Gloo on a CPU, as torchrun's environment says.

Hosts may share the base directory or have one each, as replicas: compute_init finds out which, and is_writer names the
one rank that writes in each. check_same catches replicas that are none.

What a kind of device wants is decided here and nowhere else:

- dtype: matmuls in bfloat16 on CUDA devices that have it, else float32. There is no bfloat16 arithmetic on a CPU, where
  it is about a hundred times slower. What stays in float32 on CUDA is multiplied in TF32;
- attention: torch's scaled_dot_product_attention, which takes its flash kernel where queries, keys and values are in
  that dtype and the mask is the causal one, as in training. There is nothing to set;
- torch.compile, pinned batches, and an allocator whose segments grow, all on CUDA alone.
"""

import contextlib
import errno
import functools
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from filelock import FileLock

# Dense bf16 peak of one device in FLOP/s, by a part of the name that CUDA reports; the first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}

# Where a user says how torch's CUDA allocator works; what is set is left as it is
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


TIMEOUT = timedelta(hours=2)  # how long ranks wait for each other, for one that downloads for instance


class UserError(ValueError):
    """Something that the user can mend. The message is one line: what is wrong, and what command or setting helps."""


def user_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a script's main: what the user can mend ends the program with one line instead of a traceback.

    That is UserError, OSError, a GPU that is out of memory and the loss of another rank. NANOCHAT_TRACEBACK=1 shows the
    traceback all the same. A process group is taken down only where all ranks end: after an error the others still
    wait for this one, and it is the launcher that ends them.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            result = main(*args, **kwargs)
            compute_cleanup()
            return result
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if os.environ.get("NANOCHAT_TRACEBACK"):
                raise
            hint = "; try half the --device_batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
            print(f"error: {' '.join(str(error).split())}{hint}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        except RuntimeError as error:
            if os.environ.get("NANOCHAT_TRACEBACK") or not (is_distributed() and "gloo" in str(error)):
                raise
            print("error: the connection to another process of the run was lost", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(130) from None

    return wrapped


def get_base_dir() -> Path:
    """The folder of all artifacts: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat. It is created if it is missing."""
    base_dir = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    base_dir.mkdir(parents=True, exist_ok=True)
    return base_dir


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices


class Runtime(NamedTuple):
    """Who this process is among the others, and what it computes on."""

    ddp: bool
    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def get_dist_info() -> tuple[bool, int, int, int]:
    """(ddp, rank, local_rank, world_size) from torchrun's environment; (False, 0, 0, 1) without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False, 0, 0, 1
    return True, int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ["WORLD_SIZE"])


def autodetect_device_type() -> str:
    """'cuda', else 'mps', else 'cpu': the best that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


_is_writer: bool | None = None  # found by compute_init where there are several hosts
_held_locks: dict[str, FileLock] = {}  # by hold_lock, until compute_cleanup


def compute_init(device_type: str = "", seed: int = 42) -> Runtime:
    """Seed torch, pick the device and start the process group if torchrun launched us. Every rank must call.

    device_type: 'cuda', 'mps', 'cpu' or '' (autodetect). Raises UserError for a device that is not there.
    """
    device_type = device_type or autodetect_device_type()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device_type not in available:
        raise UserError(f"--device_type={device_type}: one of cuda, mps, cpu is wanted, or nothing to autodetect")
    if not available[device_type]:
        raise UserError(f"--device_type={device_type}: no such device here; leave the setting out to autodetect")
    ddp, rank, local_rank, world_size = get_dist_info()
    torch.manual_seed(seed)
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"there are {torch.cuda.device_count()} GPUs: start at most as many processes")
        # Segments that grow leave no holes where rows of other lengths come. torch reads this at its first allocation
        if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
            os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
        torch.set_float32_matmul_precision("high")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device(device_type)
    if ddp and not dist.is_initialized():
        if device_type == "mps":
            raise UserError("several processes need CUDA or CPU: add --device_type=cpu, or run without torchrun")
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=_attempt_store(),
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=device if backend == "nccl" else None,
        )
        if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) < world_size:
            global _is_writer
            _is_writer = _sees_directory_first()
    return Runtime(ddp, rank, local_rank, world_size, device)


def _attempt_store() -> dist.Store | None:
    """The store over which the ranks of this attempt meet; None leaves its choice to torch.

    torchrun keeps one store over all its restarts, and what the ranks of a failed attempt left there would send the
    new ones to addresses where nobody listens. So each attempt has a part of its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _sees_directory_first() -> bool:
    """Whether no rank before this one sees the same base directory. Every rank must call."""
    with tempfile.NamedTemporaryFile(dir=get_base_dir(), prefix=".rank-") as mark:
        names = gather_objects(Path(mark.name).name)
        first = next(rank for rank, name in enumerate(names) if (get_base_dir() / name).exists())
        barrier()  # until all have looked
    return first == dist.get_rank()


def compute_cleanup() -> None:
    """Take the process group down if there is one, and release what hold_lock holds."""
    global _is_writer
    _is_writer = None
    while _held_locks:
        _held_locks.popitem()[1].release()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_writer() -> bool:
    """Whether this rank writes what concerns all ranks: one does for each base directory.

    That is rank 0 alone where all hosts share a disk, and one rank a host where each has its own: they all write the
    same, and every host has all of it.
    """
    return get_dist_info()[1] == 0 if _is_writer is None else _is_writer


def is_distributed() -> bool:
    """Whether a process group is up, so that collectives have somebody to talk to."""
    return dist.is_available() and dist.is_initialized()


def _reduction_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def all_reduce_sum(value: Any) -> Any:
    """The sum over ranks of a tensor (reduced in place) or of a number (float64). Every rank must call."""
    if not is_distributed():
        return value
    if isinstance(value, torch.Tensor):
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_reduction_device())
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return type(value)(total.item())


def all_reduce_mean(value: Any) -> Any:
    """The mean over ranks of a floating-point tensor (in place) or float. Sums, then divides. Every rank must call."""
    if not is_distributed():
        return value
    total = all_reduce_sum(value)
    return total.div_(dist.get_world_size()) if isinstance(total, torch.Tensor) else total / dist.get_world_size()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank. Every rank must call."""
    return bool(all_reduce_sum(int(flag)))


def gather_objects(value: Any) -> list[Any]:
    """One picklable value a rank, in rank order, on every rank. Every rank must call."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_scatter_mean(stacked: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start averaging a tensor over ranks, each rank keeping its share. Every rank must call.

    stacked: contiguous, its first dimension a multiple of the world size. Returns a function that waits for the result
    and returns this rank's share, the rank's part of the first dimension; on one process it is stacked itself.
    """
    if not is_distributed():
        return lambda: stacked
    world_size = dist.get_world_size()
    share = torch.empty_like(stacked[: len(stacked) // world_size])
    work = dist.reduce_scatter_tensor(share, stacked, op=dist.ReduceOp.SUM, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return share.div_(world_size)

    return finish


def all_gather_shares(share: torch.Tensor) -> torch.Tensor:
    """The shares of all ranks joined along the first dimension; the share itself on one rank. Every rank must call."""
    if not is_distributed():
        return share
    joined = share.new_empty((dist.get_world_size() * len(share), *share.shape[1:]))
    dist.all_gather_into_tensor(joined, share.contiguous())
    return joined


def check_same(what: str, value: Any) -> None:
    """Raise UserError on all ranks unless the picklable value is the same on each. Every rank must call.

    what is named in the message. Hosts with base directories of their own may differ where they must not.
    """
    values = gather_objects(value)
    if any(other != values[0] for other in values):
        raise UserError(
            f"the hosts differ in {what}: without a shared disk each needs a whole copy of {get_base_dir()}; "
            "copy what is missing from one to the others"
        )


def barrier() -> None:
    """Wait until all ranks are here."""
    if is_distributed():
        dist.barrier()


@contextlib.contextmanager
def on_rank0_first() -> Iterator[None]:
    """Run the body on rank 0 while the others wait, then on them: for work whose result stays on disk.

    Where hosts share no disk it runs first on one rank of each (is_writer).
    """
    if not is_writer():
        barrier()
    try:
        yield
    finally:
        if is_writer():
            barrier()


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of matmuls on a device: bfloat16 on CUDA devices that have it, else float32."""
    is_cuda = torch.device(device).type == "cuda"
    return torch.bfloat16 if is_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def autocast(device: torch.device | str) -> contextlib.AbstractContextManager:
    """The context in which models run on a device: torch.autocast to compute_dtype, nothing where that is float32."""
    dtype = compute_dtype(device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=dtype)


def compile_model(model: Any, setting: int) -> Any:
    """The model to train with: torch.compile of it (setting 1), itself (0), or what its device wants (-1).

    Both have the same weights. Sample from the plain one, whose shapes may change.
    """
    wanted = model.get_device().type == "cuda" if setting < 0 else bool(setting)
    return torch.compile(model, dynamic=False) if wanted else model


def pin(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor in pinned memory where it is bound for CUDA: copied with non_blocking, nobody waits for it."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def device_name(device: torch.device | str) -> str:
    """The name that the hardware gives itself, such as 'NVIDIA H100 80GB HBM3'; 'cpu' or 'mps' otherwise."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by its name; None where it is not known."""
    if "Laptop" in name:  # slower than the cards whose names they borrow
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory that was in use so far: of the device on CUDA, of the process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # Unix only, and only needed here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_memory_bytes(device: torch.device | str) -> int:
    """How much memory this process may use on its device in all: what is free, and on CUDA what it holds already.

    On a CPU the processes of this machine share what is available.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def release_memory(device: torch.device | str) -> None:
    """Give back what torch's CUDA allocator holds and does not use. Nothing to do on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device | str) -> None:
    """Wait for the device's queue, so that a clock read afterwards tells the truth. Nothing to do on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Output


def print0(*values: Any, **kwargs: Any) -> None:
    """print on rank 0, at once; nothing on the other ranks."""
    if get_dist_info()[1] == 0:
        print(*values, **{"flush": True, **kwargs})


def print_banner() -> None:
    """Print the name of the project, once."""
    print0("-" * 60 + "\n nanochat: the whole pipeline of a small chat model\n" + "-" * 60)


class DummyWandb:
    """Stands in for a wandb run where nothing is to be logged: `--run=dummy`, and all ranks but the first."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finish(self) -> None:
        pass


def init_wandb(run: str, project: str, config: dict[str, Any]) -> Any:
    """A wandb run of that name on rank 0; a DummyWandb for run 'dummy' and on the other ranks.

    wandb is imported only where it is used: it is slow to import, and a dummy run must not touch anything. Raises
    UserError where it cannot start, for want of a login for instance.
    """
    if run == "dummy" or get_dist_info()[1] != 0:
        return DummyWandb()
    import wandb

    try:
        return wandb.init(project=project, name=run, config=config)
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb cannot start ({error}): run `wandb login`, set WANDB_MODE=offline, or leave --run out"
        ) from error


def format_seconds(seconds: float) -> str:
    """7 -> '7s', 187 -> '3m07s', 11220 -> '3h07m'."""
    seconds = max(0, round(seconds))
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


class Progress:
    """Progress of long work, with rate and remaining time: a bar on a terminal, a line every few seconds elsewhere.

        progress = Progress(total_bytes, "download", unit="B")
        progress.update(65536)
        progress.close()

    total: how many units there are, 0 where that is not known. Rank 0 only prints.
    """

    def __init__(self, total: int, label: str, unit: str = "it", every_seconds: float = 5.0):
        self.total, self.label, self.unit = total, label, unit
        self.done = 0
        self.is_terminal = sys.stderr.isatty()
        self.every_seconds = 0.1 if self.is_terminal else every_seconds
        self.start = self.last = time.monotonic()
        self.is_quiet = get_dist_info()[1] != 0
        self.has_printed = False

    def update(self, count: int = 1) -> None:
        """Count more units as done."""
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.every_seconds:
            self.last = now
            self._print()

    def close(self) -> None:
        """Print the last state, where anything was printed before, and end the line."""
        if self.has_printed:
            self._print(end="\n")

    def line(self) -> str:
        """'download: 3.1M/8.0M B (39%), 1.2M B/s, 4s left'."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / seconds
        text = f"{self.label}: {_short(self.done)}"
        if self.total:
            text += f"/{_short(self.total)} {self.unit} ({min(1.0, self.done / self.total):.0%})"
        else:
            text += f" {self.unit}"
        text += f", {_short(rate)} {self.unit}/s"
        if self.total and rate > 0:
            text += f", {format_seconds((self.total - self.done) / rate)} left"
        return text

    def _print(self, end: str = "") -> None:
        if self.is_quiet:
            return
        self.has_printed = True
        if self.is_terminal:
            print(f"\r{_fit(self.line())}", end=end, file=sys.stderr, flush=True)
        else:
            print(self.line(), file=sys.stderr, flush=True)


def _short(number: float) -> str:
    """1234567 -> '1.2M'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def _fit(text: str, width: int = 78) -> str:
    return text[:width].ljust(width)


def printable(text: str) -> str:
    """Text that is safe to print on a terminal: control characters are shown escaped.

    All but newline and tab, and the two joiners of which emoji and some scripts are made.
    """
    return "".join(c if c in "\n\t\u200c\u200d" or unicodedata.category(c)[0] != "C" else repr(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a unique temporary file beside path and rename it to path when the body ends well.

    Readers see the old file or the whole new one, never a part. On an error the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@functools.cache
def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def file_lock(path: str | Path) -> FileLock:
    """A lock between processes for the work that makes path: `with file_lock(path): ...`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def hold_lock(path: str | Path, timeout: float) -> bool:
    """Take file_lock(path) until compute_cleanup or the process's end; False where it did not come within timeout s.

    A process that holds it already keeps it. On a file system that has no locks everybody gets it. Local.
    """
    lock = file_lock(path)
    if lock.lock_file in _held_locks:
        return True
    try:
        lock.acquire(timeout=timeout)
        _held_locks[lock.lock_file] = lock
    except TimeoutError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True
