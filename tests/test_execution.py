"""The calculator, and running programs that mean harm or go wrong."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import execution, sandbox
from nanochat.execution import execute_code, use_calculator

ROOT = Path(__file__).resolve().parents[1]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has what is tested here")

# ---------------------------------------------------------------------------------------------------------------------
# The calculator


@pytest.mark.parametrize(
    "expr, value",
    [
        ("12+7", "19"),
        (" 2 * (3 + 4) - 5 ", "9"),
        ("10/4", "2.5"),
        ("10.0", "10"),
        ("20/2", "10"),
        ("0.1+0.2", "0.3"),
        ("0.1+0.2-0.3", "0"),
        ("2/3", "0.6666666667"),
        ("-2/3", "-0.6666666667"),
        ("--5", "5"),
        ("-(3-5)*-1.5", "-3"),
        ("0*-1", "0"),
        (".5*4", "2"),
        ("1e3+1", "1001"),
        ("1/1024", "0.0009765625"),
        ("1/30000", "0.00003333333333"),
        ("123456.123456789", "123456.1235"),
        ("123456789*987654321", "121932631112635269"),
        ("1,000+2", "1002"),
        ("1,234,567*1", "1234567"),
        ("1_000", "1000"),
        ("'strawberry'.count('r')", "3"),
        ("\"banana\".count('an') * 2", "4"),
        ("'a,b'.count(',')", "1"),
        ("'1,2'.count(',')+1,000", "1001"),
        ("'naïve 한'.count('한')", "1"),
        ("'ab'.count('')", "3"),
        ("\"'''\".count(\"'\")", "3"),
        ("+".join(["1"] * 90), "90"),
    ],
)
def test_calculator_computes(expr, value):
    assert use_calculator(expr) == value


@pytest.mark.parametrize(
    "expr",
    ["", " ", "1/0", "1/(2-2)", "2**3", "2**-1", "7//2", "7%2", "1<2", "1 if 1 else 2", "~1", "+", "1+", "(1", "1 2"]
    + ["1)", "x", "True", "None", "...", "1j", "0x10", "007", "inf", "nan", "1e999", "1e400*0", "1e-40", "9" * 31]
    + ["9e29*9e29", "(x:=1)", "[1]", "(1)()", "(1).real", "f'{1}'", "'a'", "'a'+'b'", "'a'*3", "b'a'.count(b'a')"]
    + ["'a'.upper()", "'a'.count('a', 1)", "'a'.count(*'a')", "'a'.count(x='a')", "'a'.count(1)", "''.count"]
    + ["__import__('os').system('true')", "().__class__", "lambda: 1", "1 # 2", "1\n+1", "1;1", "1\x00", "'\x00'"]
    + ["'\\d'", "１+２", "٣", "²", "1,", ",1", "1,,2", "1 ,2", "(1,)", "'''a'''.count('a')", "1if 2", "1 .count(1)"]
    + ["\ud800", "(" * 300 + "1" + ")" * 300, "-" * 400 + "1", "1+" * 200 + "1", "1" * 513, "9" * 10**6, "(" * 10**5]
    + ["'" + "a" * 600 + "'.count('a')", "'a'.count" * 50, None, 5, b"1"],
)
def test_calculator_takes_nothing_else(expr):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_calculator(expr) is None


def test_calculator_in_a_deep_recursion_returns():
    def descend(levels: int) -> str | None:
        return descend(levels - 1) if levels else use_calculator("-" * 90 + "1")

    outcomes = set()
    for levels in range(sys.getrecursionlimit() - 250, sys.getrecursionlimit()):
        try:
            outcomes.add(descend(levels))
        except RecursionError:  # of descend itself
            break
    assert None in outcomes and "1" in outcomes


def test_calculator_is_quick_whatever_it_reads():
    texts = [
        "(" * 512,
        "'" * 511,
        "9," * 256,
        "1/3+" * 90 + "1",
        "*".join(["1e30/7e29"] * 45),
        "1,0" * 10**6,
        "'" * 10**6,
    ]
    for expr in [*texts, '"' + "a" * 480 + "\".count('a')"]:
        start = time.perf_counter()
        use_calculator(expr)
        assert time.perf_counter() - start < 0.2, expr[:20]


numbers = st.one_of(
    st.integers(0, 9999).map(lambda n: (f"{n}", Fraction(n))),
    st.integers(0, 10**9).map(lambda n: (f"{n:,}", Fraction(n))),
    st.integers(0, 999999).map(lambda n: (f"{n // 1000}.{n % 1000:03}", Fraction(n, 1000))),
    st.text("ab,1'", max_size=6).map(lambda s: (f"\"{s}\".count(',')", Fraction(s.count(",")))),
)


def combined(pairs: st.SearchStrategy) -> st.SearchStrategy:
    """Expressions one level deeper: (text, value), the value None after a division by zero."""

    def binary(parts: tuple) -> tuple[str, Fraction | None]:
        (left, a), operator, (right, b), space = parts
        text = f"({left}){space}{operator}{space}({right})"
        if a is None or b is None or (operator == "/" and b == 0):
            return text, None
        return text, {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator]

    negated = pairs.map(lambda pair: (f"-({pair[0]})", None if pair[1] is None else -pair[1]))
    return st.one_of(st.tuples(pairs, st.sampled_from("+-*/"), pairs, st.sampled_from(["", " "])).map(binary), negated)


@settings(max_examples=400, deadline=None)
@given(st.recursive(numbers, combined, max_leaves=8))
def test_calculator_agrees_with_fractions(pair):
    text, value = pair
    result = use_calculator(text)
    if value is None or len(text) > execution.MAX_EXPRESSION_CHARS:
        assert result is None
    elif value.denominator == 1:
        assert result == str(value.numerator)
    else:
        assert abs(Fraction(result) - value) <= abs(value) / (2 * 10**9)
        assert len(result.lstrip("-0.").replace(".", "").rstrip("0")) <= 10


PIECES = [
    "1",
    "0",
    "9" * 20,
    ".",
    ",",
    "e",
    "_",
    "+",
    "-",
    "*",
    "/",
    "(",
    ")",
    "'",
    '"',
    "a",
    ".count",
    " ",
    "\n",
    "\\",
    "f",
]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_calculator_never_raises(expr):
    result = use_calculator(expr)
    assert result is None or re.fullmatch(r"-?\d{1,31}(\.\d+)?", result)


# ---------------------------------------------------------------------------------------------------------------------
# Programs

WRAPPER = """
import sys
sys.path.insert(0, {folder!r})
import sandbox
{change}
sys.path.remove({folder!r})
sys.exit(sandbox.main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5])))
"""


def change_sandbox(monkeypatch: pytest.MonkeyPatch, folder: Path, change: str) -> None:
    """Programs of this test run behind a launcher that was changed by a statement."""
    path = folder / "changed_sandbox.py"
    path.write_text(WRAPPER.format(folder=str(ROOT / "nanochat"), change=change), encoding="utf-8")
    monkeypatch.setattr(execution, "SANDBOX", path)


@functools.cache
def namespaces_work() -> bool:
    execute_code("")
    return execution.namespaces_permitted


@pytest.fixture(params=["namespaces", "namespaces, own user", "fallback", "fallback, own user"])
def mode(request, monkeypatch, tmp_path) -> str:
    """Programs run with and without namespaces, and both under the user id that root has to spare and under the
    caller's own, as they do for ordinary users."""
    if "own user" in request.param:
        if os.geteuid() != 0:
            pytest.skip("an ordinary user has no other id")
        change_sandbox(monkeypatch, tmp_path, "sandbox._spare_uid = lambda: None")
    monkeypatch.setattr(execution, "namespaces_permitted", "namespaces" in request.param)
    if "namespaces" in request.param:
        if not namespaces_work():
            pytest.skip("the kernel permits no namespaces")
    return request.param


def has_id_of_its_own() -> bool:
    """Whether programs run under another user id than this process."""
    return execute_code(f"import os\nassert os.getuid() != {os.geteuid()}").success


def processes_with(text: str) -> list[int]:
    """The living processes whose command line contains a text."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and text in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/dev/fd"))


def test_program_runs_to_its_end(mode):
    result = execute_code("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert result == execution.ExecutionResult(True, "out\n", "err\n", None, False, False)
    assert not execute_code("assert 1 == 2").success


def test_program_is_main(mode):
    code = (
        "import dataclasses, pickle, __main__\n"
        "@dataclasses.dataclass\n"
        "class Point:\n"
        "    x: 'int'\n"
        "def count(n):\n"
        "    return n and 1 + count(n - 1)\n"
        "if __name__ == '__main__':\n"
        "    print(pickle.loads(pickle.dumps(Point(3))), __main__.Point is Point, count(900))\n"
        "    print(sorted(name for name in globals() if not name.startswith('__')))\n"
    )
    result = execute_code(code)
    assert result.stdout == "Point(x=3) True 900\n['Point', 'count', 'dataclasses', 'pickle']\n", result.stderr


def test_standard_library_is_there(mode):
    code = "import json, asyncio, encodings.idna, xml.dom.minidom, ctypes.util, sqlite3, decimal, unittest.mock\n"
    code += "import subprocess\nprint(subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout)\n"
    code += "from concurrent.futures import ThreadPoolExecutor\nprint(sum(ThreadPoolExecutor(8).map(abs, range(9))))\n"
    code += "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print, args=('child',))\n"
    code += "p.start(); p.join()"
    result = execute_code(code)
    assert (result.success, result.stdout) == (True, "hi\n\n36\nchild\n"), result


@pytest.mark.parametrize(
    "code, error",
    [
        ("raise ValueError('x')", "ValueError: x"),
        ("class Odd(Exception): pass\nraise Odd", "Odd"),
        ("import json\njson.loads('')", "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("class Odd(Exception):\n    def __str__(self): 1/0\nraise Odd", "Odd: <no text>"),
        ("raise KeyError('a\\nb')", "KeyError: 'a\\nb'"),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("if", "SyntaxError: invalid syntax (<code>, line 1)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_exception_is_told(code, error):
    result = execute_code(code)
    assert (result.success, result.error, result.timeout, result.memory_exceeded) == (False, error, False, False)
    assert error.split(":")[0] in result.stderr


def test_traceback_begins_in_the_program():
    lines = execute_code("def f():\n    return 1 / 0\nf()").stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "ZeroDivisionError: division by zero"
    assert [line.strip() for line in lines if "File" in line] == [
        'File "<code>", line 3, in <module>',
        'File "<code>", line 2, in f',
    ]


@pytest.mark.parametrize("code", ["x = 'lone \ud800'", "\x00", "# \udfff", "x = 1\n" * 200_000 + "1/0"])
def test_odd_code_is_an_error_of_the_program(code):
    result = execute_code(code)
    assert (result.success, result.timeout) == (False, False) and result.error


@pytest.mark.parametrize(
    "code, error",
    [
        ("import os; os._exit(0)", "exit status 0 before the end of the program"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import sys; sys.exit('sorry')", "SystemExit: sorry"),
        ("exec('raise SystemExit')", "SystemExit"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import os; os.execv('/bin/true', ['true'])", "exit status 0 before the end of the program"),
        ("import os, threading; threading.Thread(target=os._exit, args=(0,)).start(); 1/0", None),
        ("import os\nif os.fork(): os._exit(0)", "exit status 0 before the end of the program"),
        ("import os\nif os.fork(): os.wait(); 1/0", "ZeroDivisionError: division by zero"),
        ("import atexit, os; atexit.register(os._exit, 3)", "exit status 3 at the end of the program"),
        ("import os; os.closerange(0, 256)", "exit status 0 before the end of the program"),
        (
            "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'end')\n    except OSError: pass\nos._exit(0)",
            "exit status 0 before the end of the program",
        ),
    ],
)
def test_leaving_early_is_no_success_and_no_timeout(code, error):
    result = execute_code(code + "\n")
    assert (result.success, result.timeout) == (False, False)
    assert result.error == error or error is None


def test_exit_waits_for_threads_and_handlers():
    code = "import atexit, threading, time\natexit.register(print, 'bye')\n"
    code += "threading.Timer(0.1, print, ['thread']).start()\nprint('main')"
    assert execute_code(code).stdout == "main\nthread\nbye\n"
    result = execute_code("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", 0.4)
    assert (result.success, result.timeout) == (False, True)


def test_endless_loop_ends_at_the_deadline(mode):
    start = time.monotonic()
    code = "print('begun', flush=True)\nwhile True:\n    try:\n        while True: pass\n    except: pass"
    result = execute_code(code, 0.5)
    assert 0.5 < time.monotonic() - start < 3
    assert (result.success, result.timeout, result.stdout) == (False, True, "begun\n")
    assert result.error == "not at its end after 0.5 seconds"


@pytest.mark.parametrize("code", ["x = bytearray(10**10)", "x = {}\nwhile True: x[len(x)] = ' ' * 10**6"])
@linux_only
def test_memory_bomb(mode, code):
    result = execute_code(code, 10.0, 128 * 2**20)
    assert (result.success, result.memory_exceeded, result.error) == (False, True, "MemoryError")
    assert result.stderr.endswith("MemoryError\n")


@linux_only
def test_memory_is_what_was_asked_for(mode):
    code = "x = bytearray(200 * 2**20)"
    assert execute_code(code, 10.0, 300 * 2**20).success
    assert not execute_code(code, 10.0, 200 * 2**20).success


@linux_only
def test_fork_bomb(mode):
    if os.geteuid() == 0 and not has_id_of_its_own():
        pytest.skip("no limit on processes holds for root")
    code = "import os, time\nprint(os.getcwd(), flush=True)\n"
    code += "while True:\n    try: os.fork()\n    except OSError: pass"
    start = time.monotonic()
    result = execute_code(code, 0.5)
    assert time.monotonic() - start < 5
    assert result.timeout and processes_with(result.stdout.strip()) == []


@linux_only
def test_number_of_processes_is_limited(mode):
    if os.geteuid() == 0 and not has_id_of_its_own():
        pytest.skip("no limit on processes holds for root")
    code = "import os, time\nfor n in range(2000):\n    try: pid = os.fork()\n    except OSError: break\n"
    code += "    if pid == 0: time.sleep(60)\nprint(n)"
    others = 0
    if os.geteuid() != 0:  # then the user's other threads are within the limit, too
        mine = [p.info for p in psutil.process_iter(["num_threads", "uids"]) if p.info["uids"].real == os.geteuid()]
        others = sum(info["num_threads"] or 0 for info in mine)
    assert 10 < int(execute_code(code, 20.0).stdout) <= sandbox.MAX_PROCESSES + others + 20


@linux_only
@pytest.mark.parametrize("parent", ["ends", "waits"])
def test_nothing_outlives_the_call(mode, parent):
    seconds = f"{300 + int.from_bytes(os.urandom(3), 'little') / 1e7:.7f}"
    code = (
        "import os, subprocess, time\n"
        "print(os.getcwd(), flush=True)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        f"    subprocess.Popen(['sleep', '{seconds}'], start_new_session=True, env={{}})\n"
        "    if os.fork() == 0:\n"
        "        os.chdir('/')\n"
        "        os.closerange(0, 256)\n"
        "        time.sleep(300)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    result = execute_code(code + ("time.sleep(60)" if parent == "waits" else ""), 1.0 if parent == "waits" else 20.0)
    assert (result.success, result.timeout) == (parent == "ends", parent == "waits"), result
    assert "nanochat-code" in result.stdout
    assert processes_with(seconds) == processes_with(result.stdout.strip()) == []


@linux_only
def test_program_dies_with_the_caller(mode, tmp_path):
    place = tmp_path / "place"
    caller = (
        "import sys; from pathlib import Path; from nanochat import execution\n"
        f"execution.SANDBOX = Path({str(execution.SANDBOX)!r})\n"
        f"execution.namespaces_permitted = {execution.namespaces_permitted}\n"
        "import tempfile; make = tempfile.mkdtemp\n"
        f"tempfile.mkdtemp = lambda **k: (f := make(**k), Path({str(place)!r}).write_text(f))[0]\n"
        "execution.execute_code('import os\\nif os.fork() == 0: os.setsid()\\nwhile True: pass', 60)"
    )
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=ROOT)
    try:
        deadline = time.monotonic() + 20
        while not (place.exists() and len(processes_with(place.read_text(encoding="utf-8") or "?")) >= 3):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    while processes_with(place.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.rmdir(place.read_text(encoding="utf-8"))  # nobody was left to do it


def test_huge_output_is_cut_and_never_blocks(mode):
    code = "import sys\nfor _ in range(300): sys.stdout.write('x' * 10**5)\nsys.stderr.write('y' * 10**6)"
    result = execute_code(code)
    assert result.success and result.stdout == "x" * execution.MAX_OUTPUT_BYTES
    assert result.stderr == "y" * execution.MAX_OUTPUT_BYTES
    assert execute_code("while True: print('x' * 1000)", 0.4).timeout


def test_output_of_any_bytes(mode):
    code = "import sys\nprint('é 한 🙂', flush=True)\n"
    code += "sys.stdout.buffer.write(b'\\xff\\xfea')\nsys.stderr.buffer.write(b'\\x80')"
    result = execute_code(code)
    assert (result.success, result.stdout, result.stderr) == (True, "é 한 🙂\n\ufffd\ufffda", "\ufffd")


def test_standard_input_is_empty(mode):
    assert execute_code("import sys\nprint(repr(sys.stdin.read()))").stdout == "''\n"
    assert execute_code("input()").error == "EOFError: EOF when reading a line"


def test_environment_is_scrubbed(mode, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    result = execute_code("import os, sys\nprint(sorted(os.environ), sys.flags.isolated, '/nowhere' in sys.path)")
    assert result.stdout == "['HOME', 'LANG', 'MALLOC_ARENA_MAX', 'PATH', 'TMPDIR'] 1 False\n"


@linux_only
def test_secrets_of_the_caller_cannot_be_read(mode, monkeypatch):
    if mode == "fallback" and not has_id_of_its_own():
        pytest.skip("the system may permit it to an ordinary user")
    code = f"open('/proc/{os.getpid()}/environ').read()"
    assert execute_code(code).error.split(":")[0] in ("PermissionError", "FileNotFoundError")
    assert execute_code("import os\nopen(f'/proc/{os.getppid()}/environ').read()").error.startswith("PermissionError")


def test_folder_is_its_own_and_vanishes(mode, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(os.listdir(tmp_path))
    code = "import os\nprint(os.listdir('.'))\nopen('a', 'w').write('x')\nos.symlink('/etc', 'link')\n"
    result = execute_code(code)
    assert (result.success, result.stdout) == (True, "[]\n"), result
    assert sorted(os.listdir(tmp_path)) == before
    assert execute_code(code + "while True: pass", 0.3).timeout
    assert sorted(os.listdir(tmp_path)) == before


def test_folder_that_resists_vanishes(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(execution, "namespaces_permitted", False)
    code = "import os\nos.makedirs('closed/b')\nopen('closed/a', 'w').close()\nos.symlink('/etc', 'closed/c')\n"
    code += "os.mkfifo('d')\nos.chmod('closed/b', 0)\nos.chmod('closed', 0)\nos.chmod('.', 0o300)\n"
    code += "for _ in range(1100): os.mkdir('deep'); os.chdir('deep')"
    assert execute_code(code, 60.0).success
    assert os.listdir(tmp_path) == []


def test_files_are_limited(mode):
    code = "with open('a', 'wb') as f:\n    for _ in range(40): f.write(b'x' * 2**20)"
    result = execute_code(code)
    assert result.error and result.error.startswith("OSError: [Errno 27]")


def test_files_outside_are_read_only_in_namespaces(mode, tmp_path):
    if "fallback" in mode and not has_id_of_its_own():
        pytest.skip("without namespaces a program may write where its user may")
    path = tmp_path / "victim"
    path.write_text("content", encoding="utf-8")
    result = execute_code(f"open({str(path)!r}, 'w').write('gone')")
    assert not result.success and re.match(r"OSError: \[Errno 30\]|PermissionError", result.error)
    assert path.read_text(encoding="utf-8") == "content"
    if "namespaces" in mode:
        together = "for n in range(9):\n    with open(str(n), 'wb') as f: f.write(bytes(10 * 2**20))"
        assert execute_code(together).error == "OSError: [Errno 28] No space left on device"


@linux_only
def test_network_is_refused(mode):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        address = server.getsockname()
        result = execute_code(f"import socket\nsocket.create_connection({address!r}, timeout=2).send(b'x')")
        assert not result.success and re.match(r"OSError: \[Errno 101\]|PermissionError: \[Errno 1\]", result.error)
        with pytest.raises(TimeoutError):
            server.accept()


@linux_only
@pytest.mark.parametrize("target", ["os.getppid()", "0", f"{os.getpid()}"])
def test_signals_do_not_reach_the_caller(mode, target):
    harmless = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"  # kill(0) reaches the program's own group
    number = "signal.SIGTERM" if target == "0" else "signal.SIGKILL"
    code = f"import os, signal\n{harmless}\ntry: os.kill({target}, {number})\nexcept OSError: pass\nprint('alive')"
    result = execute_code(code)
    assert (result.success, result.stdout) == (True, "alive\n"), result


@linux_only
def test_program_may_not_raise_its_rights(mode):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))"
    assert execute_code(code).error.startswith("ValueError: not allowed to raise maximum limit")
    status = "[line.split()[1] for line in open('/proc/self/status') if line[:6] in ('CapEff', 'CapPrm', 'NoNewP')]"
    assert execute_code(f"print({status})").stdout == f"['{0:016}', '{0:016}', '1']\n"
    if has_id_of_its_own():
        result = execute_code("import os\nprint(*os.getresuid(), *os.getresgid(), *os.getgroups())")
        ids = set(result.stdout.split())
        assert len(ids) == 1 and int(ids.pop()) >= 0x40000000


@linux_only
def test_only_known_descriptors_are_open(mode):
    with open(os.devnull, "rb") as secret:
        os.set_inheritable(secret.fileno(), True)
        code = (  # without folders: the library is reached by them where it is closed to others
            "import os, stat\n"
            "for fd in map(int, os.listdir('/proc/self/fd')):\n"
            "    try:\n"
            "        if not stat.S_ISDIR(os.fstat(fd).st_mode):\n"
            "            print(os.readlink(f'/proc/self/fd/{fd}').split(':')[0])\n"
            "    except OSError: pass"
        )
        places = execute_code(code).stdout.split()
    assert places == ["/dev/null", "pipe", "pipe", "pipe", "pipe"]  # two for output, two to report


def test_descriptors_may_be_duplicated_and_closed(mode):
    code = "import os\nos.dup2(1, 77)\nos.write(77, b'dup ')\nos.close(2)\nos.close(0)\nprint('end')"
    result = execute_code(code)
    assert (result.success, result.stdout) == (True, "dup end\n")


def test_many_threads_at_once(mode):
    outcomes = {}

    def call(number: int) -> None:
        for turn in range(2):
            code = f"print({number}, {turn}, flush=True)" + ("\nwhile True: pass" if turn else "")
            outcomes[number, turn] = execute_code(code, 0.5 if turn else 20.0)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: result.stdout for key, result in outcomes.items()} == {key: f"{key[0]} {key[1]}\n" for key in outcomes}
    assert all(result.success == (turn == 0) for (_, turn), result in outcomes.items()) and len(outcomes) == 10


def test_nothing_leaks(mode, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors, children, files = open_descriptors(), psutil.Process().children(), sorted(os.listdir(tmp_path))
    for code in ("print(1)", "1/0", "import os; os._exit(1)", "import os; os.fork(); os.fork()", "while True: pass"):
        result = execute_code(code + "\n", 0.3 if "while" in code else 5.0)
        assert result.timeout == ("while" in code)
        assert open_descriptors() == descriptors
        assert psutil.Process().children() == children
        assert sorted(os.listdir(tmp_path)) == files


def test_refused_namespaces_are_remembered(monkeypatch, tmp_path):
    change_sandbox(monkeypatch, tmp_path, "sandbox._enter_namespaces = lambda: False")
    monkeypatch.setattr(execution, "namespaces_permitted", True)
    assert execute_code("print(1)").stdout == "1\n"
    assert not execution.namespaces_permitted


@pytest.mark.parametrize(
    "change",
    ["import os; os.kill(os.getpid(), 9)", "sys.exit(3)", "import os; os.fork = lambda: 1 / 0", "raise OSError"],
)
def test_failing_launcher_is_no_timeout(monkeypatch, tmp_path, change):
    change_sandbox(monkeypatch, tmp_path, change)
    result = execute_code("print(1)")
    assert (result.success, result.timeout, result.stdout) == (False, False, "")
    assert result.error == "no result: the launcher of the program was killed or could not start it"


@linux_only
def test_program_of_a_dead_launcher_is_killed(mode):
    """As on systems where the program can signal its launcher."""
    folder = []

    def kill_launcher() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for child in psutil.Process().children():
                if len(child.children(recursive=True)) == (2 if "namespaces" in mode else 1):
                    folder.append(next(word for word in child.cmdline() if "nanochat-code-" in word))
                    time.sleep(0.2)
                    os.kill(child.pid, signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_launcher)
    killer.start()
    result = execute_code("import signal\nwhile True: pass", 30.0)
    killer.join()
    assert (result.success, result.timeout) == (False, False)
    deadline = time.monotonic() + 5
    while processes_with(folder[0]):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_call_is_quick():
    execute_code("")
    start = time.monotonic()
    for _ in range(5):
        assert execute_code("").success
    assert (time.monotonic() - start) / 5 < 0.5  # 0.05 on an idle machine
