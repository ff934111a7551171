"""Programs that try to leave the sandbox or exceed its limits, in each enclosure of this machine."""

import contextlib
import os
import platform
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from megatron_sov.judge.rewards.code import CodeReward
from megatron_sov.judge.rewards.reward import run_reward
from megatron_sov.sandbox.program import Limits, Program
from megatron_sov.sandbox.sandbox import SANDBOXES, Sandbox

PRELUDE = '''
import ctypes, errno, os, resource, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments):
    try:
        result = function(*arguments)
    except (OSError, ValueError) as e:
        print("REFUSED", type(e).__name__, e, flush=True)
    else:
        print("ALLOWED", function, arguments, result, flush=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) == -1:
        raise OSError(ctypes.get_errno(), "call %d" % number)
'''
"""Prefix of each program. It defines `attempt`, which prints whether an attack was refused, and `call`, which
makes the system call with a number of x86-64."""
QUICK = Limits(wall_s=0.4)
SMALL = Limits(wall_s=20, memory_bytes=128 << 20)


@dataclass(frozen=True)
class Attack:
    """A program and its expected outcome."""

    source: str
    statuses: tuple[str, ...] = ("ok",)
    """Possible statuses of the outcome: two if either of two limits may be exceeded first."""
    reason: str = ""
    """Text in the outcome's reason."""
    num_refused: int = 0
    """Least number of refused attempts."""
    limits: Limits = field(default_factory=lambda: Limits(wall_s=20))


ATTACKS = {
    "fork bomb": Attack("""
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.05)
""", ("timeout", "killed"), limits=QUICK),
    "memory bomb": Attack("x = bytearray(10 ** 10)", ("memory",), "refused memory", limits=SMALL),
    "memory bomb of several processes": Attack("""
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(b"x" * (30 << 20))
        time.sleep(5)
time.sleep(5)
""", ("memory",), "processes and threads", limits=SMALL),
    "thread bomb": Attack("""
for _ in range(1000):
    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
""", ("error", "memory"), "start new thread", limits=SMALL),
    "endless loop": Attack("while True: pass", ("timeout",), "processors",
                           limits=Limits(wall_s=20, cpu_s=0.2)),
    "endless sleep": Attack("time.sleep(100)", ("timeout",), "longer than 0.4 s", limits=QUICK),
    "stopping itself": Attack("os.kill(0, signal.SIGSTOP); time.sleep(9)", ("timeout",), limits=QUICK),
    "1 GB of output": Attack("""
for _ in range(1000):
    os.write(1, b"x" * 1000000)
""", ("output",), "standard output"),
    "1 GB of errors": Attack("""
for _ in range(1000):
    os.write(2, b"x" * 1000000)
""", ("output",), "standard error"),
    "a large file": Attack("""
with open("large", "wb", buffering=0) as f:
    attempt(lambda: [f.write(b"x" * (1 << 20)) for _ in range(40)])
    print(f.tell())
""", num_refused=1, limits=Limits(wall_s=5, file_bytes=1 << 20)),
    "many files": Attack("""
def fill():
    for i in range(100):
        with open(str(i), "wb", buffering=0) as f:
            f.write(b"x" * (1 << 20))
try:
    fill()
except OSError:
    print("REFUSED")
else:
    time.sleep(5)
""", ("ok", "output"), limits=Limits(wall_s=5, file_bytes=1 << 20)),
    "TCP": Attack("attempt(socket.create_connection, ('127.0.0.1', PORT), 1)\n"
                  "attempt(socket.socket, socket.AF_INET6)", num_refused=2),
    "UDP": Attack("attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', "
                  "('127.0.0.1', PORT)))", num_refused=1),
    "DNS": Attack("attempt(socket.getaddrinfo, 'example.com', 80)", num_refused=1),
    "Unix sockets": Attack("""
attempt(lambda: socket.socket(socket.AF_UNIX).connect(UNIX))
attempt(lambda: socket.socket(socket.AF_UNIX).connect("\\0sandbox-test-%d" % PARENT))
attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", UNIX_DATAGRAMS))
attempt(lambda: socket.socketpair()[0].connect(UNIX))
attempt(lambda: socket.socketpair()[0].sendto(b"x", UNIX))
""", num_refused=5),
    "raw sockets and netlink": Attack("""
attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)
""", num_refused=2),
    "writes outside": Attack("""
for path in ("/etc/evil", "/usr/lib/evil", "/evil", "/dev/evil", os.__file__, SECRET, FOLDER + "/evil"):
    attempt(open, path, "a")
attempt(os.truncate, SECRET, 0)
attempt(os.unlink, SECRET)
attempt(os.rename, SECRET, "x")
attempt(os.mkdir, FOLDER + "/evil")
""", num_refused=11),
    "reads outside": Attack("""
for path in (SECRET, "/etc/passwd", "/etc/hostname", "/var/log/dpkg.log", "/sys/kernel", "/dev/sda", "/x"):
    attempt(open, path)
attempt(os.listdir, FOLDER)
attempt(os.listdir, "/home")
attempt(os.link, SECRET, "x")
""", num_refused=10),
    "/proc": Attack("""
for path in ("/proc/self/environ", "/proc/1/environ", "/proc/self/mem", "/proc/%d/mem" % PARENT,
             "/proc/%d/environ" % PARENT, "/proc/%d/fd/0" % SERVER, "/proc/cpuinfo"):
    attempt(open, path)
attempt(os.listdir, "/proc")
""", num_refused=8),
    "changing modes and owners outside": Attack("""
os.chmod(SECRET, 0o777) if os.path.exists(SECRET) else None
attempt(os.chown, SECRET, 0, 0)
attempt(os.setxattr, SECRET, "user.x", b"x")
import fcntl
attempt(fcntl.ioctl, open(os.__file__), 0x40086602, bytes(8))  # FS_IOC_SETFLAGS
""", num_refused=3),
    "ptrace and memory of others": Attack("""
attempt(call, 101, 16, os.getppid() or PARENT, 0, 0)  # PTRACE_ATTACH
attempt(call, 310, PARENT, 0, 0, 0, 0, 0)  # process_vm_readv
attempt(call, 434, PARENT, 0)  # pidfd_open
attempt(resource.prlimit, PARENT, resource.RLIMIT_NOFILE, (0, 0))
""", num_refused=4),
    "signals": Attack("""
for pid in {os.getppid() or PARENT, PARENT, SERVER}:
    attempt(os.kill, pid, signal.SIGKILL)
try:
    os.kill(-1, signal.SIGKILL)  # all processes that it may signal, except itself
except OSError:
    pass
""", num_refused=2),
    "symbolic links": Attack("""
os.symlink(SECRET, "link")
attempt(open, "link")
attempt(open, "link", "w")
os.symlink("/", "root")
attempt(os.listdir, "root/home")
""", num_refused=3),
    "gaining privileges": Attack("""
for change in (os.setuid, os.setgid):
    attempt(change, 0)
attempt(os.setgroups, [0])
attempt(resource.setrlimit, resource.RLIMIT_AS, (-1, -1))
attempt(os.chroot, ".")
print("ALLOWED" if os.geteuid() == 0 else "REFUSED")
""", num_refused=6),
    "setuid programs": Attack("""
import subprocess
program = next((p for p in ("/usr/bin/su", "/usr/bin/mount", "/bin/su") if os.path.exists(p)), None)
if program:
    done = subprocess.run([program, "-c", "id"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    print("ALLOWED" if "uid=0" in done.stdout else "REFUSED")
"""),
    "device files": Attack("""
import stat
attempt(os.mknod, "memory", stat.S_IFCHR | 0o666, os.makedev(1, 1))
attempt(os.mknod, "disk", stat.S_IFBLK | 0o666, os.makedev(8, 0))
for path in ("/dev/mem", "/dev/kmsg", "/dev/tty", "/dev/fuse", "/dev/net/tun"):
    attempt(open, path, "rb")
""", num_refused=7),
    "namespaces and mounts": Attack("""
attempt(call, 272, 0x10000000)  # unshare
attempt(call, 272, 0x00020000)
attempt(call, 56, 0x10000000 | 17, 0, 0, 0, 0)  # clone
attempt(call, 435, 0, 0)  # clone3
attempt(call, 165, b"none", b"/", b"tmpfs", 0, 0)  # mount
attempt(call, 155, b".", b".")  # pivot_root
attempt(call, 308, 0, 0)  # setns
""", num_refused=7),
    "calls that attacks have used": Attack("""
for number in (425, 321, 298, 323, 250, 248, 319, 29, 68, 246, 175, 169, 135, 304, 300, 451, 462, 0x40000029):
    attempt(call, number, 0, 0, 0, 0, 0)  # io_uring, bpf, perf, userfaultfd, keys, ..., newer ones, x32
""", num_refused=18),
    "calls of another architecture": Attack("""
import mmap
attempt(call, 0x40000000 + 41, 2, 1, 0)  # x32
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("b814000000 cd80 c3"))  # i386: mov eax, getpid; int 0x80; ret
given = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
print("REFUSED" if given < 0 else "ALLOWED", given)
""", ("ok", "killed"), num_refused=1),
    "files that were left open": Attack("""
for fd in range(3, 64):
    attempt(os.fstat, fd)
""", num_refused=61),
    "a deep pickle": Attack("""
import pickle
hash(pickle.loads(b"(" * 300000 + b"t" * 300000 + b"."))  # the interpreter's stack ends before
""", ("killed",), "SIGSEGV", limits=Limits(wall_s=30)),
    "a deep folder": Attack("""
for _ in range(1000):  # of names that are too long together for any path
    os.mkdir("folder")
    os.chdir("folder")
"""),
    "an exit in the middle": Attack("print('REFUSED', flush=True)\nos._exit(0)\nprint('ALLOWED')",
                                    num_refused=1),
    "a process left behind": Attack("""
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        os.setsid()
    except OSError:
        pass
    if os.fork() == 0:
        time.sleep(100)
    time.sleep(100)
print("REFUSED")
""", num_refused=1),
}


class Outside:
    """Files, processes and sockets outside the sandbox, which attacks must neither change nor reach."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.secret = folder, folder / "secret"
        self.secret.write_text("the secret")
        self.secret.chmod(0o644)
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
        self.udp.bind(self.tcp.getsockname())
        self.unix, self.abstract, self.unix_datagrams = (
            socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_STREAM,
                                                             socket.SOCK_DGRAM))
        self.unix.bind(str(folder / "socket"))
        self.unix_datagrams.bind(str(folder / "datagrams"))
        self.abstract.bind(f"\0sandbox-test-{os.getpid()}")
        for listening in (self.unix, self.abstract):
            listening.listen()
        self.initial_state = self.read_state()

    def format_names(self) -> str:
        """Return lines of a program that define names for these files, processes and sockets."""
        (server, *_) = psutil.Process().children()
        return (f"PORT, PARENT, SERVER = {self.tcp.getsockname()[1]}, {os.getpid()}, {server.pid}\n"
                f"FOLDER = {str(self.folder)!r}\n"
                "SECRET, UNIX, UNIX_DATAGRAMS = (FOLDER + x for x in ('/secret', '/socket', '/datagrams'))\n")

    def read_state(self) -> tuple[object, ...]:
        """Return text, mode and owner of the secret, the names of files, and the process ids of children."""
        status = self.secret.stat()
        return (self.secret.read_text(), status.st_mode, status.st_uid, sorted(os.listdir(self.folder)),
                sorted(child.pid for child in psutil.Process().children(recursive=True)))

    def list_reached_sockets(self) -> list[str]:
        """Return the names of sockets that received a connection or data."""
        reached = []
        for name in ("tcp", "udp", "unix", "abstract", "unix_datagrams"):
            listening = getattr(self, name)
            listening.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                listening.recv(1) if listening.type == socket.SOCK_DGRAM else listening.accept()
                reached.append(name)
        return reached


@pytest.fixture(scope="module")
def outside(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """The outside of `sandbox`, whose server process already runs."""
    outside = Outside(tmp_path_factory.mktemp("outside"))
    yield outside
    for opened in (outside.tcp, outside.udp, outside.unix, outside.abstract, outside.unix_datagrams):
        opened.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained(sandbox: Sandbox, outside: Outside, name: str) -> None:
    attack = ATTACKS[name]
    if "attempt(call" in attack.source and platform.machine() != "x86_64":
        pytest.skip("its calls are numbered for x86-64")
    outcome = sandbox.run(Program(PRELUDE + outside.format_names() + attack.source), attack.limits)
    assert outcome.status in attack.statuses, outcome
    assert attack.reason in outcome.reason and (outcome.status == "ok") == (not outcome.reason)
    assert "ALLOWED" not in outcome.stdout, outcome.stdout
    assert outcome.stdout.count("REFUSED") >= attack.num_refused, outcome
    assert len(outcome.stdout) <= attack.limits.output_bytes
    assert outside.read_state() == outside.initial_state
    assert outside.list_reached_sockets() == []
    assert sandbox.run(Program("print(1)")).stdout == "1\n", "the next program runs as usual"


def test_secrets_of_the_environment_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the secret")
    with Sandbox() as sandbox:
        outcome = sandbox.run(Program("import os; print(dict(os.environ), os.popen('env').read())"))
    assert outcome.status == "ok" and "HOME=" in outcome.stdout
    assert "secret" not in outcome.stdout


SEARCH = r'''
import ctypes, gc, os, re, sys
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
PAGE = 4096
found = set()
own = "planted" + str(len("own")) + "own"  # the text that the search must find
def look(data):
    found.update(re.findall(rb"plante[d]\d\w+", data))
def look_at_memory():
    reads, writes = os.pipe()
    anchors = [id(own), id(found), id(sys), ctypes.cast(libc.write, ctypes.c_void_p).value,
               ctypes.addressof(ctypes.c_int()), libc.sbrk(0)]
    near = sorted({anchor >> 24 for anchor in anchors})
    done = set()
    for place in near:
        for block in range(place - 4, place + 5):  # of 16 MiB
            if block in done or block < 0:
                continue
            done.add(block)
            address, end, last = block << 24, (block + 1) << 24, b""
            while address < end:
                # write() reads the memory: for an unmapped page it returns -1 instead of ending this process
                written = libc.write(writes, address, min(16 * PAGE, end - address))
                if written <= 0:
                    address, last = address + PAGE, b""
                    continue
                data = os.read(reads, written)
                look(last + data)
                last, address = data[-64:], address + written
def look_at_all():
    look_at_memory()
    look(repr([o for o in gc.get_objects() if isinstance(o, (str, bytes, dict, list))]).encode())
    look(repr([os.environ, sys.argv, sys.orig_argv]).encode())
    frame = sys._getframe()
    while frame:
        look(repr([frame.f_locals, frame.f_globals]).encode())
        frame = frame.f_back
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, False)
            look(os.read(fd, 1 << 20))
        except OSError:
            pass
    paths = ["/proc/%s/%s" % (pid, name) for pid in ("self", os.getppid(), 1)
             for name in ("environ", "cmdline", "mem", "maps")]
    for folder in (".", "..", "/tmp", "/dev/shm"):
        try:
            paths += [os.path.join(folder, name) for name in os.listdir(folder)]
            look(repr(paths).encode())
        except OSError:
            pass
    for path in paths:
        try:
            with open(path, "rb") as f:
                look(f.read(1 << 20))
        except OSError:
            pass
    return found
'''
"""A program that collects the texts "planted<digit>..." of its memory, objects, files in the set `found`."""


def test_a_program_sees_nothing_of_earlier_programs(sandbox: Sandbox,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGES_KEY", "planted1environment")
    for i in range(6):
        sandbox.run(Program(
            f"# planted2source{i}\nopen('planted3made{i}', 'w').write('planted4text{i}')\n"
            f"import sys\nprint('planted5output{i}', input(), file=[sys.stdout, sys.stderr][{i} % 2])\n"
            f"sys.exit('planted6end{i}')",
            stdin=f"planted7input{i}\n", files={f"planted8file{i}": "x" * 5000 + f"planted9text{i}"}))
    outcome = sandbox.run(Program(SEARCH + "look_at_all(); print(sorted(found))"))
    assert outcome.status == "ok", outcome
    assert set(re.findall(r"planted\d\w+", outcome.stdout)) == {"planted3own"}


@pytest.mark.tier1_cases(2)
@pytest.mark.parametrize("tests", [
    [{"stdin": "", "stdout": "planted1expected"}] * 2,
    ["assert f(1, [2]) == 'planted1expected'", "assert f('planted2argument', []) == 'planted1expected'"],
    [{"function": "f", "arguments": [0, []], "expected": "planted1expected"}] * 2])
def test_a_solution_cannot_see_its_tests(sandbox: Sandbox, tests: list,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SANDBOXES, (sandbox.enclosure, (), 1), sandbox)
    honest = "def f(x, y):\n    return 'planted1expected'\nprint('planted1expected')"
    cheat = SEARCH + r'''
def f(x, y):
    look_at_all()
    hits = sorted(hit.decode() for hit in found if hit.endswith(b"expected"))
    return hits[0] if hits else len(found)  # 1: only the text `own`
import __main__
if "__file__" in vars(__main__) and "solution" not in __file__:
    print(f(0, 0))
'''
    code = CodeReward(enclosure=sandbox.enclosure, all_or_nothing=False, test_time_s=20)
    assert run_reward(code, {"response": honest, "tests": tests}).reward == 1.0
    result = run_reward(code, {"response": cheat, "tests": tests})
    assert (result.status, result.reward) == ("scored", 0.0), result
    row = {"response": cheat, "tests": ["assert f(0, 0) == 1"]}
    assert run_reward(code, row).reward == 1.0, "the search has run and found its own text"
