"""Settings and fixtures of all tests.

Examples of Hypothesis are the same in every run. Ranks are real processes, forked from a worker that has
imported Megatron-Core once (`Worker`). Models are tiny.
"""

from __future__ import annotations

import base64
import ctypes
import gc
import hashlib
import html
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import given, is_hypothesis_test, settings, strategies

import megatron_sov.engine  # noqa: F401  prepares the import of megatron-core without triton
from tests import tiers
from tests.command_output import cli_main, get_refusal, read_output, run_checked  # noqa: F401  fixtures
from tests.each_row import pytest_pycollect_makeitem  # noqa: F401
from tests.tiers import (  # noqa: F401  hooks of pytest
    pytest_addoption, pytest_collection_modifyitems, pytest_configure, pytest_runtest_call,
    pytest_runtest_setup, pytest_runtest_teardown)

if TYPE_CHECKING:
    from tests.packing import Packed

ROOT = Path(__file__).parents[1]
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# so that `return_freed_memory` works: glibc would keep a heap per thread, and pyarrow's allocator gigabytes
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


class EagerLibrary:
    """Import hook that disables compilation in megatron-core's `jit` module.

    A test file may import the library before `cpu_shims` is installed; compilation would then cost seconds
    per function in all later tests.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of megatron-core's `jit` module, or None for other modules."""
        spec = PathFinder.find_spec(name, path) if name == "megatron.core.jit" else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_eagerly(module: Any) -> None:
                execute(module)
                module.jit_fuser = lambda function: function

            spec.loader.exec_module = execute_eagerly  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, EagerLibrary)  # type: ignore[arg-type]
GROWTH_BYTES = 32 << 20
"""Growth of a pytest process after which it returns freed memory to the system."""


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Speed up garbage collection and warm up Hypothesis.

    The million objects of collected tests stay until the end, so the garbage collector skips them and runs
    less often; it used an eighth of all processor time. Hypothesis builds its table of characters and reads
    the constants of our modules now: this takes seconds, which would count as time of the first test that
    draws text.
    """
    gc.disable()
    result = yield
    if any(is_hypothesis_test(getattr(item, "obj", None)) for item in session.items):
        _draw_text()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
    return result


@settings(max_examples=1, database=None, deadline=None)
@given(strategies.text())
def _draw_text(_: str) -> None:
    """Draw one text."""


_kept_bytes = [0]


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """Return a list that receives the records of loggers at level warning and above."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    loggers = logging.getLogger(), logging.getLogger("transformers")  # which passes nothing on to the root
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def solar_open2() -> None:
    """Register Solar Open 2 with transformers, which has no class for it yet."""
    from tests.solar_open2 import known_to_transformers

    known_to_transformers()


@pytest.fixture(scope="module", autouse=True)
def return_freed_memory() -> Iterator[None]:
    """Return freed memory to the system after each file that has increased it.

    Otherwise the process would keep the size of its largest test.
    """
    yield
    if sys.platform == "linux" and psutil.Process().memory_info().rss > _kept_bytes[0] + GROWTH_BYTES:
        ctypes.CDLL(None).malloc_trim(0)
        _kept_bytes[0] = psutil.Process().memory_info().rss


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGALRM, signal.SIGCHLD)


@contextmanager
def restore_process_state(folder: Path) -> Iterator[None]:
    """Undo side effects that later tests in this process would see.

    These are signal handlers, environment variables of Transformer Engine, and modules imported from below
    `folder`, whose names other tests reuse.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    variables = {name: value for name, value in os.environ.items() if name.startswith("NVTE_")}
    num_modules = len(sys.modules)
    yield
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:  # None: not set by Python
            signal.signal(number, handler)
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]
    os.environ.update(variables)
    below = f"{folder}{os.sep}"
    for name in [*islice(reversed(sys.modules), max(0, len(sys.modules) - num_modules))]:
        spec = getattr(sys.modules[name], "__spec__", None)
        if not spec:  # a plugin file, whose module name has its path
            continue
        origin = spec.origin or str(next(iter(spec.submodule_search_locations or ()), ""))
        if origin.startswith(below):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def restore_process_after_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Apply `restore_process_state` to each test."""
    with restore_process_state(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module", autouse=True)
def restore_process_after_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Apply `restore_process_state` to the fixtures of a file; Ray replaces the handler of SIGTERM."""
    if sys.modules.get("transformer_engine", "") is None:  # a process that prepares for a CPU hides it
        del sys.modules["transformer_engine"]
    with restore_process_state(tmp_path_factory.getbasetemp()):
        yield


MANY_THREADS = 100
_kept_threads = [0]


@pytest.hookimpl(trylast=True, specname="pytest_runtest_teardown")
def pytest_drop_garbage() -> None:
    """Collect garbage when a test leaves many threads.

    Process groups of discarded models keep threads that wake a hundred times a second, which took half of a
    worker's processor time. Threads that remain afterwards are of libraries, and do not count the next time.
    """
    if sys.platform != "linux":
        return
    now = len(os.listdir("/proc/self/task"))
    _kept_threads[0] = min(_kept_threads[0], now)
    if now > _kept_threads[0] + MANY_THREADS:
        gc.collect()
        _kept_threads[0] = len(os.listdir("/proc/self/task"))


@dataclass(frozen=True)
class Job:
    """A function of a test file that runs on `nproc` ranks.

    The function is at module level, joins the world itself, and returns JSON values; its keyword arguments
    are JSON values too.
    """

    file: str
    function: str
    nproc: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)


def refuse_to_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn skips into failures if SOV_NEEDS_ALL is set, as in `.ci/run`, where all programs are installed."""
    is_skip = report.skipped and isinstance(report.longrepr, tuple)  # otherwise an expected failure
    if is_skip and os.environ.get("SOV_NEEDS_ALL"):
        report.outcome = "failed"
        report.longrepr = f"SOV_NEEDS_ALL is set, and this would be {report.longrepr[-1]}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Judge the test's processor time and its skip; tests for a GPU may be skipped."""
    report = yield
    tiers.judge_processor_time(item, report)
    if not item.get_closest_marker("gpu"):
        refuse_to_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Apply `refuse_to_skip` to files that are skipped as a whole."""
    report = yield
    refuse_to_skip(report)
    return report


Ranks = Callable[..., list[list[Any]]]
NO_RANK = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a process which is not a rank must not have."""
TE_DOUBLE = Path(__file__).with_name("te_double")


class Server:
    """A process (rank_main.py) that imports Megatron-Core at the first request, and runs each in a fork.

    It listens on the Unix socket `address`. `doubles` are folders of modules that replace libraries.
    """

    def __init__(self, *doubles: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.address = str(Path(self._folder.name) / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            # -P: the folder of tests has subfolders with the names of our packages
            command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("rank_main.py")),
                       str(listener.fileno()), *map(str, doubles)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


SHARED = "SOV_TESTS_SERVERS"
"""Environment variable with the addresses (JSON) of workers that several pytest processes share."""


@contextmanager
def shared_workers() -> Iterator[dict[str, str]]:
    """Yield the addresses of workers that several pytest processes share."""
    with closing(Server()) as server, closing(Server(TE_DOUBLE)) as te_server:
        yield {"worker": server.address, "te_worker": te_server.address}


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Start the shared workers before pytest forks, unless made_once.py has started them."""
    if SHARED in os.environ or getattr(session.config.option, "forks", 0) < 2:
        return (yield)
    with shared_workers() as addresses:
        os.environ[SHARED] = json.dumps(addresses)
        try:
            return (yield)
        finally:
            del os.environ[SHARED]


class Worker:
    """Client of a `Server`."""

    def __init__(self, folder: Path, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("rw")
        self._folder = folder
        self._num_requests = 0

    def run(self, timeout_s: float, file_limit_bytes: int | None = None, without: Collection[str] = (),
            **task: Any) -> subprocess.CompletedProcess[str]:
        """Run a task in the environment and folder of this process, and return it as `subprocess.run` would.

        Args:
            timeout_s: the task is killed after this time.
            file_limit_bytes: maximum size of a file that it writes, or None.
            without: environment variables that it does not get.
            task: `jobs`, a file with jobs; or `program` and `argv`, a command; or `stays` and `arguments`, a
                function (file, name) whose end is not awaited.
        """
        self._num_requests += 1
        out, err = (self._folder / f"{self._num_requests}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()
        request = task | {"timeout_s": timeout_s, "file_limit_bytes": file_limit_bytes, "out": str(out),
                          "err": str(err), "folder": os.getcwd()}
        request["environment"] = {name: value for name, value in os.environ.items() if name not in without}
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        answer = self._lines.readline()
        if not answer:
            pytest.exit("the worker has ended; see its error above")
        code, used_s = answer.split()
        tiers.charge(float(used_s))
        return subprocess.CompletedProcess(task, int(code), out.read_text(errors="replace"),
                                           err.read_text(errors="replace"))

    def close(self) -> None:
        """Disconnect; a running task ends."""
        self._lines.close()
        self._socket.close()


def _open_worker(folder: Path, name: str, *doubles: Path) -> Iterator[Worker]:
    """Yield a client of the server that pytest processes share, or else of an own server."""
    addresses = json.loads(os.environ.get(SHARED, "{}"))
    own_server = None if name in addresses else Server(*doubles)
    worker = Worker(folder, own_server.address if own_server else addresses[name])
    yield worker
    worker.close()
    if own_server:
        own_server.close()


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Return the worker of all tests."""
    yield from _open_worker(tmp_path_factory.mktemp("worker"), "worker")


@pytest.fixture(scope="session")
def te_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Return the worker of all tests whose models use the double of Transformer Engine."""
    yield from _open_worker(tmp_path_factory.mktemp("te_worker"), "te_worker", TE_DOUBLE)


@pytest.fixture
def ranks(tmp_path: Path, worker: Worker) -> Ranks:
    """Return `run(Job, ...)`, which returns the results of each job as a list over ranks."""
    return _build_ranks(worker, tmp_path / "jobs")


@pytest.fixture
def te_ranks(tmp_path: Path, te_worker: Worker) -> Ranks:
    """Return the fixture `ranks` with the Transformer Engine double."""
    return _build_ranks(te_worker, tmp_path / "te_jobs")


def _build_ranks(worker: Worker, folder: Path) -> Ranks:

    def run(*jobs: Job, timeout_s: float = 600) -> list[list[Any]]:
        folder.mkdir(exist_ok=True)
        (folder / "jobs.json").write_text(json.dumps([asdict(j) for j in jobs]))
        result = worker.run(timeout_s, jobs=str(folder / "jobs.json"))
        assert result.returncode == 0, f"exit code {result.returncode}: {result.stderr[-4000:]}"
        return [[json.loads((folder / f"{n}-{r}.json").read_text()) for r in range(job.nproc)]
                for n, job in enumerate(jobs)]

    return run


@pytest.fixture(scope="session")
def run_command(worker: Worker) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return `run_command(*argv, program="megatron-sov", file_limit_bytes=None, timeout_s=600)`.

    It runs a command in a fork of a process that has imported Megatron-Core and is not a rank, which saves
    the start-up time of a command.
    """

    def run(*argv: str, program: str = "megatron-sov", file_limit_bytes: int | None = None,
            timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        return worker.run(timeout_s, file_limit_bytes, NO_RANK, program=program, argv=argv)

    return run


@pytest.fixture(scope="session")
def warm_python(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a `python` that has already imported Megatron-Core.

    Commands of `run_command` start child processes with it if SOV_TESTS_PYTHON names it. Without the rights
    of root, the path is that of Python itself.
    """
    if os.geteuid():
        return sys.executable
    folder = tmp_path_factory.mktemp("warm")
    program = folder / "python3"  # tests of jobs identify ranks by a process name that begins with python
    program.write_text(f"#!{sys.executable} -IS\n"
                       + Path(__file__).with_name("warm_client.py").read_text(encoding="utf-8"))
    program.chmod(0o755)
    worker.run(600, stays=[str(Path(__file__).with_name("warm_python.py")), "serve"], arguments=[str(folder)])
    while not (folder / "warm.socket").exists():
        time.sleep(0.01)
    tiers.charge_lines_of(folder / "used_seconds.txt")
    return str(program)


@pytest.fixture
def job() -> type[Job]:
    """Return the class that describes a job of `ranks` (test modules cannot import this file)."""
    return Job


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; an unreaped process still has its id."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def ends() -> Callable[[int], bool]:
    """Return `ends(pid)`, which waits up to 600 s until a process has ended, and returns whether it has.

    The process may be a child of any process.
    """

    def wait(pid: int) -> bool:
        deadline_s = time.monotonic() + 600
        while not has_ended(pid) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return has_ended(pid)

    return wait


BROWSERS = ("chromium", "google-chrome", "chrome", "chromium-browser")
BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--window-size=1200,900", "--virtual-time-budget=10000", "--dump-dom")
OpenPage = Callable[[Path], tuple[str, list[str]]]
LAYOUT_JS = Path(__file__).parent / "base/pages/layout.js"
Screen = tuple[str, int, int]
SCREENS: tuple[Screen, ...] = (("dark", 390, 844), ("light", 820, 1180), ("light", 1440, 900))
"""(color scheme, width, height in CSS pixels) of a phone, a tablet and a notebook. The dark scheme changes
colors only, so one screen is enough for it."""
MeasurePage = Callable[..., dict[tuple[str, int], dict[str, Any]]]


@pytest.fixture(scope="session")
def browser() -> str:
    """Return the path of a Chromium that starts; `make browser` installs one."""
    for name in BROWSERS:
        if (shutil.which(name)
                and subprocess.run([name, "--version"], capture_output=True, check=False).returncode == 0):
            return name
    pytest.skip("there is no Chromium on this machine (make browser)")


@pytest.fixture
def open_page(browser: str, tmp_path: Path) -> OpenPage:
    """Return `open_page(file)`, which returns the document after its scripts have run, and console lines."""

    def open_file(file: Path) -> tuple[str, list[str]]:
        completed = subprocess.run([browser, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
                                    file.as_uri()], capture_output=True, text=True, timeout=600, check=True)
        return completed.stdout, re.findall(r"CONSOLE.*", completed.stderr)

    return open_file


@pytest.fixture
def measure_page(open_page: OpenPage, tmp_path: Path) -> MeasurePage:
    """Return `measure_page(file, screens=SCREENS)`, which returns (scheme, width) -> findings of layout.js.

    One browser shows all screens as frames. The page's content security policy allows layout.js by its hash.
    """

    def measure(file: Path, screens: tuple[Screen, ...] = SCREENS) -> dict[tuple[str, int], dict[str, Any]]:
        script = LAYOUT_JS.read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        page = file.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        (tmp_path / "measured.html").write_text(page.replace("</body>", f"<script>{script}</script></body>"),
                                                encoding="utf-8")
        frames = "".join(f'<iframe name="{scheme}" src="measured.html" style="width:{width}px; '
                         f'height:{height}px; border:0; color-scheme:{scheme}"></iframe>'
                         for scheme, width, height in screens)
        (tmp_path / "frames.html").write_text(
            f'{frames}<script>addEventListener("message", (event) => {{ '
            'const found = document.createElement("pre"); found.textContent = JSON.stringify(event.data); '
            'document.body.append(found); });</script>',
            encoding="utf-8")
        dom, _ = open_page(tmp_path / "frames.html")
        frame_texts = re.findall(r"<pre>(.*?)</pre>", dom, flags=re.DOTALL)
        findings = [json.loads(html.unescape(text)) for text in frame_texts]
        return {(frame["scheme"], frame["width"]): frame for frame in findings}

    return measure


SIZES = {"vocab_size": 1024, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
         "max_position_embeddings": 512, "initializer_range": 0.25}
"""Sizes of tiny Hugging Face models. With initial weights of a large spread, logits are several units, so a
wrong detail of a model changes them visibly."""


def _prepare_folder(name: str, factory: pytest.TempPathFactory,
                    run_command: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """Return a new folder of data: a copy from SOV_TESTS_DATA if made_once.py fills it, or generated here."""
    folder = factory.mktemp(name)
    if shared_data := os.environ.get("SOV_TESTS_DATA"):
        deadline_s = time.monotonic() + 600
        while not (Path(shared_data) / name).is_dir() and time.monotonic() < deadline_s:
            time.sleep(0.1)  # made_once.py is still generating it
        shutil.copytree(Path(shared_data) / name, folder, dirs_exist_ok=True)
        return folder
    from tests.packing import MAKERS

    MAKERS[name](folder, run_command)
    return folder


@pytest.fixture(scope="session")
def token_shards(tmp_path_factory: pytest.TempPathFactory,
                 run_command: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """Return token shards with a tokenizer: sources "first" and "second", a fifth of each held out."""
    return _prepare_folder("token_shards", tmp_path_factory, run_command) / "shards"


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory,
               run_command: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, Path]:
    """Return the folders of two tokenizers with 384 ids, "solar-open" and "k-exaone"."""
    folder = _prepare_folder("tokenizers", tmp_path_factory, run_command)
    return {preset: folder / preset for preset in ("solar-open", "k-exaone")}


def _random_solar() -> Any:
    from transformers import SolarOpenConfig, SolarOpenForCausalLM

    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 256}
    return SolarOpenForCausalLM(SolarOpenConfig(
        num_hidden_layers=2, n_routed_experts=8, n_shared_experts=1, rope_parameters=yarn,
        routed_scaling_factor=1.7, bos_token_id=None, eos_token_id=None, pad_token_id=None, **SIZES))


def _random_exaone() -> Any:
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

    return ExaoneMoeForCausalLM(ExaoneMoeConfig(
        num_hidden_layers=5, num_experts=8, num_shared_experts=1, intermediate_size=40, sliding_window=8,
        routed_scaling_factor=2.5, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        layer_types=["sliding_attention"] * 3 + ["full_attention", "sliding_attention"], **SIZES))


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory, token_shards: Path) -> dict[str, Path]:
    """Return family -> Hugging Face folder of a tiny random model, written by transformers."""
    import torch

    folders = {}
    for family, make in {"solar_open": _random_solar, "exaone_moe": _random_exaone}.items():
        torch.manual_seed(0)
        model = make()
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias = torch.randn(8, generator=generator) * 0.2
        folders[family] = tmp_path_factory.mktemp("hf") / family
        model.save_pretrained(folders[family])
        shutil.copytree(token_shards / "tokenizer", folders[family], dirs_exist_ok=True)
    return folders


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory, hf_models: dict[str, Path]) -> dict[str, Path]:
    """Return family -> checkpoint of the same models."""
    from megatron_sov import convert

    folder = tmp_path_factory.mktemp("imported")
    for family, hf_dir in hf_models.items():
        convert.from_hf(hf_dir, folder / family)
    return {family: folder / family for family in hf_models}


@pytest.fixture(scope="session")
def as_one_rank() -> dict[str, str]:
    """Return the environment of a torchrun with one rank.

    With port 0 the system chooses a free port, which no other process can take in the meantime.
    """
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the empty folder of a test its working folder, and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_rank(as_one_rank: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands run in pytest's process as the only rank of a torchrun.

    Otherwise they would fork ranks, which fails in a process with threads.
    """
    for name, value in as_one_rank.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def packed_data(tmp_path_factory: pytest.TempPathFactory,
                run_command: Callable[..., subprocess.CompletedProcess[str]]) -> Packed:
    """Return documents and chats, packed by the project's own commands in another process.

    Most tests do not need the large imports of these commands.
    """
    from tests.packing import Packed

    return Packed.of(_prepare_folder("packed_data", tmp_path_factory, run_command))


def _pip(*arguments: str, cwd: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", *arguments]
    completed = subprocess.run(command, cwd=cwd, capture_output=True, text=True,
                               env={**os.environ, **environment})
    assert completed.returncode == 0, completed.stderr


@pytest.fixture(scope="session")
def packaged_files() -> set[str]:
    """Return every file below the packages, without files of Python caches and editors."""
    from megatron_sov.version import OUR_PACKAGES

    return {p.relative_to(ROOT).as_posix() for package in OUR_PACKAGES for p in (ROOT / package).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith(".")}


@pytest.fixture(scope="session")
def wheel(packaged_files: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from a copy of the sources, so that nothing is written next to them."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in packaged_files | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)

    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), ".",
         cwd=folder / "source")
    (built,) = folder.glob("megatron_sov*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the installed wheel, without its dependencies."""
    target = tmp_path_factory.mktemp("elsewhere") / "site"
    _pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target.parent)
    return target


@pytest.fixture(scope="session")
def write_round() -> Callable[..., None]:
    """Return a function that writes a round of random responses and rewards to a rollout store.

    The round has the form of `rl generate` and `rl reward`, and depends only on the arguments. Responses have
    4 to 12 tokens. Sample s (from 0) of prompt i has reward 1 if s + 1 divides i + 1, else 0. Responses in
    `unfinished` (prompt index, sample) are unfinished, and attempt 1 has only them. With `one_prompt`, all
    samples of a prompt have the same prompt tokens, as those of a model do. With `judge=False`, rewards are
    not written.
    """
    import numpy as np

    from megatron_sov.rollouts.round_order import select_round_prompts, split_into_pieces
    from megatron_sov.rollouts.rows import LENGTH, STOP, UNFINISHED, Key, RewardRow, Rollout, format_part_name

    def draw_row(store: Any, rollout: Any, prompt: Any, number: int, sample: int, attempt: int, cut: bool,
                 one_prompt: bool) -> Any:
        random = np.random.default_rng([int(prompt.id, 16), number, sample])
        count = int(random.integers(4, 13))
        tokens, logprobs = random.integers(0, store.vocab_size, 24), -random.random(24).astype(np.float32)
        reason = LENGTH if count == 12 else STOP
        if cut:
            count, reason = 2, UNFINISHED
        prompt_tokens = tokens[12:12 + 3 + sample % 3]
        if one_prompt:
            prompt_tokens = np.random.default_rng(int(prompt.id, 16)).integers(0, store.vocab_size, 5)
        policy_step = (number - 1) * rollout.steps_per_round
        return Rollout(
            Key(prompt.id, sample, f"{number:064d}", "sampling"), number, attempt, prompt.record,
            prompt_tokens.astype(np.int32), tokens[:count].astype(np.int32), logprobs[:count],
            np.full(count, policy_step, np.int32), reason, "text", rollout.temperature, "scripted", 0.0, 1.0)

    def write(store: Any, prompts: Any, rollout: Any, number: int, version: str, attempt: int = 0,
              unfinished: Collection[tuple[int, int]] = (), *, judge: bool = True, one_prompt: bool = False
              ) -> None:
        round_prompts = select_round_prompts(prompts, rollout, number)
        place = {prompt.id: i for i, prompt in enumerate(round_prompts)}
        for piece in split_into_pieces(round_prompts, number, rollout.piece_prompts):
            rows = []
            for prompt in piece.prompts:
                for sample in range(rollout.samples_per_prompt):
                    is_cut = (place[prompt.id], sample) in unfinished
                    if attempt == 0 or is_cut:
                        rows.append(draw_row(store, rollout, prompt, number, sample, attempt,
                                             attempt == 0 and is_cut, one_prompt))
            if not rows:
                continue
            name = format_part_name(number, piece.number, attempt)
            store.add_rollouts(name, rows, {})
            if judge:
                store.add_rewards(version, name, [RewardRow(
                    r.key, r.attempt, version, float((place[r.key.prompt] + 1) % (r.key.sample + 1) == 0),
                    "scored", {"right": 1.0, "found": ""}) for r in rows if r.finish_reason != UNFINISHED])

    return write


def _written_scores(path: Path, scores: list[float | None], *, clusters: list[str] | None = None,
                    metric: str = "acc", value: float | None = None, model: str = "a", **fields: Any) -> Path:
    """Write the results file of one task with item scores, as `eval lm` would; a None is a failed item."""
    from megatron_sov.bench.lm.results import (
        EvaluatedModel, Metric, ResultItem, Results, TaskScores, write_results)

    known = [s for s in scores if s is not None]
    first = Metric(metric, sum(known) / len(known) if value is None and known else value,
                   higher_is_better=metric != "loss")
    task_fields = {"task_hash": "t" * 64, "output_type": "multiple_choice", "prompt_hash": "p"} | fields
    items = [ResultItem("quiz", str(i), f"d{i}", clusters[i] if clusters else None, scores={metric: s},
                        question=f"What is question number {i} of this little quiz about?",
                        failed="no answer" if s is None else None) for i, s in enumerate(scores)]
    scores_of_task = TaskScores(items=len(scores), metrics=(first,), **task_fields)
    evaluated = EvaluatedModel(model, f"hash of {model}", "checkpoint", 10)
    write_results(path, Results(evaluated, {"quiz": scores_of_task}, {"lm_eval": "0.4.13"}), items)
    return path


@pytest.fixture(scope="session")
def written_scores() -> Callable[..., Path]:
    """Return `_written_scores`."""
    return _written_scores
