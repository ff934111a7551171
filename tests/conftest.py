"""Settings and fixtures of all tests: drawn examples are the same in every run,
ranks are real processes, models are tiny."""

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
# Memory that a test has freed goes back to the system, see `give_memory_back`: glibc keeps a heap for each
# thread, and pyarrow's own allocator gigabytes.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


class EagerLibrary:
    """Import hook that disables compilation in megatron-core's `jit` module. A test file imports the library
    before `cpu_shims` is installed; compilation would then cost seconds per function in all later tests."""

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
"""After which a process of pytest gives back what it does not use."""


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Let the collector of garbage pass over the million objects that tests are, which stay to the end, and
    begin less often: an eighth of all processor time went into it.  Have Hypothesis build its table of
    characters and read the constants of our modules: that takes seconds, and the first test that draws text
    would be charged for them."""
    gc.disable()
    found = yield
    if any(is_hypothesis_test(getattr(item, "obj", None)) for item in session.items):
        _draw_text()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
    return found


@settings(max_examples=1, database=None, deadline=None)
@given(strategies.text())
def _draw_text(_: str) -> None:
    """Draw one text."""


_kept_bytes = [0]


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """Return the records of loggers, warnings and above, as they come."""
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
def give_memory_back() -> Iterator[None]:
    """Return freed memory to the system after files in which this process has grown: otherwise the largest
    test would set the size for the rest."""
    yield
    if sys.platform == "linux" and psutil.Process().memory_info().rss > _kept_bytes[0] + GROWTH_BYTES:
        ctypes.CDLL(None).malloc_trim(0)
        _kept_bytes[0] = psutil.Process().memory_info().rss


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGALRM, signal.SIGCHLD)


@contextmanager
def left_as_it_was(folder: Path) -> Iterator[None]:
    """Undo side effects that other runs in this process would see: signal handlers, variables of Transformer
    Engine, and modules imported from below `folder`, whose names other tests reuse."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    variables = {name: value for name, value in os.environ.items() if name.startswith("NVTE_")}
    num_modules = len(sys.modules)
    yield
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:  # None: not of Python
            signal.signal(number, handler)
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]
    os.environ.update(variables)
    below = f"{folder}{os.sep}"
    for name in [*islice(reversed(sys.modules), max(0, len(sys.modules) - num_modules))]:
        spec = getattr(sys.modules[name], "__spec__", None)
        # a file that was run as a plugin has none: its name is of its path
        if spec and (spec.origin or str(next(iter(spec.submodule_search_locations or ()), ""))).startswith(
                below):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """See `left_as_it_was`, of each test."""
    with left_as_it_was(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module", autouse=True)
def leave_the_process_as_the_file_found_it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Apply `left_as_it_was` to the fixtures of a file: Ray replaces the handler of SIGTERM."""
    if sys.modules.get("transformer_engine", "") is None:  # a process that prepares for a CPU hides it
        del sys.modules["transformer_engine"]
    with left_as_it_was(tmp_path_factory.getbasetemp()):
        yield


MANY_THREADS = 100
_kept_threads = [0]


@pytest.hookimpl(trylast=True, specname="pytest_runtest_teardown")
def pytest_drop_garbage() -> None:
    """Collect discarded models: their process groups keep threads that wake a hundred times a second and took
    half of a worker's processor time. Threads of libraries, which remain, do not trigger another
    collection."""
    if sys.platform != "linux":
        return
    now = len(os.listdir("/proc/self/task"))
    _kept_threads[0] = min(_kept_threads[0], now)
    if now > _kept_threads[0] + MANY_THREADS:
        gc.collect()
        _kept_threads[0] = len(os.listdir("/proc/self/task"))


@dataclass(frozen=True)
class Job:
    """One function of a test file, run on `nproc` ranks."""

    file: str
    """The test file (`__file__`)."""
    function: str
    """Name of a module-level function in it; it joins the world itself and returns JSON values."""
    nproc: int = 1
    """Ranks."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments, plain JSON values."""


def refuse_to_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn skips into failures if SOV_NEEDS_ALL is set, as in `.ci/run`: missing programs must be installed
    there."""
    # else it is an xfail
    if report.skipped and isinstance(report.longrepr, tuple) and os.environ.get("SOV_NEEDS_ALL"):
        report.outcome, report.longrepr = ("failed",
                                           f"SOV_NEEDS_ALL is set, and this would be {report.longrepr[-1]}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """See `refuse_to_skip`; whether a test for a GPU can run is not a matter of installing."""
    report = yield
    tiers.judge_processor_time(item, report)
    if not item.get_closest_marker("gpu"):
        refuse_to_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """See `refuse_to_skip`: a file can be skipped as a whole."""
    report = yield
    refuse_to_skip(report)
    return report


Ranks = Callable[..., list[list[Any]]]


NO_RANK = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


TE_DOUBLE = Path(__file__).with_name("te_double")


class Server:
    """A process that will import megatron once, when first called, and answers every caller in a fork."""

    def __init__(self, *doubles: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.address = str(Path(self._folder.name) / "socket")
        """Where it is called."""
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(self.address)
            door.listen()
            # -P: the folder of tests mirrors our packages, and must not stand for them
            command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("rank_main.py")),
                       str(door.fileno()), *map(str, doubles)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[door.fileno()])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


SHARED = "SOV_TESTS_SERVERS"
"""Variable that tells, as JSON, where to call the workers that several processes of tests share."""


@contextmanager
def shared_workers() -> Iterator[dict[str, str]]:
    """Yield where to call workers that several processes of tests share."""
    with closing(Server()) as server, closing(Server(TE_DOUBLE)) as te_server:
        yield {"worker": server.address, "te_worker": te_server.address}


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Start the workers before the forks that call them, if nobody has (made_once.py)."""
    if SHARED in os.environ or getattr(session.config.option, "forks", 0) < 2:
        return (yield)
    with shared_workers() as addresses:
        os.environ[SHARED] = json.dumps(addresses)
        try:
            return (yield)
        finally:
            del os.environ[SHARED]


class Worker:
    """A process that has imported Megatron-Core once and runs each request in a fork."""

    def __init__(self, folder: Path, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("rw")
        self._folder = folder
        self._asked = 0

    def run(self, timeout_s: float, file_limit_bytes: int | None = None, without: Collection[str] = (),
            **asked: Any) -> subprocess.CompletedProcess[str]:
        """Do what is asked, with this process's environment and folder, as `subprocess.run` would.

        Args:
            timeout_s: when it is killed.
            file_limit_bytes: how large its files may be; None: as large as they will.
            without: variables that it does not have.
            asked: `jobs`, a file with jobs, or `program` and `argv`, a command and its arguments, or `stays`
                and `arguments`: file and name of a function, which nobody waits for.
        """
        self._asked += 1
        out, err = (self._folder / f"{self._asked}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()
        order = asked | {"timeout_s": timeout_s, "file_limit_bytes": file_limit_bytes, "out": str(out),
                         "err": str(err), "folder": os.getcwd()}
        order["environment"] = {name: value for name, value in os.environ.items() if name not in without}
        self._lines.write(json.dumps(order) + "\n")
        self._lines.flush()
        answer = self._lines.readline()
        if not answer:
            pytest.exit("the worker has ended; see its error above")
        code, used_s = answer.split()
        tiers.charge(float(used_s))
        return subprocess.CompletedProcess(asked, int(code),
                                           *(f.read_text(errors="replace") for f in (out, err)))

    def close(self) -> None:
        """Let go of it; what it still does ends."""
        self._lines.close()
        self._socket.close()


def _worker(folder: Path, name: str, *doubles: Path) -> Iterator[Worker]:
    """Return the worker shared by all pytest processes, or this process's own if there is only one."""
    known = json.loads(os.environ.get(SHARED, "{}"))
    own = None if name in known else Server(*doubles)
    found = Worker(folder, own.address if own else known[name])
    yield found
    found.close()
    if own:
        own.close()


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for all tests."""
    yield from _worker(tmp_path_factory.mktemp("worker"), "worker")


@pytest.fixture(scope="session")
def te_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for all tests whose models are made of Transformer Engine's modules, by its double."""
    yield from _worker(tmp_path_factory.mktemp("te_worker"), "te_worker", TE_DOUBLE)


@pytest.fixture
def ranks(tmp_path: Path, worker: Worker) -> Ranks:
    """Return `run(Job, ...)`, which gives each job's results, one per rank."""
    return _ranks_of(worker, tmp_path / "jobs")


@pytest.fixture
def te_ranks(tmp_path: Path, te_worker: Worker) -> Ranks:
    """Return the fixture `ranks` with the Transformer Engine double."""
    return _ranks_of(te_worker, tmp_path / "te_jobs")


def _ranks_of(worker: Worker, folder: Path) -> Ranks:

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
    """Return `run_command(*argv, program="megatron-sov", file_limit_bytes=None, timeout_s=600)`: run a
    command in a fork of a process that has imported Megatron-Core, which is not a rank. It saves the start-up
    time that a user would wait for."""

    def run(*argv: str, program: str = "megatron-sov", file_limit_bytes: int | None = None,
            timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        return worker.run(timeout_s, file_limit_bytes, NO_RANK, program=program, argv=argv)

    return run


@pytest.fixture(scope="session")
def warm_python(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a `python` that has already imported Megatron-Core, if this process is root; otherwise Python
    itself. Commands of `run_command` start child processes with it if SOV_TESTS_PYTHON names it."""
    if os.geteuid():
        return sys.executable
    folder = tmp_path_factory.mktemp("warm")
    program = folder / "python3"  # the tests of jobs find ranks by a name that begins with python
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
    """Return `ends(pid)`: wait until that process ends, whatever its parent; return whether it did."""

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
"""Scheme of colours, and width and height in CSS pixels, of a phone, a tablet and a notebook; the dark scheme
is colours alone and moves nothing, so that one screen shows it."""
MeasurePage = Callable[..., dict[tuple[str, int], dict[str, Any]]]


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of a Chromium that starts; `make browser` installs one."""
    for name in BROWSERS:
        if (shutil.which(name)
                and subprocess.run([name, "--version"], capture_output=True, check=False).returncode == 0):
            return name
    pytest.skip("there is no Chromium on this machine (make browser)")


@pytest.fixture
def open_page(browser: str, tmp_path: Path) -> OpenPage:
    """Return `open_page(file)`: the document after its scripts ran, and their console output."""

    def opened(file: Path) -> tuple[str, list[str]]:
        completed = subprocess.run([browser, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
                                    file.as_uri()], capture_output=True, text=True, timeout=600, check=True)
        return completed.stdout, re.findall(r"CONSOLE.*", completed.stderr)

    return opened


@pytest.fixture
def measure_page(open_page: OpenPage, tmp_path: Path) -> MeasurePage:
    """Return `measure_page(file, screens=SCREENS)`: the findings of layout.js by (light or dark, screen
    width). One browser holds all screens as frames; the page's content policy allows the measuring script by
    its hash."""

    def measured(file: Path, screens: tuple[Screen, ...] = SCREENS) -> dict[tuple[str, int], dict[str, Any]]:
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
        found = [json.loads(html.unescape(text))
                 for text in re.findall(r"<pre>(.*?)</pre>", dom, flags=re.DOTALL)]
        return {(one["scheme"], one["width"]): one for one in found}

    return measured


SIZES = {"vocab_size": 1024, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
         "max_position_embeddings": 512, "initializer_range": 0.25}
"""A large spread of initial weights: logits of several units, so that a wrong detail of the model shows."""


def _made_folder(name: str, factory: pytest.TempPathFactory,
                 run_command: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """Return the folder of a fixture: created now, or a copy of the folder of that name in SOV_TESTS_DATA."""
    folder = factory.mktemp(name)
    if kept := os.environ.get("SOV_TESTS_DATA"):
        deadline_s = time.monotonic() + 600
        while not (Path(kept) / name).is_dir() and time.monotonic() < deadline_s:
            time.sleep(0.1)  # made_once.py is still making the folder
        shutil.copytree(Path(kept) / name, folder, dirs_exist_ok=True)
        return folder
    from tests.packing import MAKERS

    MAKERS[name](folder, run_command)
    return folder


@pytest.fixture(scope="session")
def token_shards(tmp_path_factory: pytest.TempPathFactory,
                 run_command: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """A token artifact with two sources, "first" and "second", a fifth of each held out;
    the tokenizer lies inside."""
    return _made_folder("token_shards", tmp_path_factory, run_command) / "shards"


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory,
               run_command: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, Path]:
    """Tokenizer artifacts with 384 ids: "solar-open" and "k-exaone"."""
    folder = _made_folder("tokenizers", tmp_path_factory, run_command)
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
    """Hugging Face folders of tiny random models, written by transformers: family -> folder."""
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
    """The same models as checkpoints: family -> folder."""
    from megatron_sov import convert

    folder = tmp_path_factory.mktemp("imported")
    for family, hf_dir in hf_models.items():
        convert.from_hf(hf_dir, folder / family)
    return {family: folder / family for family in hf_models}


@pytest.fixture(scope="session")
def as_one_rank() -> dict[str, str]:
    """Return the environment of the one rank of a torchrun; of port 0 the system makes a free one, which
    nobody else can take in between."""
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture
def one_rank(as_one_rank: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run as the one rank of a torchrun: pytest's process has threads,
    which a fork would not survive."""
    for name, value in as_one_rank.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def packed_data(tmp_path_factory: pytest.TempPathFactory,
                run_command: Callable[..., subprocess.CompletedProcess[str]]) -> Packed:
    """Documents and chats, packed by the project's own commands in another process, because their imports are
    large and most tests do not need them."""
    from tests.packing import Packed

    return Packed.of(_made_folder("packed_data", tmp_path_factory, run_command))


def _pip(*arguments: str, cwd: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", *arguments]
    completed = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ,
                                                                                      **environment})
    assert completed.returncode == 0, completed.stderr


@pytest.fixture(scope="session")
def packaged_files() -> set[str]:
    """Return every file below the packages, without files of Python caches and editors."""
    from megatron_sov.version import OUR_PACKAGES

    return {p.relative_to(ROOT).as_posix() for package in OUR_PACKAGES for p in (ROOT / package).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith(".")}


@pytest.fixture(scope="session")
def wheel(packaged_files: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that nothing is written next to them."""
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
    """Install only the wheel; its dependencies are those of the test environment."""
    target = tmp_path_factory.mktemp("elsewhere") / "site"
    _pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target.parent)
    return target


@pytest.fixture(scope="session")
def write_round() -> Callable[..., None]:
    """Return `write(store, prompts, rollout, number, version, attempt=0, unfinished=(), judge=True,
    one_prompt=False)`: write a round of scripted responses in the form of `rl generate` and `rl reward`, as a
    pure function of its arguments. Responses have 4 to 12 tokens; sample s of prompt i has reward 1 if s
    divides i + 1, else 0. Responses in `unfinished` (prompt index, sample) are not finished, and attempt 1
    contains only them. With `one_prompt` all responses of a group start with the same tokens, as those of a
    model do."""
    import numpy as np

    from megatron_sov.rollouts.round_order import select_round_prompts, split_into_pieces
    from megatron_sov.rollouts.rows import LENGTH, STOP, UNFINISHED, Key, RewardRow, Rollout, format_part_name

    def row(store: Any, rollout: Any, prompt: Any, number: int, sample: int, attempt: int, cut: bool,
            one_prompt: bool) -> Any:
        random = np.random.default_rng([int(prompt.id, 16), number, sample])
        count = int(random.integers(4, 13))
        tokens, logprobs = random.integers(0, store.vocab_size, 24), -random.random(24).astype(np.float32)
        count = 2 if cut else count
        asked = tokens[12:12 + 3 + sample % 3]
        if one_prompt:
            asked = np.random.default_rng(int(prompt.id, 16)).integers(0, store.vocab_size, 5)
        return Rollout(
            Key(prompt.id, sample, f"{number:064d}", "sampling"), number, attempt, prompt.record,
            asked.astype(np.int32), tokens[:count].astype(np.int32),
            logprobs[:count], np.full(count, (number - 1) * rollout.steps_per_round, np.int32),
            UNFINISHED if cut else LENGTH if count == 12 else STOP, "text", rollout.temperature, "scripted",
            0.0, 1.0)

    def write(store: Any, prompts: Any, rollout: Any, number: int, version: str, attempt: int = 0,
              unfinished: Collection[tuple[int, int]] = (), *, judge: bool = True, one_prompt: bool = False
              ) -> None:
        asked = select_round_prompts(prompts, rollout, number)
        place = {prompt.id: i for i, prompt in enumerate(asked)}
        for piece in split_into_pieces(asked, number, rollout.piece_prompts):
            wanted = [(prompt, sample) for prompt in piece.prompts
                      for sample in range(rollout.samples_per_prompt)
                      if not attempt or (place[prompt.id], sample) in unfinished]
            if not wanted:
                continue
            name = format_part_name(number, piece.number, attempt)
            rows = [row(store, rollout, p, number, s, attempt,
                        not attempt and (place[p.id], s) in unfinished, one_prompt) for p, s in wanted]
            store.add_rollouts(name, rows, {})
            if judge:
                store.add_rewards(version, name, [RewardRow(
                    r.key, r.attempt, version, float((place[r.key.prompt] + 1) % (r.key.sample + 1) == 0),
                    "scored", {"right": 1.0, "found": ""}) for r in rows if r.finish_reason != UNFINISHED])

    return write


def _written_scores(path: Path, scores: list[float | None], *, clusters: list[str] | None = None,
                    metric: str = "acc", value: float | None = None, model: str = "a", **fields: Any) -> Path:
    """Write results of one task, as `eval lm` would."""
    from megatron_sov.bench.lm.results import (
        EvaluatedModel, Metric, ResultItem, Results, TaskScores, write_results)

    known = [s for s in scores if s is not None]
    first = Metric(metric, sum(known) / len(known) if value is None and known else value,
                   higher_is_better=metric != "loss")
    told = {"task_hash": "t" * 64, "output_type": "multiple_choice", "prompt_hash": "p"} | fields
    items = [ResultItem("quiz", str(i), f"d{i}", clusters[i] if clusters else None, scores={metric: s},
                        question=f"What is question number {i} of this little quiz about?",
                        failed="no answer" if s is None else None) for i, s in enumerate(scores)]
    write_results(path, Results(EvaluatedModel(model, f"hash of {model}", "checkpoint", 10), {
        "quiz": TaskScores(items=len(scores), metrics=(first,), **told)}, {"lm_eval": "0.4.13"}), items)
    return path


@pytest.fixture(scope="session")
def written_scores() -> Callable[..., Path]:
    """Return a function that writes the results of one task, with item scores, to a file."""
    return _written_scores
