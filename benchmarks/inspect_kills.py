"""What `eval inspect` asks again behind kills: inspect-ai itself, and an endpoint that counts questions.

Usage: python benchmarks/inspect_kills.py --work FOLDER --python PYTHON [--kills 2] [--samples 30]

PYTHON has inspect-ai.  The endpoint answers one request at a time and notes each question; once a third
(two thirds, ...) of the samples are answered, the command and the library are killed by SIGKILL, and the
same command is typed again.  Printed are the questions that were asked more than once and what came out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TASK = """from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def sums():
    samples = [Sample(f"{n} + {n} =", target=str(2 * n)) for n in range(COUNT)]
    return Task(dataset=samples, solver=generate(), scorer=match())
"""
ANSWER_S = 0.3
"""Seconds of an answer, so that a kill falls between two."""


class Endpoint(ThreadingHTTPServer):
    """Answers sums as OpenAI's interface does, every third one wrongly."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.one = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Return its address, up to /v1."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Endpoint

    def do_POST(self) -> None:
        """Answer a question, and note it."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[0]["text"]
        number = int(question.split()[0])
        with self.server.one:
            time.sleep(ANSWER_S)
            self.server.asked[question] += 1
        text = str(2 * number + (number % 3 == 0))
        answer = {"id": question, "object": "chat.completion", "created": 0, "model": "m", "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        data = json.dumps(answer).encode()
        with contextlib.suppress(BrokenPipeError):  # who asked was killed
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def evaluate(work: Path, name: str, python: str, url: str) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own."""
    with open(work / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "megatron_sov", "eval", "inspect", url, "--model", "m",
             "--tasks", f"{work / 'sums.py'}@sums", "--python", python, "--output", work / f"{name}.json",
             "--concurrent", "2"], stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"})


def killed(work: Path, python: str, samples: int, kills: int) -> tuple[Counter[str], list[int]]:
    """Return how often each question was asked of a command that was killed, and what had been answered at
    each kill."""
    endpoint, at = Endpoint(), []
    for kill in range(1, kills + 1):
        command = evaluate(work, "killed", python, endpoint.url)
        while len(endpoint.asked) < kill * samples // (kills + 1) and command.poll() is None:
            time.sleep(0.05)
        os.kill(command.pid, signal.SIGKILL)
        command.wait()
        at.append(len(endpoint.asked))
        time.sleep(5)  # the library, which ends with the command, is gone; what it asked last is noted
    command = evaluate(work, "killed", python, endpoint.url)
    if code := command.wait():
        raise SystemExit(f"the command ended with exit code {code}; see {work / 'log'}")
    return endpoint.asked, at


def items(file: Path) -> list[str]:
    """Return what is told of each item, in an order of its own."""
    rows = [json.loads(line) for line in file.with_suffix(".items.jsonl").read_text().splitlines()]
    return sorted(json.dumps({key: row[key] for key in row if key not in ("hash", "seconds")},
                             sort_keys=True) for row in rows)


def main() -> None:
    """Kill, go on, and compare with an evaluation that nobody killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--samples", type=int, default=30)
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True)
    (work / "sums.py").write_text(TASK.replace("COUNT", str(args.samples)))
    asked, at = killed(work, args.python, args.samples, args.kills)
    calm = Endpoint()
    if code := evaluate(work, "calm", args.python, calm.url).wait():
        raise SystemExit(f"the command ended with exit code {code}; see {work / 'log'}")
    found = [json.loads((work / f"{name}.json").read_text()) for name in ("killed", "calm")]
    ours, theirs = (result["tasks"] for result in found)
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}, inspect-ai {found[0]['harness']['inspect_ai']}")
    print(f"{args.samples} samples; killed by SIGKILL when {', '.join(map(str, at))} questions were answered")
    print(f"requests: {asked.total()} of the killed one, {calm.asked.total()} of the other; questions asked "
          f"again: {sum(n > 1 for n in asked.values())}, never: {args.samples - len(asked)}")
    print(f"scores equal: {ours == theirs}; items equal: "
          f"{items(work / 'killed.json') == items(work / 'calm.json')} ({len(items(work / 'calm.json'))})")


if __name__ == "__main__":
    main()
