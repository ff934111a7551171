"""Runs side by side: what differs is shown, what is the same is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.publish.report.charts import named
from megatron_sov.publish.report.comparison import figure_table, render
from megatron_sov.publish.report.run_data import Provenance, Run, read_run
from megatron_sov.publish.report.scores import NOT_TOLD, published_tables, read_table
from megatron_sov.publish.report.steps import Curve


def run_of(name: str, **fields: Any) -> Run:
    steps = np.arange(1, 5)
    run = Run(name, {"train": {"seed": 1}, "optim": {"lr": 1e-3}, "data": {"paths": {f"/data/{name}": 1.0}}},
              **fields)
    curves = {"loss": Curve("loss", steps, 4.0 - steps / 2), "tokens": Curve("tokens", steps, steps * 1e3)}
    run.curves = {"": curves, "losses": {}, "losses_by_source": {}, "meters": {}}
    return run


def test_settings_and_data_that_differ_are_named() -> None:
    first = run_of("a", provenance=[Provenance("read", "tokens", "/x/text", "1" * 64)])
    second = run_of("b", provenance=[Provenance("read", "tokens", "/x/text", "2" * 64)])
    second.config["optim"] = {"lr": 3e-4}
    second.data_consumed = {"tokens": {"web": 3000, "code": 1000}}
    page = render([first, second], now_s=0)
    assert "optim.lr" in page and "0.0003" in page and "train.seed" not in page
    assert "/data/a" not in page  # paths tell nothing: hashes do
    assert "1" * 16 in page and "2" * 16 in page and "3 K (75 %)" in page
    assert "all are the same" in render([first, dataclasses.replace(first)], now_s=0)


def test_losses_are_drawn_over_tokens() -> None:
    second = run_of("b")
    second.curves[""]["tokens"] = Curve("tokens", np.arange(1, 5), np.arange(1, 5) * 5e3)
    page = render([run_of("a"), second], now_s=0)
    assert '<p class="axis below">tokens</p>' in page and page.count('<div class="drawing"') == 1


def test_a_figure_has_its_difference_and_the_better_value_a_mark() -> None:
    worse = run_of("b")
    worse.curves[""]["loss"] = Curve("loss", np.arange(1, 5), 5.0 - np.arange(1, 5) / 2)
    gib = [np.full(4, n * 2.0 ** 30) for n in (1, 3)]
    first = run_of("a")
    for run, values in zip((first, worse), gib, strict=True):
        run.curves[""]["peak_memory_bytes"] = Curve("peak_memory_bytes", np.arange(1, 5), values)
    rows = {row[0]: row[1:] for row in figure_table([first, worse]).rows}
    assert rows["last training loss"] == ['<span class="good">2, best</span>', "3 (+50.0%)"]
    assert rows["peak memory of process 0"] == ['<span class="good">1.00 GiB, best</span>',
                                                "3.00 GiB (+200.0%)"]
    assert rows["steps"] == ['<span class="same">4</span>'] * 2


def test_losses_of_two_objectives_share_no_axis() -> None:
    second = run_of("b")
    second.config["objective"] = {"name": "preference"}
    page = render([run_of("a"), second], now_s=0)
    assert page.count('<div class="drawing"') == 2
    assert "loss (nats per token)" in page and "loss (preference loss)" in page and ", best" not in page


def test_runs_of_one_name_are_told_apart_and_hostile_names_stay_text(hostile: str) -> None:
    assert [name for _, name in named([run_of("a"), run_of("b"), run_of("a")])] == ["a (1)", "b", "a (2)"]
    page = render([run_of(hostile), run_of("b")], [{"first": hostile, "second": "b", "task": hostile,
                                                   "problem": hostile}], now_s=0)
    assert hostile not in page and "<img" not in page


def test_a_difference_is_marked_and_one_that_is_not_known_says_why() -> None:
    pair = {"first": "a", "second": "b", "task": "quiz", "metric": "acc"}
    page = render([run_of("a"), run_of("b")], [
        {**pair, "value": 0.2, "interval": [0.1, 0.3], "items": 40, "verdict": "better"},
        {**pair, "value": None, "interval": None, "items": 0, "note": "a figure is missing",
         "verdict": "not known"},
        {**pair, "problem": "quiz: task_hash is not the same"}], now_s=0)
    assert '<span class="good">better</span>' in page and "+0.1000 to +0.3000" in page
    assert "a figure is missing" in page and "task_hash is not the same" in page


def test_the_command_compares_scores_whose_items_are_there(
        runs: list[Path], tmp_path: Path, written_scores: Any, capsys: pytest.CaptureFixture[str]) -> None:
    copies = []
    for path, scores in zip(runs, ([0.0] * 30 + [1.0] * 10, [1.0] * 40), strict=True):
        (copy := tmp_path / path.name).mkdir()
        out = written_scores(tmp_path / f"{path.name}.json", scores, model=path.name)
        for name in ("events.jsonl", "config.json"):
            (copy / name).write_bytes((path / name).read_bytes())
        event = {"event": "eval_lm", "time_s": 1.0, "step": 400, "task": "quiz", "metric": "acc",
                 "value": sum(scores) / 40, "interval": None, "output": str(out)}
        with open(copy / "events.jsonl", "a") as f:
            f.write(json.dumps(event) + "\n")
        copies.append(copy)
    assert main(["report", *map(str, copies), "--compare"]) == 0
    page = (copies[-1] / "compare.html").read_text()
    assert "+0.7500" in page and '<span class="good">better</span>' in page
    (tmp_path / "extend.items.jsonl").unlink()
    assert main(["report", *map(str, copies), "--compare", "--output", str(tmp_path / "c.html")]) == 0
    assert "not compared" in (tmp_path / "c.html").read_text()
    capsys.readouterr()
    assert main(["report", str(copies[0]), "--compare"]) == 2
    assert "--compare: needs 2 to 8 runs, and there are 1" in capsys.readouterr().err
    assert main(["report", str(copies[0]), f"{copies[0]}/."]) == 2
    assert "is named twice" in capsys.readouterr().err
    assert read_run(copies[0]).scores[-1]["task"] == "quiz"


# Published figures: every file is sound, names its document, and says what is not told.


def test_every_table_names_its_document_and_protocols() -> None:
    tables = {table.model: table for table in published_tables()}
    assert len(tables) == 6 and all(table.document and table.figures for table in tables.values())
    small = tables["VibeThinker-1.5B"]
    assert small.figures["aime24"].value == 80.3 and small.verified
    assert "mean of 64 answers" in small.protocol(small.figures["aime24"])
    solar = tables["Solar Open 102B"]
    assert not solar.verified and solar.protocol(solar.figures["kmmlu"]) == NOT_TOLD
    assert {"mmlu_pro", "kgc_safety", "tau2_retail"} <= set(tables["K-EXAONE-236B-A23B"].figures)


@pytest.mark.parametrize(("text", "said"), [
    ("model: m\ndocument: d\nverified: true\nfigures: {a: {name: A, value: 180}}",
     "value = 180 must be at most 100"),
    ("model: m\ndocument: d\nverified: true\nfigures: {a: {name: A, value: 1, protocol: x}}",
     "must be one of protocols"),
    ("model: m\nverified: true\nfigures: {}", "document: is missing"),
    ("model: m\ndocument: d\nverified: true\nfigures: {a: {name: A}}", "value: is missing"),
])
def test_a_figure_without_its_source_or_value_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_table(tmp_path / "t.yaml")
