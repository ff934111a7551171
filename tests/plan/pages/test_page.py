"""The page of a plan in a real browser: everything is drawn, and nothing overlaps on any screen."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import to_json
from megatron_sov.cli import main
from megatron_sov.model.config import apply_settings
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.calibration.expected import PARAMETERS, Machine, expected
from megatron_sov.plan.footprint import kept
from megatron_sov.plan.on_cluster import PlacedPlan, placed, searched
from megatron_sov.plan.pages.page import plan_page
from megatron_sov.plan.pricing import machines
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.work.clusters.units import GIB

HOSTILE = "</script><script>window.hacked = 1</script>"


@pytest.fixture(scope="module")
def found() -> PlacedPlan:
    """A run of two kinds of stage, searched."""
    request = RecipeRequest(recipes.get("tiny-k-exaone-extend"), (), from_file=False)
    return searched(request, machines("h100", 2), ["tiny-k-exaone-extend"])


def test_every_chart_is_drawn_and_the_layout_holds_on_every_screen(
        found: PlacedPlan, tmp_path: Path,
        measure_page: Callable[[Path], dict[tuple[str, int], dict[str, Any]]]) -> None:
    page = plan_page(found.config, found.quotes, found.told)
    (file := tmp_path / "plan.html").write_text(page, encoding="utf-8")
    screens = measure_page(file)
    assert sorted(screens) == [("dark", 390), ("light", 820), ("light", 1440)]
    num_charts = page.count('<div class="drawing"')
    assert num_charts >= 7  # memory, a step and the points of each of two kinds, two of the schedule
    for (_, width), screen in screens.items():
        assert screen["scroll_width"] <= width
        assert screen["num_charts"] == num_charts and screen["collisions"] == []


def test_the_page_says_what_the_tables_say(found: PlacedPlan) -> None:
    page = plan_page(found.config, found.quotes, found.told)
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    assert found.told is not None
    for word in ("What it takes", "may take", "Layouts that fit", "effective training time", "32k",
                 "Schedule", f"{found.quotes[0].tokens_per_s_per_gpu:,.0f}", "megatron-sov submit extend"):
        assert word in text, word


def test_the_page_of_jobs_says_nothing_of_a_job_without_gpus() -> None:
    """Rewards hold no GPU, and an engine may take less memory than the trainer."""
    request = RecipeRequest(recipes.get("typhoon-s-4b-legal"), (), from_file=False)
    found = placed(request, machines("h100", 1))
    page = plan_page(found.config, found.quotes, found.told)
    page = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert not re.search(r" Speed 0 ", text)
    fullest = max(found.quotes, key=lambda q: q.memory.total_bytes)
    assert f"may take {fullest.memory.limit_bytes / GIB:,.1f} GiB" in text
    assert "the line is what a run may take" not in text
    assert "8 x H100-80GB: data parallel alone, ZeRO-1" in text


def test_hostile_names_stay_text() -> None:
    config = apply_settings(recipes.get("tiny-solar-open"), [
        f'data.phases=[{{"name": "{HOSTILE}"}}]'.replace("</", "<\\/")])
    request = RecipeRequest(config, (), from_file=True)
    found = searched(request, machines("h100", 1), ["x"])
    assert "<script>window" not in plan_page(found.config, found.quotes, found.told)


# The page on plans that are held to account, typed as it stands.


PAGE = Path(__file__).parents[3] / "docs/plan_accounts.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
CPU = Machine("AMD EPYC", False, 1, 1 << 28)


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
          capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Returns a function that types a line of the page beside two runs, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    for name, width, step_s in (("narrow", 64, 0.08), ("wide", 256, 0.5)):
        config = apply_settings(recipes.get("tiny-qwen3"), [f"model.hidden_size={width}", "train.steps=20"])
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(to_json(config.to_dict()))
        kept.keep(run, expected(config, 1, CPU))
        log = EventLog(run / EVENTS)
        log.write("run_start", num_ranks=1, layout={"tp": 1}, plan=0, on_gpu=False,
                  machine={"device": CPU.device, "threads": 1})
        phase = config.data.phases[0]
        log.write("phase", step=0, name=phase.name, seq_len=phase.seq_len,
                  global_batch_size=config.train.global_batch_size)
        for step in range(1, 21):
            log.write("step", step=step, step_time_s=step_s, peak_memory_bytes=3 << 28)
        log.close()

    def type_line(line: str) -> str:
        assert main(shlex.split(line)[1:]) == 0
        return capsys.readouterr().out

    return type_line


def test_the_report_has_the_section(typed: Callable[[str], str], tmp_path: Path) -> None:
    typed(BLOCKS[0].strip())
    page = (tmp_path / "runs/wide/report.html").read_text(encoding="utf-8")
    assert "Plan against what happened" in page and "no prediction: chip unknown (AMD EPYC)" in page


def test_runs_teach_and_plans_are_made_with_it(typed: Callable[[str], str], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    learn, plan = BLOCKS[1].strip().splitlines()
    assert "error, median over 2: none before" in typed(learn)
    assert "days" in typed(plan)
    # the next run keeps a plan with a speed
    monkeypatch.setenv(PARAMETERS, "ours.json")
    assert f"{PARAMETERS}=ours.json" in PAGE.read_text(encoding="utf-8")
    assert expected(recipes.get("tiny-qwen3"), 1, CPU).stretches[0].step_s > 0


def test_post_training_is_priced_by_its_jobs(typed: Callable[[str], str]) -> None:
    sft, distill, policy = BLOCKS[2].strip().splitlines()
    assert "published of typhoon-s-8b" in typed(sft)
    told = typed(distill)
    assert all(told_of in told for told_of in ("generate", "train", "teacher beside: qwen3-30b-a3b-2507"))
    asked = typed(policy)
    assert all(f'"kind": "RL: {job}"' in asked for job in ("generate", "reward", "train"))
