"""Scoring in processes: a reward that hangs, crashes or is random only affects its row."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards import scoring
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.judge.rewards.scoring import BATCH_ROWS, ProcessRunner, score_file
from megatron_sov.work.processes import workers
from megatron_sov.work.processes.channel import send_message
from megatron_sov.work.processes.children import remove_unsafe_variables
from megatron_sov.work.processes.workers import serve_requests

CODE = '''
import itertools, os, time
from megatron_sov.base.errors import UserError
count = itertools.count()

class Does:
    """Does what the response names, or returns it as a number."""

    def __init__(self, *, size: int = 1) -> None:
        self.size = size
        if size < 0:
            os._exit(3)

    def score(self, row):
        what = row["response"]
        if what == "hang":
            time.sleep(3600)
        if what == "nap":
            return time.sleep(0.2) or 0.0
        if what == "loop":
            while True:
                pass
        if what == "die":
            os._exit(7)
        if what == "mistake":
            raise UserError("mend the settings")
        if what == "eat":
            return len(bytearray(1 << 40))
        if what == "tell":
            return sum(name in os.environ for name in ("WANDB_API_KEY", "MY_VERIFIER", "PATH"))
        if what == "deep":
            return (deep := lambda n: deep(n + 1))(0)
        if what == "abort":
            os.abort()
        if what == "killed":
            os.kill(os.getpid(), 9)
        if what == "change":
            return next(count)
        return float(what)
'''


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., ProcessRunner]:
    """A function that returns a runner of the reward `Does`.

    Its keyword arguments are those of `ProcessRunner`, and "settings" of the reward.
    """
    (tmp_path / "does.py").write_text(CODE)
    return lambda **more: ProcessRunner(request_reward(f"{tmp_path}/does.py:Does", more.pop("settings", {})),
                                        more.get("time_limit_s", 20.0), more.get("workers", 2),
                                        variables=more.get("variables", ()), control=more.get("control"),
                                        cpu_limit_s=more.get("cpu_limit_s", float("inf")))


def build_rows(*responses: str) -> list[dict[str, str]]:
    return [{"response": response} for response in responses]


def test_results_come_in_the_order_of_the_rows(runner) -> None:
    with runner() as running:
        results = running.score(build_rows(*map(str, range(20))))
        assert [result.reward for result in results] == list(range(20))
        assert running.score([]) == []
        assert [r.reward for r in running.score(build_rows("5", "6"))] == [5.0, 6.0]


def test_failures_affect_a_single_row(runner) -> None:
    with runner(time_limit_s=0.5) as running:
        result = running.score(build_rows("1", "hang", "die", "eat", "change", "x", "loop", "2"))
    assert [(r.reward, r.status) for r in result] == [
        (1.0, "scored"), (None, "timeout"), (None, "failed"), (None, "refused"), (None, "failed"),
        (None, "failed"), (None, "timeout"), (2.0, "scored")]
    assert result[1].reason == "took longer than 0.5 s"
    assert result[2].reason == "the process that judged it ended (exit code 7)"
    assert "more memory" in result[3].reason
    assert "then 1 for the same row under one version" in result[4].reason


def test_ended_process_affects_a_single_row(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(workers, "send_message",
                        lambda channel, rows: (sent.append(len(rows)), send_message(channel, rows)))
    monkeypatch.setattr(workers, "FAST_REQUEST_S", 60.0)
    with runner(workers=1) as running:
        result = running.score(build_rows(*map(str, range(40)), "die", *map(str, range(41, 60))))
    assert [r.reward for r in result] == [*range(40), None, *range(41, 60)]
    # requests double from 1 to 16 rows; row 40 ends the process during the next, of the last 29 rows, and
    # another process starts with one row again
    assert sent == [1, 2, 4, 8, 16, 29, 1, 2, 4, 8, 4]
    sent.clear()
    monkeypatch.setattr(workers, "FAST_REQUEST_S", -1.0)
    with runner(workers=1, time_limit_s=0.7) as running:
        # the limit is per row: five rows of 0.2 s pass
        result = running.score(build_rows(*["1"] * 32, *["nap"] * 5))
    assert sent == [1] * 37 and {r.status for r in result} == {"scored"}


def test_busy_judge_scores_0_and_waiting_judge_has_no_reward(runner) -> None:
    with runner(cpu_limit_s=0.2, control="5") as running:
        result = running.score(build_rows("1", "loop", "eat", "deep", "abort", "die", "killed", "x", "2"))
    assert [(r.reward, r.status) for r in result] == [
        (1.0, "scored"), (0.0, "timeout"), (0.0, "scored"), (0.0, "scored"), (0.0, "scored"),
        (None, "failed"), (None, "failed"), (None, "failed"), (2.0, "scored")]
    assert result[1].reason == "the response: judging took longer than 0.2 s of a processor"
    assert result[1].components == {"why": result[1].reason}
    with runner(cpu_limit_s=0.2, control="5", time_limit_s=0.3) as running:
        assert running.score(build_rows("hang", "1"))[0].reward is None
    with runner(cpu_limit_s=0.2, control="loop") as running:  # the machine may be to blame
        assert [(r.reward, r.status) for r in running.score(build_rows("loop", "1"))] == [
            (None, "timeout"), (1.0, "scored")]


def test_row_without_processor_time_is_judged_again(runner, tmp_path: Path) -> None:
    (tmp_path / "does.py").write_text(CODE.replace('if what == "hang":', f"""if what == "once":
            with contextlib.suppress(FileExistsError), open({str(tmp_path / "came")!r}, "x"):
                time.sleep(3600)
            return 3.0
        if what == "hang":""").replace("import itertools", "import contextlib, itertools"))
    with runner(cpu_limit_s=5, control="5", time_limit_s=1.5, workers=1) as running:
        assert [(r.reward, r.status) for r in running.score(build_rows("once"))] == [(3.0, "scored")]


@pytest.mark.each(("size", "problem"), [('"big"', 'size = "big" must be a whole number'),
                                        ("-1", r"ended while it started \(exit code 3\)")])
def test_reward_that_cannot_be_built_stops_scoring(size: str, problem: str, runner) -> None:
    with pytest.raises(UserError, match=problem), runner(settings={"size": json.loads(size)}) as running:
        running.score(build_rows("1"))


def test_user_error_stops_scoring(runner) -> None:
    with runner() as running, pytest.raises(UserError, match="mend the settings"):
        running.score(build_rows("1", "mistake", "2"))


@pytest.mark.deep
def test_reward_sees_safe_and_requested_variables(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    forkserver._forkserver._stop()  # the next fork server starts with the variables set here
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("MY_VERIFIER", "at home")
    for variables, seen in (((), 1.0), (("MY_VERIFIER",), 2.0)):
        with runner(variables=variables, workers=1) as running:
            assert running.score(build_rows("tell"))[0].reward == seen


def test_gpu_order_variable_is_preserved(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3", "HF_TOKEN": "secret"}
    monkeypatch.setattr(os, "environ", dict(before))
    remove_unsafe_variables()
    assert os.environ.keys() == before.keys() - {"HF_TOKEN"}


def test_large_time_limits_work(runner) -> None:
    with runner(time_limit_s=float("inf"), workers=1) as running:
        assert running.score(build_rows("1"))[0].reward == 1.0


def test_fork_server_preloads_modules_of_all_runners() -> None:
    for name in ("colorsys", "wave"):
        ProcessRunner(request_reward("stem", {}), 1.0, 1, [name])
    assert {"colorsys", "wave"} <= set(forkserver._forkserver._preload_modules)


ENDLESS_SCORING = '''
import sys
from megatron_sov.judge.rewards.registry import request_reward
from megatron_sov.judge.rewards.scoring import ProcessRunner

with ProcessRunner(request_reward(sys.argv[1], {}), 3600.0, 1) as running:
    running.score([{"response": "loop"}])
'''


def test_busy_process_ends_with_its_killed_command(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    (tmp_path / "does.py").write_text(CODE.replace('if what == "loop":', f"""if what == "loop":
            with open({str(pid_file)!r}, "w") as file:
                file.write(str(os.getpid()))"""))
    command = subprocess.Popen([sys.executable, "-c", ENDLESS_SCORING, f"{tmp_path}/does.py:Does"])
    while not (pid_file.exists() and pid_file.read_text()) and command.poll() is None:
        time.sleep(0.01)
    process = psutil.Process(int(pid_file.read_text()))
    command.kill()
    command.wait()
    process.wait(60)


@pytest.mark.parametrize("is_early", [True, False])
def test_orphaned_process_ends_without_a_traceback(is_early: bool, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    # `_start_judge` would limit the memory and change the signals of this test's process
    for name in ("remove_unsafe_variables", "limit_memory", "signal"):
        monkeypatch.setattr(scoring, name, Mock())
    (tmp_path / "does.py").write_text(CODE)
    command, own = socket.socketpair()
    with own:
        if is_early:
            command.close()
        else:
            send_message(command, [({"response": "1"}, True)])
            own.shutdown(socket.SHUT_WR)
        serve_requests(own, scoring._start_judge, (request_reward(f"{tmp_path}/does.py:Does", {}), (), 1.0))
    command.close()


LONGEST = '''
def longest(completions, prompts, **kwargs):
    assert len(set(map(str, prompts))) == 1
    if "die" in completions:
        import os
        os._exit(7)
    n = [len(c) if isinstance(c, str) else len(c[0]["content"]) for c in completions]
    return [None if "none" in completions and x == 1 else float(x == max(n)) for x in n]
'''


def test_function_gets_all_responses_to_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LONGEST)
    request = request_reward(f"{tmp_path}/own.py:longest", {})
    chat = [{"role": "user", "content": "c"}]
    pairs = [("a", "x"), ("a", "xyz"), ("b", "xy"), (chat, "x"), (chat, "xy"), ("d", "die"), ("d", "x"),
             ("a", "xy"), ("e", "x"), ("e", "none"), (None, "x"), (None, "xy"), ("b", None)]
    with scoring.create_runner(request, build_versioned_reward(request), 2) as running:
        outcome = running.score([{"prompt": prompt, "response": text} for prompt, text in pairs])
    assert [(result.reward, result.status) for result in outcome] == [
        (0.0, "scored"), (1.0, "scored"), (1.0, "scored"), (0.0, "scored"), (1.0, "scored"),
        (None, "failed"), (None, "failed"), (0.0, "scored"), (None, "refused"), (1.0, "scored"),
        (1.0, "scored"), (1.0, "scored"), (None, "refused")]


def test_groups_stay_together_in_parts_and_files(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LONGEST)
    # one row less than a batch, then a group that the end of the batch would split
    lines = [{"prompt": f"p{i}", "response": "x"} for i in range(BATCH_ROWS - 1)]
    lines += [{"prompt": "last", "response": "x" * n} for n in (1, 2, 3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own = f"{tmp_path}/own.py:longest"
    parts = {"long": {"reward": own}}
    for request in (request_reward(own, {}), request_reward("composed", {"parts": parts})):
        score_file(request, build_versioned_reward(request), tmp_path / "in.jsonl", tmp_path / "out.jsonl", 2,
                   lambda count: None, redo=True)
        written = (tmp_path / "out.jsonl").read_text().splitlines()
        rewards = [json.loads(line)["reward"] for line in written]
        assert rewards == [1.0] * (BATCH_ROWS - 1) + [0.0, 0.0, 1.0]
        (tmp_path / "out.jsonl").unlink()
