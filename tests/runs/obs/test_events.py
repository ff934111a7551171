"""Run events: exact numbers, complete lines, and files of killed processes."""

import json
import math
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from megatron_sov.runs.obs.events import EVENTS, EventLog, final_step_events, read_events
from megatron_sov.runs.obs.routing import count_dead_experts, load_entropy, max_violation


def float_bits(x: float) -> bytes:
    return struct.pack("<d", x)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1), st.text())
@example([0.1], "가\udcff")  # a lone surrogate
def test_events_round_trip_exactly(values: list[float], text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / EVENTS
        log = EventLog(path)
        log.write("step", step=1, numbers=values, note=text)
        log.close()
        (event,) = read_events(path)
    assert [float_bits(x) for x in event["numbers"]] == [float_bits(x) for x in values]
    assert event["note"] == text


def test_nonfinite_floats_are_written_as_strings(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS)
    log.write("step", step=1, loss=math.nan, losses={"lm": math.inf, "mtp": [-math.inf, 1.5]})
    log.close()

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    record = json.loads((tmp_path / EVENTS).read_text(), parse_constant=refuse)
    assert (record["loss"], record["losses"]) == ("nan", {"lm": "inf", "mtp": ["-inf", 1.5]})


def test_events_are_flushed_before_close(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS)
    log.write("run_start", num_ranks=2)
    assert [e["event"] for e in read_events(tmp_path / EVENTS)] == ["run_start"]
    log.close()


def test_incomplete_last_line_is_skipped_and_terminated(tmp_path: Path) -> None:
    path = tmp_path / EVENTS
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    assert [e["step"] for e in read_events(path)] == [1]
    log = EventLog(path)
    log.write("step", step=2)
    log.close()
    assert [e["step"] for e in read_events(path)] == [1, 2]


def test_foreign_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / EVENTS
    path.write_bytes(b'[1, 2]\n{"no": "event"}\n\xff\xfe\n\n{"event": "stop"}\n')
    assert list(read_events(path)) == [{"event": "stop"}]


def test_missing_event_file_yields_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / EVENTS)) == []


def test_null_log_drops_events(cwd: Path) -> None:
    log = EventLog(None)
    log.write("step", step=1)
    log.close()
    assert not log.is_open and list(cwd.iterdir()) == []


def test_last_event_of_repeated_step_counts() -> None:
    events = [{"event": "step", "step": s, "loss": loss}
              for s, loss in [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5)]]
    events += [{"event": "eval", "step": 2, "loss": 9.0}, {"event": "step"}, {"event": "step", "step": None}]
    assert [(e["step"], e["loss"]) for e in final_step_events(events)] == [(1, 5.0), (2, 4.5), (3, 3.0)]
    assert [e["loss"] for e in final_step_events(events, "eval")] == [9.0]


def test_events_with_invalid_steps_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    invalid_steps = ['"x"', "NaN", "[1]", "1.5", "1e308", "1" * 400, f"{1 << 63}", "[" * 100_000]
    lines = [f'{{"event": "step", "step": {step}}}\n' for step in [*invalid_steps, "null", "7"]]
    file.write_text("".join(lines))
    assert [e["step"] for e in read_events(file)] == [None, 7]  # a folder that is judged is at no step


def test_load_statistics_of_layers() -> None:
    load = np.array([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0], [4.0, 2.0, 2.0, 0.0]])
    assert max_violation(load) == pytest.approx([0, 8 / 2 - 1, 4 / 2 - 1])
    assert count_dead_experts(load).tolist() == [0, 3, 1]
    expected_entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(4)
    assert load_entropy(load) == pytest.approx([1, 0, expected_entropy])
    assert load_entropy(10 * load) == pytest.approx([1, 0, expected_entropy]), "shares or counts"


def test_single_expert_is_balanced() -> None:
    assert load_entropy(np.array([[5.0]])) == 1 and max_violation(np.array([[5.0]])) == 0
