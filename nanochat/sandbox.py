"""The trusted program around a piece of untrusted Python: execution.py starts it, nothing imports it.

It is a process of its own because limits, namespaces and the clean-up belong to a process, and because setting them up
between fork and exec (preexec_fn) is not safe in a program with threads. The processes are

    caller ─ launcher ─ init ─ the code      where the kernel permits namespaces
    caller ─ launcher ─ the code             elsewhere

The launcher keeps the time and outlives the code. The init is the first process of a PID namespace: when it ends, the
kernel ends everything in there. Without namespaces the launcher is the subreaper of what the code leaves behind, and
kills that. Root gives the code a user id that nobody else has, so that it may neither signal nor read other processes,
and so that the limit on processes holds (it does not for root).

The protocol. Arguments: folder, seconds, bytes of memory, whether to use namespaces (0 or 1), the descriptor for the
result. Standard input: 8 bytes of length, then the code; its end later than that means that the caller is gone.
Result: "refused" when the kernel permits no namespaces; else a line with the id of the launcher's child, then a line
"ended <exit code>" or "timeout", then what the code's process reports: "end", "memory <error>", "error <error>", or
nothing. Exit codes are a shell's: 128 + n is signal n.

Only modules that are quick to import are used: the launcher starts anew for each piece of code. Everything that a
system lacks is left out silently; execution.py's docstring says what that means.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

MAX_PROCESSES = 64  # with their threads
MAX_FILE_BYTES = 16 << 20
MAX_FOLDER_BYTES = 64 << 20  # of all files together, where the folder is a file system of its own
MAX_OPEN_FILES = 256
MAX_REPORT_BYTES = 4096
SPARE_MEMORY_BYTES = 32 << 20  # to report an error after the memory was used up
POLL_SECONDS = 0.004
TOKEN_CHARS = 32

# linux/sched.h, linux/mount.h, linux/prctl.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38

# machine -> (its name in linux/audit.h, the numbers of these system calls)
SYSTEM_CALLS = (
    *("socket", "kill", "tgkill", "prlimit64", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"),
    *("ptrace", "process_vm_writev", "pidfd_send_signal", "io_uring_setup"),
)
SYSTEM_CALL_NUMBERS = {
    "x86_64": (0xC000003E, (41, 62, 234, 302, 200, 129, 297, 101, 311, 424, 425)),
    "aarch64": (0xC00000B7, (198, 129, 131, 261, 130, 138, 240, 117, 271, 424, 425)),
}


def main(folder: str, timeout_seconds: float, maximum_memory_bytes: int, use_namespaces: bool, result_fd: int) -> int:
    """Run the code that comes in on standard input; see above. Returns an exit code in the launcher and in the code's
    process: this function returns in both."""
    code = _receive_code()
    inherited, result_fd = result_fd, os.dup(result_fd)  # a low number, among those that are closed later
    os.close(inherited)
    if use_namespaces and not _enter_namespaces():
        os.write(result_fd, b"refused")
        return 0
    uid = _spare_uid()
    _prctl(PR_SET_DUMPABLE, 0)  # processes of the same user can neither read nor change this one
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    token_r, token_w = os.pipe()
    report_r, report_w = os.pipe()
    child = os.fork()
    if child == 0:
        if use_namespaces:
            _become_init(folder, uid)
        _confine(folder, uid, timeout_seconds, maximum_memory_bytes, {token_r, report_w}, not use_namespaces)
        return _run(code, token_r, report_w)
    # The token is made only now, and waits in the kernel: the code's process fetches it when the code has ended.
    token = os.urandom(TOKEN_CHARS // 2).hex().encode("ascii")
    os.write(token_w, token)
    os.write(result_fd, b"%d\n" % child)
    exit_code = _wait(child, time.monotonic() + timeout_seconds)
    _kill_all(child, uid, use_namespaces, has_ended=exit_code is not None)
    outcome = b"timeout" if exit_code is None else b"ended %d" % exit_code
    os.set_blocking(report_r, False)
    with contextlib.suppress(BlockingIOError):
        reported_token, _, report = os.read(report_r, MAX_REPORT_BYTES).partition(b" ")
        outcome += b"\n" + report if reported_token == token else b""
    os.write(result_fd, outcome)
    return 0


def _receive_code() -> str:
    """The code from standard input, which stays open."""
    (length,) = struct.unpack("<Q", os.read(0, 8))
    chunks, received = [], 0
    while received < length:
        chunks.append(os.read(0, min(1 << 20, length - received)))
        if not chunks[-1]:
            raise SystemExit(1)  # the caller is gone
        received += len(chunks[-1])
    return b"".join(chunks).decode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------------------------
# The kernel


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, argument: int = 0) -> None:
    """prctl where there is one."""
    if sys.platform == "linux":
        _libc().prctl(option, *(ctypes.c_ulong(n) for n in (value, argument, 0, 0)))


def _enter_namespaces() -> bool:
    """Put this process (its children, as for PIDs) into namespaces of its own; whether the kernel permits that.

    After False this process may be in a state in which nothing works: it should end.
    """
    if sys.platform != "linux":
        return False
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if _libc().unshare(flags) == 0:
        return True
    if _libc().unshare(flags | CLONE_NEWUSER) != 0:
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(text)
    except OSError:
        return False
    return True


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> bool:
    texts = [text.encode() for text in (source, target, kind, options)]
    return _libc().mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]) == 0


def _set_mount_attributes(path: str, attributes: int, is_set: bool, recursive: bool = False) -> bool:
    change = struct.pack("QQQQ", *((attributes, 0) if is_set else (0, attributes)), 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    arguments = (AT_FDCWD, path.encode(), flags, ctypes.create_string_buffer(change, len(change)), len(change))
    texts = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _libc().syscall(ctypes.c_long(SYS_MOUNT_SETATTR), *texts) == 0


def _close_files(folder: str, uid: int | None) -> None:
    """In a mount namespace: make everything read-only but the folder, which becomes a small file system in memory."""
    if not _mount("none", "/", "", MS_REC | MS_PRIVATE):  # else mounts would appear outside
        return
    owner = os.geteuid() if uid is None else uid
    options = f"size={MAX_FOLDER_BYTES},nr_inodes=4096,mode=700,uid={owner}"
    writable = [path for path in (folder, "/dev/shm") if _mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options)]
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)  # the processes of the namespace, no others
    if folder in writable:
        _set_mount_attributes("/", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, True, recursive=True)
        for path in writable:
            _set_mount_attributes(path, MOUNT_ATTR_RDONLY, False)


def _spare_uid() -> int | None:
    """A user id that nobody has, for root to give away; None for ordinary users and a root that may not do that."""
    if os.geteuid() != 0:
        return None
    uid = 0x40000000 + int.from_bytes(os.urandom(3), "little")
    try:
        os.setegid(uid)
        os.seteuid(uid)
    except OSError:
        return None
    finally:
        os.seteuid(0)
        os.setegid(0)
    return uid


def _filter_system_calls(no_signals: bool) -> None:
    """Where there are no namespaces: no sockets but those of the machine itself, and signals to this process alone.

    no_signals: False leaves signals alone, and what else an ordinary user may do to processes of its own. Needs no
    rights; does nothing on machines that are not in the table.
    """
    if sys.platform != "linux" or os.uname().machine not in SYSTEM_CALL_NUMBERS:
        return
    architecture, numbers = SYSTEM_CALL_NUMBERS[os.uname().machine]
    number_of = dict(zip(SYSTEM_CALLS, numbers, strict=True))
    load, jump_equal, jump_at_least, end = 0x20, 0x15, 0x35, 0x06  # BPF: LD W ABS, JEQ K, JGE K, RET K
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # refused with EPERM
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0)]
    program += [(jump_at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # x86_64 under its other numbers
    refused = ["io_uring_setup"]  # it opens sockets, too
    if no_signals:
        refused += ["tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "ptrace", "process_vm_writev"]
        for name in ("kill", "tgkill", "prlimit64"):  # 0 is the code's own process group, or process
            program += [(jump_equal, 0, 5, number_of[name]), (load, 0, 0, 16), (jump_equal, 1, 0, os.getpid())]
            program += [(jump_equal, 0, 1, 0), (end, 0, 0, allow), (end, 0, 0, refuse)]
    for name in refused:
        program += [(jump_equal, 0, 1, number_of[name]), (end, 0, 0, refuse)]
    program += [(jump_equal, 0, 3, number_of["socket"]), (load, 0, 0, 16), (jump_equal, 1, 0, 1), (end, 0, 0, refuse)]
    program += [(end, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    _prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))


def _processes() -> list[tuple[int, int, str, int, int]]:
    """(id, parent's id, state, threads, user id) of each process; none where there is no /proc."""
    found = []
    for name in os.listdir("/proc") if sys.platform == "linux" else []:
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{int(name)}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                uid = os.fstat(file.fileno()).st_uid
            found.append((int(name), int(fields[1]), fields[0].decode(), int(fields[17]), uid))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The launcher


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _wait(child: int, deadline: float) -> int | None:
    """The exit code of the child, or None when the deadline passes before or the caller goes away."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return _exit_code(status)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return None
        if pid == 0 and select.select([0], [], [], min(remaining, POLL_SECONDS))[0]:
            return None


def _kill_all(child: int, uid: int | None, use_namespaces: bool, has_ended: bool) -> None:
    """Kill the child and whatever it started, and wait until that is gone."""
    if not has_ended:
        os.kill(child, signal.SIGKILL)
    if not use_namespaces:
        if uid is not None:
            _kill_user(uid)
        elif sys.platform == "linux":
            _kill_descendants()
        else:
            with contextlib.suppress(OSError):
                os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _kill_user(uid: int) -> None:
    """Kill all processes of a user at once: a process of that user does it, for it may kill no others."""
    if os.fork() == 0:
        try:
            os.setuid(uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)


def _kill_descendants() -> None:
    """Kill all descendants, those that hide in sessions of their own included: orphans became this process's children.

    They are stopped first, and dead ones are not collected before all are killed: so no place becomes free, among the
    processes that are permitted, in which a survivor could start another.
    """
    while True:
        family, processes = {os.getpid()}, _processes()
        while grown := {pid for pid, parent, *_ in processes if parent in family} - family:
            family |= grown
        alive = [pid for pid, _, state, *_ in processes if pid in family and state != "Z" and pid != os.getpid()]
        if not alive:
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in alive:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _become_init(folder: str, uid: int | None) -> None:
    """As the first process of a PID namespace: fork a second one, and return in that alone.

    No signal from inside reaches the first: the kernel drops those for which it has no handler.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with the launcher everything ends
    _close_files(folder, uid)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return
    os.closerange(0, MAX_OPEN_FILES)
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(_exit_code(status))


# ---------------------------------------------------------------------------------------------------------------------
# The process of the code


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a limit, as far as the limits in force and the system permit."""
    ceiling = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (soft, hard))


def _confine(
    folder: str, uid: int | None, timeout_seconds: float, maximum_memory_bytes: int, keep: set[int], is_open: bool
) -> None:
    """Give up in this process whatever the code is not to have. keep: descriptors that stay open beside 0, 1 and 2.

    is_open: there are no namespaces around.
    """
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for fd in set(range(3, MAX_OPEN_FILES)) - keep:
        with contextlib.suppress(OSError):
            os.close(fd)
    os.chdir(folder)
    library = {path: os.open(path, os.O_RDONLY) for path in sys.path if os.path.isdir(path)}
    num_processes = MAX_PROCESSES
    if uid is None:  # the user's other processes count as well
        num_processes += sum(threads for *_, threads, owner in _processes() if owner == os.geteuid())
    if uid is not None or sys.platform == "linux":  # elsewhere the number is not known
        _limit(resource.RLIMIT_NPROC, num_processes)
    cpu_seconds = int(timeout_seconds) + 2
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)
    _limit(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    if uid is not None:
        os.chown(folder, uid, uid)
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    if sys.platform == "linux":
        no_capabilities = ctypes.create_string_buffer(24)
        _libc().capset(ctypes.create_string_buffer(struct.pack("II", 0x20080522, 0)), no_capabilities)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 1)  # so that it may look at itself in /proc
    _keep_library(library)
    if is_open:
        _filter_system_calls(no_signals=uid is None)
    _limit(resource.RLIMIT_AS, maximum_memory_bytes, maximum_memory_bytes + SPARE_MEMORY_BYTES)


def _keep_library(library: dict[str, int]) -> None:
    """See that the standard library can be imported. library: path -> open descriptor of its folders.

    Where it lies in a folder that is closed to other users, such as /root, it is reached by the descriptors.
    """
    if os.access(os.__file__, os.R_OK):
        for fd in library.values():
            os.close(fd)
        return
    places = {path: f"/proc/self/fd/{fd}" for path, fd in library.items()}
    sys.path[:] = [places.get(path, path) for path in sys.path]
    for module in list(sys.modules.values()):
        package_path = getattr(module, "__path__", None)
        if isinstance(package_path, list):
            folders = [
                max((p for p in places if folder.startswith(p + "/")), default="", key=len) for folder in package_path
            ]
            package_path[:] = [
                places.get(f, "") + path[len(f) :] for f, path in zip(folders, package_path, strict=True)
            ]


def _run(code: str, token_fd: int, report_fd: int) -> int:
    """Run the code as __main__ and report how it ended; returns the exit code. The interpreter then ends as usual.

    What is needed afterwards is fetched before, as the code may replace anything.
    """
    getpid, read, write, hook, errors = os.getpid, os.read, os.write, sys.__excepthook__, sys.stderr
    limits, set_limits = resource.getrlimit(resource.RLIMIT_AS), resource.setrlimit
    describe, pid = _describe, os.getpid()
    module = type(sys)("__main__")
    sys.modules["__main__"] = module  # the old one lives on in the functions that are running
    sys.argv[:] = ["<code>"]

    def report(text: str) -> None:
        if getpid() == pid:  # a fork of it may come here, too
            with contextlib.suppress(OSError):
                write(
                    report_fd, (read(token_fd, TOKEN_CHARS) + b" " + text.encode("utf-8", "replace"))[:MAX_REPORT_BYTES]
                )

    try:
        exec(compile(code, "<code>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        with contextlib.suppress(ValueError, OSError):
            set_limits(resource.RLIMIT_AS, (limits[1], limits[1]))
        report(f"{'memory' if isinstance(error, MemoryError) else 'error'} {describe(error)}")
        if isinstance(error, SystemExit):
            raise
        sys.stderr = errors
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this function
        hook(type(error), error, error.__traceback__)
        return 1
    report("end")
    return 0


def _describe(error: BaseException) -> str:
    """'ValueError: x', on one line."""
    kind = type(error)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        text = " ".join(str(error).split())[:1000]
    except Exception:
        text = "<no text>"
    return f"{name}: {text}" if text else name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5])))
