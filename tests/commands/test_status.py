"""What `status` prints of a state: everything about one run, one line for each of several,
a bar that adds up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.commands.status import SIGNS, as_table, bar, in_full
from megatron_sov.obs.wall_time import CATEGORIES, WallTime
from megatron_sov.watch.state import RunState, Start

SPENT_S = {"productive": 6000.0, "lost": 600.0, "evaluation": 0.0, "saving": 300.0, "startup": 60.0,
           "waiting": 240.0}
RUNNING = RunState(
    Path("runs/a"), stage="sft", recipe="tiny-solar-open", phase="main", state="running", why="in job 17",
    step=1200, num_steps=4000, tokens=19_660_800, loss=2.34567, tokens_per_s=51234.5, eta_s=8000.0,
    checkpoint="checkpoints/step-1000", checkpoint_step=1000, checkpoint_age_s=65.0, last_event_age_s=-0.3,
    warnings=2, incidents={"skip": 3, "hang": 0, "alarm": 1},
    starts=[Start(1_700_000_000.0, 0, 900, 8, "killed"), Start(math.nan, 900, None, 1, "running")],
    wall_time=WallTime(0.0, SPENT_S))


def test_one_run_in_full() -> None:
    assert in_full(RUNNING) == """\
runs/a: sft, tiny-solar-open
  state       running (in job 17), last event 0.0 s ago
  step        1,200 of 4,000 (30%), phase main, 19.66 M tokens, loss 2.3457
  speed       51,234 tokens/s, 2 h 13 min left
  checkpoint  checkpoints/step-1000, 1 min 5 s ago
  incidents   2 x warning, 3 x step not learned, 1 x alarm (megatron-sov logs runs/a)
  starts      2
      1  2023-11-14 22:13:20 UTC  from step 0 to step 900, 8 processes: killed
      2  –  from step 900 to no step, 1 process: running
  time        2 h 0 min, of which 83.3% moved the model forward
    [##########################################xxxxss..]
    # productive steps   83.3%  1 h 40 min
    x lost steps          8.3%  10 min 0 s
    s saving              4.2%  5 min 0 s
    > start-up            0.8%  1 min 0 s
    . between attempts    3.3%  4 min 0 s"""


def test_what_is_not_known_is_left_out() -> None:
    assert in_full(RunState(Path("runs/new"))) == """\
runs/new
  state       not started
  step        0 of 0
  checkpoint  none yet"""


def test_several_runs_are_columns_with_dashes_for_what_is_not_known() -> None:
    lines = as_table([RUNNING, RunState(Path("b"))]).splitlines()
    assert lines == [
        "run     stage  state        step         loss   tokens/s   left        checkpoint  "
        "restarts  effective",
        "runs/a  sft    running      1,200/4,000  2.346  5.123e+04  2 h 13 min  1,000       1         83%",
        "b       –      not started  0/0          –      –          –           –           0         –"]


@given(st.lists(st.floats(0, 1e7), min_size=len(CATEGORIES),
                max_size=len(CATEGORIES)).filter(lambda s: sum(s) > 1e-3), st.integers(1, 120))
def test_the_bar_has_its_width_and_no_share_is_off_by_a_character(spent_s: list[float], width: int) -> None:
    time = WallTime(0.0, dict(zip(CATEGORIES, spent_s, strict=True)))
    drawn = bar(time, width)
    assert len(drawn) == width
    assert list(dict.fromkeys(drawn)) == [sign for sign in SIGNS.values() if sign in drawn], "in one order"
    for name, seconds in time.spent_s.items():
        assert drawn.count(SIGNS[name]) == pytest.approx(width * seconds / time.total_s, abs=1)
