"""Expert routing over the run, by layer, and by source."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.obs.events import EventLog
from megatron_sov.pages.content import Section
from megatron_sov.report.routing import MAX_COLUMNS, expert_section
from megatron_sov.report.run_data import read_run


def written(tmp_path: Path, num_records: int, biases: bool = True) -> Section:
    """Write records of layers 2 and 3, and the load of two sources; return the section."""
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(10, 10 * num_records + 10, 10):
        log.write("step", step=step, loss=1.0, max_violation=0.5)
        spread = [0.001 * step, 0.0] if biases else [0.0, 0.0]
        log.write("routing", step=step, layers=[2, 3], max_violation=[1.0, 0.5], entropy=[0.9, 0.95],
                  dead=[1, 0], bias_spread=spread)
    for source, load in (("ko", [[0.4, 0.4, 0.1, 0.1], [0.25] * 4]),
                         ("en", [[0.0, 0.2, 0.4, 0.4], [0.25] * 4])):
        log.write("expert_load", step=10 * num_records, source=source, layers=[2, 3], load=load)
    log.close()
    return expert_section(read_run(tmp_path))


def decoded(array: dict[str, str]) -> np.ndarray:
    """Return an array of a chart as the page has it: base64, row by row."""
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"])


def test_each_figure_is_a_map_of_layers_over_steps(tmp_path: Path) -> None:
    found = {c.caption: json.loads(c.figure_json)["data"][0] for c in written(tmp_path, 6).charts}
    entropy = next(data for caption, data in found.items() if caption.startswith("Entropy"))
    assert entropy["y"] == ["2", "3"] and entropy["reversescale"] is True, (
        "low is bad here, and high elsewhere")
    assert [caption.split(" of ")[0] for caption in found] == [
        "MaxVio", "MaxVio", "Entropy", "Experts", "Selection biases", "Load", "Load"]


def test_a_model_without_selection_biases_has_no_map_of_them(tmp_path: Path) -> None:
    assert not any("Selection" in c.caption for c in written(tmp_path, 3, biases=False).charts)


def test_the_worst_record_of_a_long_run_is_drawn(tmp_path: Path) -> None:
    written(tmp_path, 2 * MAX_COLUMNS + 1)
    log = EventLog(tmp_path / "events.jsonl")
    bad = {"max_violation": [2.5, 0.5], "entropy": [0.125, 0.75], "dead": [2, 3], "bias_spread": [0.1, 0.1]}
    # done again, so that it counts: the 302nd, amid a column
    log.write("routing", step=10 * 302, layers=[2, 3], **bad)
    log.close()
    for name, drawn in (("Entropy", [0.125, 0.75]), ("Experts", [2, 3])):
        chart = next(c for c in expert_section(read_run(tmp_path)).charts if c.caption.startswith(name))
        assert chart.note == "Each column is the worst of 3 records."
        (data,) = json.loads(chart.figure_json)["data"]
        steps, figures = decoded(data["x"]), decoded(data["z"]).reshape(2, -1)
        assert len(steps) == (2 * MAX_COLUMNS + 1) // 3 and steps[100] == 10 * 301
        assert figures[:, 100].tolist() == drawn and figures[:, 99].tolist() != drawn


def test_sources_are_compared_with_one_another(tmp_path: Path) -> None:
    (table,) = written(tmp_path, 2).tables
    ko, en = np.array([0.4, 0.4, 0.1, 0.1]), np.array([0.0, 0.2, 0.4, 0.4])
    elsewhere = np.abs(ko - en).sum() / 2 / 2 / 2  # to the mean of two, over two layers of which one agrees
    assert [row[0] for row in table.rows] == ["ko", "en"]
    assert [row[1] for row in table.rows] == ["0.6", "0.6"] and [row[3] for row in table.rows] == ["0", "1"]
    assert {row[4] for row in table.rows} == {f"{elsewhere:.1%}"} and {row[5] for row in table.rows} == {"2"}


def test_a_dense_model_has_no_such_section(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1, loss=1.0)
    log.close()
    section = expert_section(read_run(tmp_path))
    assert section.charts == [] and section.tables == []


@pytest.mark.parametrize("sources", [0, 1])
def test_one_source_needs_no_comparison(tmp_path: Path, sources: int) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for name in ("all",)[:sources]:
        log.write("expert_load", step=1, source=name, layers=[1], load=[[0.5, 0.5]])
    log.close()
    assert expert_section(read_run(tmp_path)).charts == []
