"""First run on a GPU: repeat on the device, part by part, the checks that so far ran only on CPUs.

Usage: python benchmarks/gpu/first_contact.py --out DIR [--parts installation,losses] [--dry] [--again]

The speed of the machine is measured first and stored in DIR/machine.json. It gives each part a time budget
(`setting.Cost`). Each part runs in its own process, which is killed with its children when the budget is
spent. It writes each figure into DIR/PART.json as soon as the figure is measured, and PASS or FAIL at the
end. Parts that have passed are skipped without `--again`. `--dry` runs every part on the CPU, at the smallest
sizes, with the Transformer Engine double of the tests, and lists under "not in a dry run" the checks that
need a GPU.

  installation  Transformer Engine imports and has the expected signatures; `doctor` reports no problem
  losses        tiny recipes, GPU against CPU; routers get updates; checkpoints resume on the other device
  post          fine-tuning, preferences, distillation, reinforcement learning and generation, GPU against CPU
  attention     packed rows x windows x grouped heads against a dense reference, with gradients
  fp8           matrix products of each FP8 recipe against their emulation
  fp8_training  losses of each FP8 recipe against bf16, and after a resume
  big_rank      one rank of solar-open-102b: peak memory against the estimate of `plan`, TFLOP/s per feature
  transfers     speed of snapshots and of collectives with one rank, and seconds of a start
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from setting import DOUBLE, ROOT, Failed, Machine, Setting

PARTS = ("installation", "losses", "post", "attention", "fp8", "fp8_training", "big_rank", "transfers")
MACHINE = "machine"
"""Name of the process that measures the speed of the machine, and of its result file."""
MACHINE_BUDGET_S = 900
"""Time limit of that process: the first import of all libraries from a cold disk takes minutes."""
RUNNING, ENDED_WITHIN_S = "RUNNING", 30
"""Status of a part before its end; longest wait for the end of killed processes."""


def run_here(part: str, setting: Setting) -> None:
    """Run a part in this process, and write its result file after each figure."""
    start, problem, figures = time.monotonic(), "", dict[str, Any]()
    sys.path.append(str(ROOT))
    if setting.dry:
        sys.path.insert(0, str(DOUBLE))
    try:
        for name, value in importlib.import_module(f"part_{part}").measure(setting):
            figures[name] = value
            write(part, setting, RUNNING, figures, time.monotonic() - start)
    except Failed as e:
        problem = str(e)
    except Exception:  # after any error the other parts run, and the result names the error
        problem = traceback.format_exc()
    write(part, setting, "FAIL" if problem else "PASS", figures, time.monotonic() - start, problem)


def write(part: str, setting: Setting, status: str, figures: dict[str, Any], seconds: float,
          problem: str = "") -> None:
    """Write the result file of a part atomically."""
    result = {"part": part, "status": status, "dry": setting.dry, "seconds": round(seconds, 1),
              "device": device_name(setting), "problem": problem, "figures": figures}
    file = setting.out / f"{part}.json"
    new = file.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    new.rename(file)


def device_name(setting: Setting) -> str:
    """Return the name of the device on which the figures were measured."""
    if setting.dry:
        return f"CPU ({platform.machine()}), dry run"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def measure_machine(setting: Setting, started_s: float) -> None:
    """Measure the speed of this machine in a process that has just imported training.

    Args:
        setting: result folder, and whether this is a dry run.
        started_s: Unix time at which this process was started.
    """
    if setting.dry:
        sys.path.insert(0, str(DOUBLE))
    sys.path.append(str(ROOT))
    import torch
    import transformer_engine.pytorch  # noqa: F401

    from megatron_sov.train.stages import stage  # noqa: F401

    def rate(device: str, dtype: torch.dtype, size: int) -> float:
        a = torch.ones(size, size, device=device, dtype=dtype)
        times_s = []
        for _ in range(3):
            begin_s = time.monotonic()
            float((a @ a)[0, 0])  # waits for the device
            times_s.append(time.monotonic() - begin_s)
        return 2 * size ** 3 / min(times_s)

    on_host = rate("cpu", torch.float32, 1024)
    on_device = on_host if setting.dry else rate("cuda", torch.bfloat16, 8192)
    machine = Machine(time.time() - started_s, on_device, on_host)
    (setting.out / f"{MACHINE}.json").write_text(json.dumps(asdict(machine)) + "\n", encoding="utf-8")


def machine_of(setting: Setting) -> Machine:
    """Measure the speed of this machine in its own process."""
    file = setting.out / f"{MACHINE}.json"
    file.unlink(missing_ok=True)
    code, _ = run_process(MACHINE, setting, MACHINE_BUDGET_S)
    if not file.is_file():
        sys.exit(f"the machine could not be measured within {MACHINE_BUDGET_S} s (exit code {code}): "
                 "importing torch, Transformer Engine and megatron_sov and multiplying matrices; see above")
    return Machine(**json.loads(file.read_text(encoding="utf-8")))


def run_process(part: str, setting: Setting, budget_s: float) -> tuple[int | None, float]:
    """Run a part in its own process; return its exit code (None: the budget was spent) and its seconds.
    All processes that it started have then ended and have freed their GPU memory."""
    words = [sys.executable, "-W", "ignore", __file__, "--out", str(setting.out), "--in-process", part,
             "--started", str(time.time()), *["--dry"] * setting.dry]
    start_s = time.monotonic()
    # `timeout` and Slurm send SIGTERM; raise SystemExit, so that `finally` also kills the started processes
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True) as process:
        try:
            code: int | None = process.wait(budget_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also after Ctrl-C, which the terminal sends only to this process
            end_group(process.pid)
    return code, time.monotonic() - start_s


def end_group(group: int) -> None:
    """Kill the processes of a group and wait for their end, which frees their GPU memory."""
    deadline_s = time.monotonic() + ENDED_WITHIN_S
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter for zombies on macOS
        while time.monotonic() < deadline_s:
            os.killpg(group, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(group, os.WNOHANG)
            time.sleep(0.02)


def run_apart(part: str, setting: Setting, budget_s: float) -> dict[str, Any]:
    """Run a part in its own process and return the content of its result file."""
    file = setting.out / f"{part}.json"
    file.unlink(missing_ok=True)
    code, seconds = run_process(part, setting, budget_s)
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if code or found.get("status", RUNNING) == RUNNING:  # record the failure next to the measured figures
        problem = (f"not done within {budget_s:.0f} s" if code is None
                   else f"its process ended with exit code {code}")
        write(part, setting, "FAIL", found.get("figures", {}), seconds, problem)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def passed_before(part: str, setting: Setting) -> dict[str, Any] | None:
    """Return the stored result of a part that passed earlier, or None."""
    file = setting.out / f"{part}.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["status"] == "PASS" and before["dry"] == setting.dry:
            return dict(before)
    return None


def run_parts(parts: list[str], setting: Setting, again: bool) -> int:
    """Run parts and print the status of each; return the number of failed parts."""
    failed, machine = 0, None
    for part in parts:
        result = None if again else passed_before(part, setting)
        note = "kept"
        if result is None:
            machine = machine or machine_of(setting)
            budget_s = importlib.import_module(f"part_{part}").cost(setting).budget_s(machine)
            result = run_apart(part, setting, budget_s)
            note = f"{result['seconds']} s of {budget_s:.0f}"
        failed += result["status"] != "PASS"
        print(f"{result['status']}  {part:<13} {note}", flush=True)
        if result["problem"]:
            print("      " + str(result["problem"]).strip().splitlines()[-1], flush=True)
        for left_out in result["figures"].get("not in a dry run", []):
            print(f"      not in a dry run: {left_out}", flush=True)
    return failed


def main() -> None:
    """Run the parts of `--parts`; exit code 1 if one has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with the double")
    parser.add_argument("--again", action="store_true", help="also parts that have passed")
    parser.add_argument("--in-process", metavar="PART", choices=(*PARTS, MACHINE),
                        help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.out.resolve(), args.dry)
    if args.in_process == MACHINE:
        measure_machine(setting, args.started)
        return
    if args.in_process:
        run_here(args.in_process, setting)
        return
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: unknown; there are {', '.join(PARTS)}")
    sys.path.append(str(ROOT))  # the cost of a part is computed from its recipes
    sys.exit(bool(run_parts(parts, setting, args.again)))


if __name__ == "__main__":
    main()
