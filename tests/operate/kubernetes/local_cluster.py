"""A double of Kubernetes for Indexed Jobs: a `kubectl` that keeps them in a folder, and a thread that runs
their containers as processes of this machine and treats their ends as the job controller does.

What it does follows the manual (batch/v1): an index is done when a pod of it ends with 0; the rules of
`podFailurePolicy` are tried in order, and a failure that none of them takes counts against
`backoffLimitPerIndex`; a Job has failed when all of its indexes have ended and one has failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

KUBECTL = f"""#!{sys.executable} -IS
import json, os, shutil, sys
folder, words = os.environ["KUBERNETES_DOUBLE"], sys.argv[2:]
names = []
for word in words[1:]:
    if word.startswith("-"):
        break
    names.append(word)
there = [name for name in names if os.path.isdir(f"{{folder}}/{{name}}")]
if sys.argv[1] == "create":
    job = json.load(sys.stdin)
    name = f"{{job['metadata']['generateName']}}{{len(os.listdir(folder)):05}}"
    os.mkdir(f"{{folder}}/.{{name}}")
    with open(f"{{folder}}/.{{name}}/job.json", "w") as f:
        json.dump(job, f)
    os.rename(f"{{folder}}/.{{name}}", f"{{folder}}/{{name}}")
    print(f"job.batch/{{name}}")
elif sys.argv[1] == "get":
    found = []
    for name in there:
        status = f"{{folder}}/{{name}}/status.json"
        found.append({{"metadata": {{"name": name}},
                      "status": json.load(open(status)) if os.path.exists(status) else {{}}}})
    if found:
        print(json.dumps(found[0] if len(names) == 1 else {{"kind": "List", "items": found}}))
else:
    for name in there:
        os.rename(f"{{folder}}/{{name}}", f"{{folder}}/.deleted-{{name}}")
"""


def expanded(text: str, known: dict[str, str]) -> str:
    """Return a container's word as Kubernetes makes it (third_party/forked/golang/expansion)."""
    def one(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else known.get(found[1], found[0])
    return re.sub(r"\$\$|\$\(([^)]*)\)", one, text)


class LocalCluster:
    """`with LocalCluster(folder) as cluster`; `cluster.kubectl` comes first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pods: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        """Job and index -> what runs."""
        self.ended: list[tuple[str, int, int]] = []
        """Job, index and exit code of each pod that has ended; a signal's as the kubelet has it."""
        self._failures: Counter[tuple[str, int]] = Counter()
        self._results: dict[tuple[str, int], bool] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> LocalCluster:
        (self.folder / "bin").mkdir(parents=True)
        (self.folder / "jobs").mkdir()
        (self.folder / "bin/kubectl").write_text(KUBECTL)
        (self.folder / "bin/kubectl").chmod(0o755)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for pod in self.pods.values():
            self._kill(pod)

    @property
    def environment(self) -> dict[str, str]:
        """What commands are given, so that they find it."""
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "KUBERNETES_DOUBLE": str(self.folder / "jobs")}

    def conditions(self, job: str) -> list[str]:
        """Return what a Job has come to: nothing yet, Complete, Failed; None of one that is not there."""
        file = self.folder / "jobs" / job / "status.json"
        return [c["type"] for c in json.loads(file.read_text())["conditions"]] if file.exists() else []

    def _run(self) -> None:
        while not self._over.wait(0.02):
            for folder in sorted((self.folder / "jobs").iterdir(), key=lambda path: path.name[-5:]):
                if folder.name.startswith(".deleted-"):
                    for (job, _), pod in self.pods.items():
                        if job == folder.name.removeprefix(".deleted-"):
                            self._kill(pod)
                elif not folder.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):  # it is deleted meanwhile
                        self._reconcile(folder)

    def _reconcile(self, folder: Path) -> None:
        job, name = json.loads((folder / "job.json").read_text()), folder.name
        spec = job["spec"]
        for index in range(spec["completions"]):
            key = name, index
            pod = self.pods.get(key)
            if pod is not None and (code := pod.poll()) is not None:
                del self.pods[key]
                self.ended.append((name, index, code if code >= 0 else 128 - code))
                self._judge(key, spec, self.ended[-1][2])
            num_active = sum(there == name for there, _ in self.pods)
            if key not in self.pods and key not in self._results and num_active < spec["parallelism"]:
                self.pods[key] = self._started(spec["template"]["spec"], index)
        results = [self._results.get((name, index)) for index in range(spec["completions"])]
        if None not in results and not (folder / "status.json").exists():
            kind = "Complete" if all(results) else "Failed"
            (folder / "status.tmp").write_text(json.dumps({"conditions": [{"type": kind, "status": "True"}]}))
            (folder / "status.tmp").rename(folder / "status.json")

    def _judge(self, key: tuple[str, int], spec: dict[str, Any], code: int) -> None:
        if code == 0:
            self._results[key] = True
            return
        action = next((rule["action"] for rule in spec["podFailurePolicy"]["rules"]
                       if code in rule.get("onExitCodes", {}).get("values", [])), "Count")
        self._failures[key] += action == "Count"
        if action == "FailIndex" or self._failures[key] > spec["backoffLimitPerIndex"]:
            self._results[key] = False

    def _started(self, pod: dict[str, Any], index: int) -> subprocess.Popen[bytes]:
        (container,) = pod["containers"]
        for mount in container["volumeMounts"]:
            assert Path(mount["mountPath"]).is_dir(), "a claim is a folder of this machine"
        said = {entry["name"]: entry["value"] for entry in container["env"]}
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[3])} | {
            name: expanded(value, said) for name, value in said.items()}
        with open(self.folder / "pods.log", "ab") as log:
            return subprocess.Popen(
                [expanded(word, said) for word in container["command"]], stdout=log, stderr=log,
                cwd=container["workingDir"], start_new_session=True,
                env=environment | {"JOB_COMPLETION_INDEX": str(index)})

    @staticmethod
    def _kill(pod: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pod.pid, signal.SIGKILL)
        pod.wait()
