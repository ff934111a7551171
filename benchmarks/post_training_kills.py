"""Jobs of post-training that are killed again and again compute nothing twice, and end as if left alone.

    python benchmarks/post_training_kills.py [--kills 10] [--nproc 2] [--seed 0] [--jobs teacher ...]

  teacher  `distill states`: a model reads documents and leaves its hidden states
  scorer   `score --reward judge`: rows go to an endpoint, which counts what it is asked
  trainer  `prefer --method dpo`: the reference's log-probabilities, then training with checkpoints

Each job is done undisturbed first.  Then it is done again under SIGKILL, at points of its work that are drawn
over the whole of it (a start that finds its point already behind it is killed while it starts), and started
anew with the same command.  What is on record as done at a kill is looked at again at the end: a part of the
teacher's or the reference's is the same file, the endpoint was not asked for it again, a step before the
newest checkpoint was not taken again.  What was under way at a kill is lost, and is told.  At the end every
file, or every hash of the last checkpoints', is compared with the undisturbed one.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from kills import final, make_data

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.digests import file_digest
from megatron_sov.runs.checkpoints import latest, step_of
from megatron_sov.runs.obs.events import read_events
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.progress.journal import items_on_record, work_folder
from megatron_sov.work.progress.resumable import CONTENT

MODEL = ("model.vocab_size=368", "model.hidden_size=64", "model.num_layers=4", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=16", "model.expert_ffn_dim=32")
TRAINING = ("train.num_threads=1", 'data.phases=[{"name": "main", "seq_len": 256}]',
            "train.global_batch_size=4", "train.micro_batch_size=2", "train.eval_every_steps=0",
            "data.max_epochs=0")
STEPS, PAIR_SOURCES, PAIRS, ROWS, THREADS, ANSWER_S, PARAGRAPHS = 40, 4, 40, 600, 8, 0.05, 24
MODULES: tuple[ModuleType, ...] = (argparse, inspect, json, subprocess, tempfile, threading, random, platform)
"""What the teacher reads: a source each, of paragraphs."""
POLL_S = 0.02


@dataclass(frozen=True)
class Job:
    """A command that can be killed and goes on."""

    argv: Callable[[Path], list[str]]
    """Folder of this doing -> what follows `python -m megatron_sov`."""
    begin: Callable[[], None]
    """Called before a doing from the beginning."""
    progress: Callable[[Path], int]
    """Units of work that are done."""
    spent: Callable[[Path], int]
    """Units of work that were done, those that a kill lost counted again; the teacher tells none."""
    recorded: Callable[[Path], set[str]]
    """What is on record as done, so that a later start may not do it again."""
    proof: Callable[[Path, str], str]
    """Something on record -> what changes when it is done once more."""
    final: Callable[[Path], dict[str, str]]
    """All that is left at the end -> its hash."""
    is_complete: Callable[[Path], bool] = lambda folder: False
    """Whether the command would refuse to be given again, since all is there."""


def main() -> int:
    """Do all jobs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each job (default %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="processes of a model (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--jobs", nargs="+", choices=["teacher", "scorer", "trainer"],
                        default=["teacher", "scorer", "trainer"])
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
          f"{os.getloadavg()[0]:.1f} at the start), Python {platform.python_version()}; {args.kills} kills "
          f"of each job, {args.nproc} processes of a model, seed {args.seed}", flush=True)
    held = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = make_base(work) if set(args.jobs) != {"scorer"} else work
        for name in args.jobs:
            job = (scorer(work) if name == "scorer" else
                   {"teacher": teacher, "trainer": trainer}[name](work, base, args.nproc))
            held.append(survives(name, job, work, args.kills, random.Random(f"{name}-{args.seed}")))
    print("nothing on record was done again, and every end is as undisturbed" if all(held) else "NOT SO")
    return 0 if all(held) else 1


def survives(name: str, job: Job, work: Path, kills: int, drawn: random.Random) -> bool:
    """Do a job undisturbed and under kills; prints what came of it, and returns whether all was as it
    should be."""
    whole = work / f"{name}-whole"
    start_s, length_s = undisturbed(job, whole)
    total, expected = job.progress(whole), job.final(whole)
    print(f"{name}: undisturbed {total} units of work in {length_s:.1f} s, the first after {start_s:.1f} s; "
          f"{len(expected)} files at the end", flush=True)
    moments, sound, doing = Counter[str](), True, 0
    while moments.total() < kills:
        folder, seen = work / f"{name}-{doing}", dict[str, str]()
        doing += 1
        begin(job, folder)
        for point in sorted(drawn.uniform(0, total) for _ in range(kills - moments.total())):
            if job.is_complete(folder):  # the last kill came between its last file and its end
                break
            behind = job.progress(folder) >= point
            if not killed(job, folder, point, drawn.uniform(0, start_s if behind else length_s / total)):
                break  # it came to its end before
            moments["while it started" if behind else "at work"] += 1
            # what was on record at an earlier kill is judged by what it was then
            seen = {one: job.proof(folder, one) for one in job.recorded(folder)} | seen
        if not job.is_complete(folder):
            ended(command(job, folder), folder)
        again = [one for one, proof in seen.items() if job.proof(folder, one) != proof]
        equal = job.final(folder) == expected
        sound = sound and equal and not again
        when = ", ".join(f"{n} {moment}" for moment, n in moments.items())
        print(f"  killed {moments.total()} times so far ({when}); {len(seen)} things were on record at a "
              f"kill, {len(again)} of them were done again; "
              f"{job.spent(folder)} units in all; as undisturbed at the end: {equal}", flush=True)
    return sound


def begin(job: Job, folder: Path) -> None:
    """Make a job's folder."""
    folder.mkdir()
    job.begin()


def command(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    """Start the job, or go on with it, its output into a file."""
    with open(folder / "log", "ab") as log:
        return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "megatron_sov", *job.argv(folder)],
                                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


def ended(process: subprocess.Popen[bytes], folder: Path, timeout_s: float | None = None) -> None:
    """Wait for the job's end.

    Raises:
        SystemExit: it failed.
        subprocess.TimeoutExpired: it has not ended.
    """
    if process.wait(timeout_s):
        raise SystemExit(f"ended with exit code {process.returncode}:\n"
                         f"{(folder / 'log').read_text(errors='replace')[-2000:]}")


def undisturbed(job: Job, folder: Path) -> tuple[float, float]:
    """Do the job; returns seconds to the first unit of its work, and to its end."""
    begin(job, folder)
    began_s, start_s = time.monotonic(), 0.0
    process = command(job, folder)
    while process.poll() is None:
        start_s = start_s or (time.monotonic() - began_s if job.progress(folder) else 0.0)
        time.sleep(POLL_S)
    ended(process, folder)
    return start_s, time.monotonic() - began_s


def killed(job: Job, folder: Path, point: float, after_s: float) -> bool:
    """Start the job and kill all its processes some time after a point of its work; returns False where it
    ended before."""
    process = command(job, folder)
    while process.poll() is None and job.progress(folder) < point:
        time.sleep(POLL_S)
    try:
        ended(process, folder, after_s)
        return False
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=30)
        process.wait()
        return True


def words(settings: tuple[str, ...]) -> list[str]:
    """Return --set arguments."""
    return [word for setting in settings for word in ("--set", setting)]


def prepare(*argv: str | Path) -> None:
    """Run a command that is not killed."""
    subprocess.run([sys.executable, "-W", "ignore", "-m", *map(str, argv)], check=True, capture_output=True)


def make_base(work: Path) -> Path:
    """Return a run of one step, which is teacher and start."""
    shards, run = make_data(work), work / "base"
    prepare("megatron_sov", "pretrain", "tiny-solar-open", "--data", shards, "--run", run,
            *words((*MODEL, *TRAINING, "train.steps=1")))
    return run


def same_file(path: Path) -> str:
    """Return what changes where a file is written once more, and not where it is renamed."""
    return f"{path.stat().st_ino} {path.stat().st_mtime_ns}"


def teacher(work: Path, base: Path, nproc: int) -> Job:
    """Return `distill states` over several sources, each of which is two parts: learned and held out."""
    for module in MODULES:
        paragraphs = [p for p in inspect.getsource(module).split("\n\n") if p.strip()][:PARAGRAPHS]
        (work / f"{module.__name__}.jsonl").write_text("".join(
            json.dumps({"text": p[:400]}) + "\n" for p in paragraphs))
    prepare("data_prep.cli", "pack", "--tokenizer", work / "tokenizer", "--heldout", "0.3", "--workers", "1",
            "--input", *(work / f"{module.__name__}.jsonl" for module in MODULES), "--output", work / "read")

    def names(folder: Path) -> set[str]:
        if found := items_on_record(work_folder(folder / "states")):
            return set(map(str, found))
        return {p.relative_to(folder / "states").as_posix() for p in (folder / "states/states").glob("*")}

    def file(folder: Path, name: str) -> Path:
        published = folder / "states" / name
        return published if published.is_file() else work_folder(folder / "states") / CONTENT / name

    return Job(
        lambda folder: ["distill", "states", str(base), "--data", str(work / "read"), "--output",
                        str(folder / "states"), "--dtype", "float32", "--nproc", str(nproc)],
        begin=lambda: None, progress=lambda folder: len(names(folder)),
        spent=lambda folder: len(names(folder)), recorded=names,
        proof=lambda folder, name: same_file(file(folder, name)),
        final=lambda folder: {name: r.digest for name, r in read_manifest(folder / "states").files.items()},
        is_complete=lambda folder: (folder / "states").exists())


class Judge(ThreadingHTTPServer):
    """An endpoint whose score of a response is a function of what it is asked; it counts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.calls = Counter[str]()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> bytes:
        """Count a request and return its answer."""
        key = EndpointCache.key(f"{self.url}/chat/completions", body)
        with self.lock:
            self.calls[key] += 1
        time.sleep(ANSWER_S)
        said = json.dumps({"reason": "by its hash", "score": int(key[:8], 16) % 10 + 1})
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": said},
                                        "finish_reason": "stop"}],
                           "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode()


class Asked(BaseHTTPRequestHandler):
    """A request to `Judge`."""

    server: Judge

    def do_POST(self) -> None:
        """Answer, where somebody is still there."""
        try:
            content = self.server.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (OSError, ValueError):
            pass  # who asked was killed

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def scorer(work: Path) -> Job:
    """Return `score` with a judge behind an endpoint; a request that is on its way at a kill is lost."""
    judge, rows = Judge(), work / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} + 1?", "response": f"It is {i + 1}."}) + "\n"
                            for i in range(ROWS)))

    def answered(folder: Path) -> set[str]:
        if not (folder / "cache.sqlite").is_file():
            return set()
        with sqlite3.connect(folder / "cache.sqlite") as cache:
            tables = {name for name, in cache.execute("SELECT name FROM sqlite_master")}
            return ({key for key, in cache.execute("SELECT key FROM answers")} if "answers" in tables
                    else set())

    def calls(folder: Path, key: str) -> str:
        if key not in judge.calls:
            raise SystemExit(f"{folder}: holds an answer to what was never asked")
        return str(judge.calls[key])

    def argv(folder: Path) -> list[str]:
        asked = {"endpoint": judge.url, "model": "m", "cache": folder / "cache.sqlite", "threads": THREADS}
        return ["score", "--reward", "judge", "--input", str(rows), "--output", str(folder / "scored.jsonl"),
                *words(tuple(f"{name}={value}" for name, value in asked.items()))]

    return Job(argv, begin=judge.calls.clear, progress=lambda folder: len(judge.calls),
               spent=lambda folder: judge.calls.total(), recorded=answered, proof=calls,
               final=lambda folder: {"scored.jsonl": file_digest(folder / "scored.jsonl")})


def trainer(work: Path, base: Path, nproc: int) -> Job:
    """Return `prefer --method dpo`; steps behind the newest checkpoint are taken again."""
    for source in range(PAIR_SOURCES):
        (work / f"pairs-{source}.jsonl").write_text("".join(json.dumps({
            "prompt": f"{i} + {source}?", "chosen": f"{i + source}.", "rejected": f"{i}!"}) + "\n"
            for i in range(PAIRS)))
    prepare("data_prep.cli", "pack", "--tokenizer", work / "tokenizer", "--format", "preference", "--heldout",
            "0", "--workers", "1", "--input", *(work / f"pairs-{i}.jsonl" for i in range(PAIR_SOURCES)),
            "--output", work / "pairs")

    def numbers(folder: Path) -> list[Path]:
        return sorted((folder / "run/reference").glob("*.f32"))

    def steps(folder: Path) -> list[int]:
        events = folder / "run/events.jsonl"
        return [e["step"] for e in read_events(events) if e["event"] == "step"] if events.is_file() else []

    def recorded(folder: Path) -> set[str]:
        newest = latest(folder / "run/checkpoints")
        return {file.name for file in numbers(folder)} | (
            set() if newest is None else {f"steps to {step_of(newest)}"})

    def proof(folder: Path, name: str) -> str:
        if name.startswith("steps"):
            return str(sum(step <= int(name.split()[-1]) for step in steps(folder)))
        return same_file(folder / "run/reference" / name)

    return Job(
        lambda folder: ["prefer", "tiny-solar-open", "--from", str(base), "--data", str(work / "pairs"),
                        "--run", str(folder / "run"), "--resume", "--nproc", str(nproc), "--method", "dpo",
                        *words((*TRAINING, f"train.steps={STEPS}", "train.checkpoint_every_steps=5"))],
        begin=lambda: None, recorded=recorded, proof=proof,
        progress=lambda folder: len(numbers(folder)) + max(steps(folder), default=0),
        spent=lambda folder: len(numbers(folder)) + len(steps(folder)),
        final=lambda folder: final(folder / "run") | {p.name: file_digest(p) for p in numbers(folder)})


if __name__ == "__main__":
    sys.exit(main())
