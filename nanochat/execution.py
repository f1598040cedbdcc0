"""Running what a model wrote: arithmetic (the calculator tool) and Python programs (HumanEval).

The calculator reads expressions itself: nothing is passed to Python but the syntax tree of numbers, + - * /,
parentheses and `'literal'.count('literal')`, of bounded size. It computes with fractions, so that 0.1 + 0.2 is 0.3.

execute_code runs a program in a fresh `python -I` process behind a launcher (sandbox.py), with

- a session, an environment and a temporary folder of its own; nothing on standard input; bounded output;
- limits on address space, CPU seconds, processes, open files, and the size of files; no core dumps; no privileges;
- on Linux, where the kernel permits it, namespaces: no network, no other processes in sight, every file read-only but
  those of the temporary folder, which is a small file system in memory, and the certain end of everything started;
- on Linux elsewhere (containers often forbid namespaces), as a fallback: no sockets but Unix ones, no signals to
  processes outside (nor, for ordinary users, to processes that the code itself started), and a search for everything
  started, which is then killed;
- for root a user id that nobody else has, under which the code may not signal, read or change what is not open to all.

What it does not protect from. This is no hard boundary against somebody who attacks it; it is for code that a model
wrote by mistake, or to look better than it is.
- The code reads every file that its user may read (for root: that everybody may read).
- It reaches Unix sockets that lie in the file system, and bugs of the kernel.
- Limits on memory and CPU hold for each process, of which there may be 64: together they may slow the machine down.
  A root that may not give the code another id (capabilities taken away) limits their number by the deadline alone.
- Without namespaces it may write wherever its user may, such as /tmp, in files of bounded size and unbounded number,
  and these stay; code of an ordinary user may read the memory of that user's processes if the system permits it.
- On macOS there are only the limits that its kernel knows (memory not reliably), the scrubbed process and the deadline:
  the network is open, and a process that leaves the session outlives the call.
- Code that looks for it can find the way in which the process reports that the code came to its end, and report that
  itself. No exit, exception or closed descriptor does so by mistake.
- Only the standard library is there, and where Python lies in a folder closed to others (/root), root's code
  cannot start `sys.executable`.
"""

import ast
import contextlib
import decimal
import os
import re
import secrets
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# The calculator

MAX_EXPRESSION_CHARS = 512
MAX_NESTING = 100  # levels of the syntax tree; a sum of n terms has n of them
MAX_MAGNITUDE = 10**30  # of numbers, results on the way and results; numbers but 0 are not below its inverse either
MAX_RESULT_CHARS = 42
SIGNIFICANT_DIGITS = 10
# String literals without escapes, no two side by side (triple quotes begin so); the pieces of arithmetic; and commas
# between digits, which are left out.
PIECES = re.compile(r"""'[^'\\\n]*'(?!['"])|"[^"\\\n]*"(?!['"])|\.count\b|[0-9.eE_+\-*/() \t]|(?<=[0-9]),(?=[0-9])""")


def use_calculator(expr: str) -> str | None:
    """The value of an arithmetic expression as text; None for anything else, and never an exception.

    '1,000 + 2' -> '1002', '10 / 4' -> '2.5', '2 / 3' -> '0.6666666667', "'cherry'.count('r')" -> '2', '2 ** 3' -> None

    Numbers, + - * /, unary minus, parentheses and str.count of two literals. The result is exact where it is an
    integer, else rounded to 10 significant digits. Division by zero and whatever is too long, too deep or too large
    give None. It takes well under a millisecond and works on any thread.
    """
    if not isinstance(expr, str) or len(expr) > MAX_EXPRESSION_CHARS:
        return None
    pieces = PIECES.findall(expr)
    if "".join(pieces) != expr:
        return None
    source = "".join(piece for piece in pieces if piece != ",").strip()
    try:
        return _format_number(_evaluate(ast.parse(source, mode="eval").body, MAX_NESTING))
    except (_NotArithmetic, ZeroDivisionError, SyntaxError, ValueError, MemoryError, RecursionError):
        return None


class _NotArithmetic(Exception):
    """An expression that the calculator does not take."""


def _evaluate(node: ast.expr, levels: int) -> Fraction:
    """The value of a syntax tree of at most that many levels. Raises _NotArithmetic, ZeroDivisionError."""
    if levels == 0:
        raise _NotArithmetic
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = Fraction(repr(number))  # of a float the decimal digits, not the binary fraction; not for inf
            if value and abs(value) * MAX_MAGNITUDE < 1:
                raise _NotArithmetic
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_evaluate(operand, levels - 1)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as operator, right=right):
            a, b = _evaluate(left, levels - 1), _evaluate(right, levels - 1)
            match operator:
                case ast.Add():
                    value = a + b
                case ast.Sub():
                    value = a - b
                case ast.Mult():
                    value = a * b
                case _:
                    value = a / b
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = Fraction(text.count(part))
        case _:
            raise _NotArithmetic
    if abs(value) > MAX_MAGNITUDE:
        raise _NotArithmetic
    return value


def _format_number(value: Fraction) -> str | None:
    """Fraction(5, 2) -> '2.5', Fraction(10) -> '10', Fraction(1, 3) -> '0.3333333333'; None where it is too long."""
    if value.denominator == 1:
        return str(value.numerator)
    context = decimal.Context(prec=SIGNIFICANT_DIGITS)
    text = f"{context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator)):f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text if len(text) <= MAX_RESULT_CHARS else None


# ---------------------------------------------------------------------------------------------------------------------
# Programs

SANDBOX = Path(__file__).with_name("sandbox.py")
MAX_OUTPUT_BYTES = 1 << 17  # of standard output and of standard error; what comes after that is dropped
GRACE_SECONDS = 10.0  # for the launcher to start and to clean up
CHUNK_BYTES = 1 << 16
namespaces_permitted = sys.platform == "linux"  # turns False when the kernel refuses them


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended."""

    success: bool  # it ran to its end
    stdout: str
    stderr: str
    error: str | None  # why it did not, on one line, such as "ValueError: x"; None on success
    timeout: bool
    memory_exceeded: bool  # it ended with a MemoryError


def execute_code(code: str, timeout_seconds: float = 5.0, maximum_memory_bytes: int = 256 * 2**20) -> ExecutionResult:
    """Run a Python program in a process of its own, as `__main__`, with what the module's docstring lists.

    success means that the last line was passed and nothing went wrong at the exit; leaving early, by sys.exit(0) or
    os._exit(0) for instance, is no success. timeout_seconds: from the start of the program, whose start takes some
    0.03 seconds. maximum_memory_bytes: of address space, a bare interpreter takes some 20 MiB of it.

    When it returns, all processes of the program are dead and its folder is gone. It may be called from any thread and
    from several at once. Raises OSError where a process or a folder cannot be made.
    """
    global namespaces_permitted
    with _temporary_folder() as folder:
        result = _launch(code, folder, timeout_seconds, maximum_memory_bytes, namespaces_permitted)
        if result is None:
            namespaces_permitted = False
            result = _launch(code, folder, timeout_seconds, maximum_memory_bytes, use_namespaces=False)
        assert result is not None
        return result


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that is removed whatever the program made of it."""
    folder = tempfile.mkdtemp(prefix="nanochat-code-")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)


def _remove(folder: str) -> None:
    """Delete a folder with all in it, and be it closed to its owner or thousands of folders deep, where shutil.rmtree
    gives up: what lies in its folders is moved up, so that no path is long."""
    os.chmod(folder, 0o700)
    unique, moved = secrets.token_hex(8), 0
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for child in list(os.scandir(entry.path)):
                if child.is_dir(follow_symlinks=False):
                    os.chmod(child.path, 0o700)  # a folder that is closed cannot be moved
                os.rename(child.path, f"{folder}/{unique}{moved}")
                moved += 1
            os.rmdir(entry.path)
    os.rmdir(folder)


def _launch(
    code: str, folder: str, timeout_seconds: float, maximum_memory_bytes: int, use_namespaces: bool
) -> ExecutionResult | None:
    """Run the launcher in a folder; None where the kernel refuses namespaces."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    environment["MALLOC_ARENA_MAX"] = "1"  # each arena of a thread would take 64 MiB of the address space
    settings = [folder, str(timeout_seconds), str(int(maximum_memory_bytes)), str(int(use_namespaces))]
    result_r, result_w = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(SANDBOX), *settings, str(result_w)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            env=environment,
            pass_fds=[result_w],
            start_new_session=True,
        )
    except OSError:
        os.close(result_r)
        raise
    finally:
        os.close(result_w)
    received = {name: bytearray() for name in ("result", "stdout", "stderr")}
    streams = {result_r: "result", process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr"}
    try:
        content = code.encode("utf-8", "surrogatepass")
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(struct.pack("<Q", len(content)) + content)
        _collect(streams, received, time.monotonic() + timeout_seconds + GRACE_SECONDS)
    finally:
        _end(process, bytes(received["result"]))
        os.close(result_r)
    if received["result"] == b"refused":
        return None
    return _judge(received, timeout_seconds)


def _collect(streams: dict[int, str], received: dict[str, bytearray], deadline: float) -> None:
    """Read the streams, up to their limit, until they end; what comes after the limit is dropped.

    When the launcher has ended, nothing worth waiting for comes any more: processes that escaped from it may hold the
    streams open. When it died before it had a result, the program still runs.
    """
    with selectors.DefaultSelector() as selector:
        for fd in streams:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and (remaining := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(remaining):
                chunk = os.read(key.fd, CHUNK_BYTES)
                buffer = received[streams[key.fd]]
                buffer += chunk[: MAX_OUTPUT_BYTES - len(buffer)]
                if not chunk:
                    selector.unregister(key.fd)
                    if streams[key.fd] == "result":
                        has_result = bool(buffer.partition(b"\n")[2])
                        deadline = min(deadline, time.monotonic() + has_result)


def _end(process: subprocess.Popen, result: bytes) -> None:
    """Wait for the launcher, which cleans up now at the latest; if it cannot, kill it and the process of the code."""
    process.stdin.close()  # this tells it
    try:
        has_cleaned_up = process.wait(GRACE_SECONDS) == 0
    except subprocess.TimeoutExpired:
        has_cleaned_up = False
        process.kill()
        process.wait()
    process.stdout.close()
    process.stderr.close()
    child = result.partition(b"\n")[0]
    if not has_cleaned_up and child.isdigit():
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                kill(int(child), signal.SIGKILL)


def _judge(received: dict[str, bytearray], timeout_seconds: float) -> ExecutionResult:
    """What the launcher's result means; see sandbox.py for its form."""
    stdout, stderr, result = (received[name].decode("utf-8", "replace") for name in ("stdout", "stderr", "result"))
    _, how, report = (result.split("\n", 2) + ["", ""])[:3]
    kind, _, message = report.partition(" ")
    exit_code = int(how.removeprefix("ended ")) if how.startswith("ended ") else None
    success = kind == "end" and exit_code == 0
    timeout = how == "timeout" or exit_code == 128 + signal.SIGXCPU
    if success:
        error = None
    elif timeout:
        error = f"not at its end after {timeout_seconds:g} seconds"
    elif kind in ("error", "memory"):
        error = message
    elif exit_code is None:
        error = "no result: the launcher of the program was killed or could not start it"
    elif exit_code > 128 and exit_code - 128 in {int(number) for number in signal.Signals}:
        error = f"killed by {signal.Signals(exit_code - 128).name}"
    else:
        error = f"exit status {exit_code} {'at' if kind == 'end' else 'before'} the end of the program"
    return ExecutionResult(success, stdout, stderr, error, timeout, kind == "memory")
