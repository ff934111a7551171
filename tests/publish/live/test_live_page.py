"""The live page: what it shows as runs grow, stop and begin again, in a real browser and without one."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.commands.operate.run_state import RunStateReader
from megatron_sov.commands.operate.watch import address_of
from megatron_sov.publish.live.server import LiveBoard
from megatron_sov.publish.live.watched import WatchedRun, WatchedWork
from megatron_sov.rollouts.rows import STOP, Key, RewardRow, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.work.progress.journal import Journal, begin_journal, work_folder
from tests.publish.live.conftest import Browser

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
Watch = Callable[..., str]


def start(run: Path, num_steps: int = 40, **fields: Any) -> EventLog:
    """Begin a run, or go on with it."""
    run.mkdir(parents=True, exist_ok=True)
    config = recipes.get("tiny-solar-open").to_dict()
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    log = EventLog(run / EVENTS)
    log.write("run_start", recipe="tiny-solar-open", num_ranks=1, num_steps=num_steps, resumed_from=0,
              **fields)
    return log


def steps(log: EventLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write("step", step=step, loss=4.0 - step / 100, grad_norm=1.0, lr=1e-3, tokens=step * 100,
                  tokens_per_s=500.0, step_time_s=0.1, phase=f"main {HOSTILE}")


def shown(*paths: Path) -> tuple[LiveBoard, str]:
    """Return a board after its first look, and all that it shows."""
    board = LiveBoard(paths, RunStateReader)
    board.look()
    return board, text_of(board)


def text_of(board: LiveBoard) -> str:
    return " ".join(html for _, html in board.panels.values())


def test_a_run_is_followed_from_before_its_folder_is_there(tmp_path: Path) -> None:
    board, text = shown(tmp_path / "run")
    assert "Nothing is there yet" in text
    log = start(tmp_path / "run")
    steps(log, 1, 5)
    board.look()
    assert "<dd>5</dd>" in text_of(board) and "Training loss, nats per token." in text_of(board)
    # a line that has no end yet is none, and one that a kill has torn stays none
    with open(tmp_path / "run" / EVENTS, "a", encoding="utf-8") as f:
        f.write('{"event": "step", "step": 6, "lo')
    board.look()
    assert "<dd>5</dd>" in text_of(board)
    log.close()
    resumed = start(tmp_path / "run", resumed_reason="killed")
    steps(resumed, 4, 9)
    resumed.write("warning", step=9, text=f"beware {HOSTILE}")
    board.look()
    text = text_of(board)
    assert "<dd>9</dd>" in text and "beware" in text and "<script>window" not in text
    resumed.close()


def test_a_run_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    log = start(tmp_path / "run")
    steps(log, 1, 30)
    log.close()
    watched = WatchedRun(tmp_path / "run", RunStateReader)
    watched.look()
    (tmp_path / "run" / EVENTS).unlink()
    log = start(tmp_path / "run")
    steps(log, 1, 3)
    log.close()
    watched.look()
    assert watched.run is not None and watched.run.curve("loss").steps.tolist() == [1, 2, 3]
    assert len(watched.news) == 1


def test_thousands_of_steps_are_thinned_and_damaged_files_end_nothing(tmp_path: Path) -> None:
    log = start(tmp_path / "long", num_steps=6000)
    steps(log, 1, 6000)
    log.close()
    with open(tmp_path / "long" / EVENTS, "ab") as f:
        f.write(b'\xff\xfe\n{"event": "step", "step": "x"}\n[1]\n')
        f.write(b'{"event": "round", "groups": 3, "means": []}\n')
        f.write(b'{"event": "phase"}\n{"event": "step", "step": 6001, "losses": 5}\n')
    board, text = shown(tmp_path / "long")
    assert len(text) < 200_000 and "6,000" in text.replace("6,001", "6,000")
    (tmp_path / "long" / "config.json").write_text("{")
    steps(log := EventLog(tmp_path / "long" / EVENTS), 6002, 6003)
    log.close()
    board.look()
    assert "config.json" in text_of(board)


def test_only_panels_that_changed_are_sent(tmp_path: Path) -> None:
    log = start(tmp_path / "run")
    steps(log, 1, 5)
    board, _ = shown(tmp_path / "run")
    seen: dict[str, str] = {}
    first = json.loads(board.news(seen).removeprefix(b"data: "))
    assert first["order"] == list(first["panels"])
    log.write("warning", step=5, text="new")
    board.look()
    second = json.loads(board.news(seen).removeprefix(b"data: "))
    assert "What happened" in second["panels"] and "Learning" not in second["panels"]
    log.close()


def test_work_on_rows_tells_what_is_kept_and_why_not(tmp_path: Path) -> None:
    output = tmp_path / "made"
    output.mkdir()
    (output / "run.json").write_text(json.dumps({"generator": "chats", "model": "m", "num_items": 4}))
    begin_journal(output, "sov-data synth", {"a": 1})
    journal = Journal(work_folder(output))
    sample = {"record": {"prompt": HOSTILE, "answer": "yes"},
              "verdicts": [{"check": "length", "passed": False}]}
    journal.add([(0, json.dumps({"samples": [{**sample, "verdicts": []}], "unusable": ""}).encode()),
                 (1, json.dumps({"samples": [sample], "unusable": ""}).encode())])
    journal.close()
    watched = WatchedWork(output)
    watched.look()
    assert (watched.num_done, watched.num_items, watched.kept, watched.rejected) == (2, 4, 1, {"length": 1})
    _, text = shown(output)
    assert "Rejected in made" in text and "&lt;script&gt;" in text and "<script>window" not in text


def test_addresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert address_of("80") == ("127.0.0.1", 80) and address_of("[::1]:0") == ("::1", 0)
    for bad in ("", "x", "80:", "1:70000", "-1"):
        with pytest.raises(UserError, match="port"):
            address_of(bad)
    (file := tmp_path / "f").write_text("x")
    assert main(["watch", str(file)]) == 2 and "is a file" in capsys.readouterr().err


def test_the_terminal_shows_all_until_all_is_complete(tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path / "run", num_steps=3)
    steps(log, 1, 3)
    log.write("run_end", step=3, wall_s=1.0, final_loss=2.0)
    log.close()
    (tmp_path / "run" / "complete.json").write_text(json.dumps({"step": 3}))
    assert main(["watch", str(tmp_path / "run")]) == 0
    assert "complete (at step 3)" in capsys.readouterr().out


PAGE = (Path(__file__).parents[3] / "docs/watching.md").read_text(encoding="utf-8")
TYPED = re.findall(r"^megatron-sov watch .*$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", TYPED)
def test_what_the_page_types_is_shown(line: str, tmp_path: Path, watch: Watch,
                                      monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    if "--http" not in words:
        start(run := Path(words[1]), num_steps=1).close()
        (run / "complete.json").write_text(json.dumps({"step": 1}))
        assert main(words) == 0 and "complete" in capsys.readouterr().out
    else:
        assert watch(*map(Path, words[1:words.index("--http")])).startswith("http://127.0.0.1:")


def test_only_who_has_the_secret_reads_and_nothing_can_be_sent(tmp_path: Path, watch: Watch) -> None:
    steps(log := start(tmp_path / "run"), 1, 3)
    log.close()
    url = watch(tmp_path / "run")
    base, token = url.rstrip("/").rsplit("/", 1)
    assert base.startswith("http://127.0.0.1:") and len(token) >= 32

    async def ask() -> tuple[list[int], dict[str, str], bytes]:
        async with aiohttp.ClientSession() as session:
            codes = []
            for method, address in (("GET", base + "/"), ("GET", f"{base}/{token[:-1]}x/"),
                                    ("GET", f"{base}/{'é' * 32}/events"), ("POST", url),
                                    ("GET", f"{url}../")):
                async with session.request(method, address) as reply:
                    codes.append(reply.status)
            # several viewers, one of whom leaves
            streams = [await session.get(f"{url}events") for _ in range(3)]
            streams[0].close()
            first = await asyncio.wait_for(streams[1].content.readline(), 60)
            async with session.get(url) as page:
                return codes, dict(page.headers), first

    codes, headers, first = asyncio.run(ask())
    assert codes == [404, 404, 404, 405, 404]
    assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
    assert json.loads(first.removeprefix(b"data: "))["order"][0] == "Now"


def test_a_browser_shows_what_comes_without_loading_again(tmp_path: Path, watch: Watch, chromium: Browser
                                                          ) -> None:
    runs = [tmp_path / "first", tmp_path / "second"]
    logs = [start(run) for run in runs]
    for log in logs:
        steps(log, 1, 5)
    url = watch(*runs)

    async def look() -> None:
        async with chromium as page:
            await page.size(390, 844)
            await page.open(url)
            await page.until("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 4", "charts")
            await page.ask("window.before = true; window.plot = document.querySelector('.plot'); 1")
            assert await page.ask("document.querySelector('.plot').data.map(line => line.name).join()") == (
                "first,second")
            steps(logs[0], 6, 25)
            logs[0].write("warning", step=25, text=f"beware {HOSTILE}")
            await page.until("document.body.innerText.includes('25 of 40')", "the new steps")
            await page.until("document.body.innerText.includes('<script>window.hacked')", "it as text")
            await page.until("document.querySelector('.plot')._fullData[0].x.length === 25", "a longer line")
            assert await page.ask("window.before && window.plot === document.querySelector('.plot')")
            assert not await page.ask("window.hacked")
            assert await page.ask("document.documentElement.scrollWidth") <= 390
            assert page.console == []

    asyncio.run(look())
    for log in logs:
        log.close()


def test_rollouts_come_with_their_rewards_as_text(tmp_path: Path) -> None:
    store = RolloutStore.create(tmp_path / "store", "sha256:t", 1000)
    rows = [Rollout(Key("p", i, "a" * 64, "b" * 64), 1, 0, {"prompt": "Why?"}, np.array([1], np.int32),
                    np.array([2, 3], np.int32), np.zeros(2, np.float32), np.zeros(2, np.int32), STOP,
                    f"answer {i} {HOSTILE}", 1.0, "test", 1.0, 2.0) for i in range(2)]
    store.add_rollouts("round-0001-piece-0000", rows, {})
    log = start(tmp_path / "run")
    steps(log, 1, 2)
    log.write("store", step=0, path=str(tmp_path / "store"))
    board, text = shown(tmp_path / "run")
    assert "answer 0" in text and "not judged yet" in text and "<script>window" not in text
    store.add_rewards("v", "round-0001-piece-0000", [
        RewardRow(row.key, row.attempt, "v", float(i), "scored") for i, row in enumerate(rows)])
    board.look()
    assert text_of(board).index("reward 1") < text_of(board).index("reward 0")
    log.close()


def test_nothing_is_computed_where_nothing_is_new(tmp_path: Path) -> None:
    steps(log := start(tmp_path / "run"), 1, 3)
    log.close()
    watched = WatchedRun(tmp_path / "run", RunStateReader)
    watched.look()
    before = watched.run
    watched.look()
    assert watched.run is before
