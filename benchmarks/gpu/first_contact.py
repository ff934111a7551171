"""First run on a GPU: repeat on the device the checks that so far ran only on CPUs, in rungs of minutes.

Usage: python benchmarks/gpu/first_contact.py --out DIR [--rungs NAME,PART] [--minutes 9] [--carry FILE]
       python benchmarks/gpu/first_contact.py --list

Rungs run one after another in the order of `setting.RUNGS`, each in its own process, which is killed with
its children after three times its expected duration. DIR/events.jsonl gets each figure as soon as it is
measured, and PASS or FAIL at the end of a rung. So a kill at any moment loses only the figure under way.
Rungs that have passed are skipped without `--again`. `--dry` runs on the CPU, at the smallest sizes, with the
Transformer Engine double of the tests, and lists under "not in a dry run" the checks that need a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import signal
import site
import subprocess
import sys
import tarfile
import time
import traceback
from itertools import zip_longest
from pathlib import Path
from typing import Any

from setting import DOUBLE, FAIL, PASS, ROOT, RUNGS, Failed, Rung, Setting, read_results

PATIENCE, DRY_BUDGET_S = 3.0, 1800.0
"""Budget of a rung over its expected duration; budget of a dry rung, on a busy CPU."""
ENDED_WITHIN_S = 30
"""Longest wait for the end of killed processes."""
CACHES = "caches.tar.xz"
"""File in DIR with the kernels that Triton and torch compiled; a later call unpacks it into `--work`."""
LIBRARIES = ("cudnn", "cu13", "nccl", "cublas")
"""Folders of NVIDIA's Python packages whose libraries replace those of the system."""


def list_rungs() -> str:
    """Return a line per rung: its minutes, the sum of minutes up to its end, name and measurement."""
    lines, total = ["minutes   sum  rung"], 0.0
    for rung in RUNGS:
        total += rung.minutes
        lines.append(f"{rung.minutes:7.1f} {total:5.1f}  {rung.name:<25} {rung.measures}")
    return "\n".join(lines)


def choose_rungs(words: str) -> list[Rung]:
    """Return the rungs of a comma-separated list of names and parts, in the order of the list.

    Raises:
        ValueError: a word names neither a rung nor a part.
    """
    chosen: list[Rung] = []
    for word in words.split(",") if words else [rung.name for rung in RUNGS]:
        found = [rung for rung in RUNGS if word in (rung.name, rung.name.partition(".")[0])]
        if not found:
            raise ValueError(f"{word}: no rung or part has this name; --list prints them")
        chosen += [rung for rung in found if rung not in chosen]
    return chosen


def run_here(rung: Rung, setting: Setting, wait_for_go: bool) -> None:
    """Run a rung in this process and record its figures.

    With `wait_for_go`, import its part, and then wait for a line on standard input: the process imports while
    the rung before it computes. Without a line the parent has ended, and so does this process.
    """
    sys.path.append(str(ROOT))
    if setting.dry:
        sys.path.insert(0, str(DOUBLE))
        import transformer_engine.pytorch  # noqa: F401  megatron_sov hides it unless it is already imported
    problem, part = "", None
    try:
        part = importlib.import_module(rung.module)
        if hasattr(part, "prepare"):
            part.prepare(setting)
    except Exception:  # recorded below as the rung's problem
        problem = traceback.format_exc()
    if wait_for_go and not sys.stdin.readline():
        return
    start_s = time.monotonic()
    setting.record("start", rung.name, dry=setting.dry, device=get_device_name(setting, rung))
    try:
        if part is not None and not problem:
            cases = (rung.case,) if rung.case else ()
            for name, value in part.measure(setting, *cases):
                setting.record("figure", rung.name, name=name, value=value)
    except Failed as e:
        problem = str(e)
    except Exception:  # after any error the other rungs run, and the journal names the error
        problem = traceback.format_exc()
    setting.record("end", rung.name, status=FAIL if problem else PASS, problem=problem,
                   seconds=round(time.monotonic() - start_s, 1))


def get_device_name(setting: Setting, rung: Rung) -> str:
    """Return the name of the device on which the figures are measured."""
    if setting.dry or not rung.on_gpu:
        return f"CPU ({platform.machine()})"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


class RungProcess:
    """A process that has started to import a rung's part and waits to measure it."""

    def __init__(self, rung: Rung, setting: Setting) -> None:
        self.rung, self._setting = rung, setting
        words = [sys.executable, "-W", "ignore", __file__, "--out", str(setting.out), "--work",
                 str(setting.work), "--in-process", rung.name, *["--dry"] * setting.dry]
        self._process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdin=subprocess.PIPE,
                                         text=True, env=build_rung_environment(setting, rung))

    def run(self, budget_s: float) -> None:
        """Measure the rung; if its process ends early or the budget is spent, record the failure."""
        start_s, budget_spent = time.monotonic(), False
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; the exit code is recorded below
            self._process.stdin.write("\n")
            self._process.stdin.close()
        try:
            self._process.wait(budget_s)
        except subprocess.TimeoutExpired:
            budget_spent = True
        finally:  # also after SIGTERM
            self.end()
        results = self._setting.read_results()
        result = results.get(self.rung.name, {"status": ""})
        if self._process.returncode or result["status"] not in (PASS, FAIL):
            if not result["status"]:
                self._setting.record("start", self.rung.name, dry=self._setting.dry, device="")
            problem = (f"not done within {budget_s:.0f} s" if budget_spent
                       else f"its process ended with exit code {self._process.returncode}")
            self._setting.record("end", self.rung.name, status=FAIL, problem=problem,
                                 seconds=round(time.monotonic() - start_s, 1))

    def end(self) -> None:
        """Kill the process and its children and wait for their end, which frees their GPU memory."""
        deadline_s = time.monotonic() + ENDED_WITHIN_S
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter for zombies on macOS
            while time.monotonic() < deadline_s:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.poll()  # reaps it
                time.sleep(0.02)
        self._process.wait()


def build_rung_environment(setting: Setting, rung: Rung) -> dict[str, str]:
    """Return the environment of a rung: caches of compiled kernels, the allocator's segments, and the CUDA
    libraries of the Python packages before those of the system, which Transformer Engine would load too."""
    folders = [f"{packages}/nvidia/{name}/lib" for packages in site.getsitepackages() for name in LIBRARIES]
    paths = [*filter(os.path.isdir, folders), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    caches = {f"{name}_CACHE_DIR": str(setting.work / f"caches/{name.lower()}")
              for name in ("TRITON", "TORCHINDUCTOR")}
    return os.environ | caches | {
        "LD_LIBRARY_PATH": os.pathsep.join(paths), "NCCL_GRAPH_REGISTER": "0",
        "PYTORCH_ALLOC_CONF": f"expandable_segments:{rung.case != 'fixed_segments'}"}


def run_rungs(rungs: list[Rung], setting: Setting, minutes: float) -> int:
    """Run rungs and print the status of each; return the number of failed rungs.

    A rung whose expected duration exceeds what is left of `minutes` does not start.
    """
    failed, end_s = 0, time.monotonic() + 60 * minutes
    importing: dict[str, RungProcess] = {}
    # `timeout` and Slurm send SIGTERM; raise SystemExit, so that `finally` also kills the started processes
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for rung, following in zip_longest(rungs, rungs[1:]):
            left_s = end_s - time.monotonic()
            if left_s < 60 * rung.minutes:
                print(f"LEFT  {rung.name:<25} takes {rung.minutes} minutes", flush=True)
                continue
            process = importing.pop(rung.name, None) or RungProcess(rung, setting)
            if following is not None:
                importing[following.name] = RungProcess(following, setting)
            process.run(min(left_s, DRY_BUDGET_S if setting.dry else 60 * PATIENCE * rung.minutes))
            failed += print_result(rung, setting.read_results()[rung.name])
    finally:
        for process in importing.values():
            process.end()
        save_caches(setting)
    return failed


def print_result(rung: Rung, result: dict[str, Any]) -> bool:
    """Print status, seconds and problem of a rung; return whether it has failed."""
    print(f"{result['status']}  {rung.name:<25} {result['seconds']} s", flush=True)
    if result["problem"]:
        print("      " + str(result["problem"]).strip().splitlines()[-1], flush=True)
    for left_out in result["figures"].get("not in a dry run", []):
        print(f"      not in a dry run: {left_out}", flush=True)
    return bool(result["status"] != PASS)


def save_caches(setting: Setting) -> None:
    """Pack the compiled kernels into one file, since thousands of files do not leave a lent machine."""
    if not setting.dry and (setting.work / "caches").is_dir():
        with tarfile.open(setting.out / CACHES, "w:xz") as archive:
            archive.add(setting.work / "caches", "caches")


def carry_events(journal: Path, setting: Setting) -> None:
    """Append the events of CPU rungs that have passed in another journal, unless they have run here."""
    here = setting.read_results()
    on_cpu = {rung.name for rung in RUNGS if not rung.on_gpu}
    for name, result in read_results(journal, setting.dry).items():
        if name not in on_cpu or result["status"] != PASS or name in here:
            continue
        setting.record("start", name, dry=setting.dry, device="carried")
        for figure, value in result["figures"].items():
            setting.record("figure", name, name=figure, value=value)
        setting.record("end", name, status=PASS, problem="", seconds=result["seconds"])


def main() -> None:
    """Run the rungs of `--rungs`; exit code 1 if one has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the rungs with their expected minutes")
    parser.add_argument("--out", type=Path, help="folder of the journal")
    parser.add_argument("--work", type=Path, help="folder of data and runs; default: DIR/work")
    parser.add_argument("--rungs", default="", help="rungs or parts, in this order; default: all")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no rung that would take longer")
    parser.add_argument("--carry", type=Path, metavar="FILE", help="journal with the rungs of the CPU")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with the double")
    parser.add_argument("--again", action="store_true", help="also rungs that have passed")
    parser.add_argument("--in-process", metavar="RUNG", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print(list_rungs())
        return
    if args.out is None:
        parser.error("--out: give the folder of the journal")
    try:
        rungs = choose_rungs(args.in_process or args.rungs)
    except ValueError as e:
        parser.error(f"--rungs: {e}")
    setting = Setting(args.out.resolve(), args.dry, (args.work or args.out / "work").resolve())
    for folder in (setting.out, setting.work):
        folder.mkdir(parents=True, exist_ok=True)
    if args.in_process:
        run_here(rungs[0], setting, wait_for_go=True)
        return
    if args.carry:
        carry_events(args.carry, setting)
    results = setting.read_results()
    passed = [r for r in rungs if not args.again and results.get(r.name, {}).get("status") == PASS]
    for rung in passed:
        print(f"{PASS}  {rung.name:<25} kept", flush=True)
    sys.exit(bool(run_rungs([r for r in rungs if r not in passed], setting, args.minutes)))


if __name__ == "__main__":
    main()
