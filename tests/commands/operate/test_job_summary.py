"""`submit`: checks of a stage's data, and the summary of tokens, time and cost that it prints."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli
from megatron_sov.work.clusters.cluster import parse_time_limit
from tests.typed_words import format_set_options

H100 = ("--cluster", "h100", "--account", "a", "--dry-run")
FITS = ("--set", "model.vocab_size=368")


def run_submit(capsys: Any, *words: str) -> tuple[int, str, str]:
    code = cli.main(["submit", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.tier1_cases(2)
@pytest.mark.parametrize(("settings", "message", "added"), [
    ((), "its tokenizer has 368 ids, model.vocab_size = 151,936: recipe qwen3-8b is for a different",
     ("model.vocab_size=368", "train.epochs=1")),
    (("model.vocab_size=300",), "its tokenizer has 368 ids, the model only model.vocab_size = 300", ()),
    (("model.vocab_size=368",), "epochs, and the limit is 20", ("train.epochs=1",)),
    (("model.vocab_size=368", "data.max_epochs=30"), "epochs, and the limit is 30", ("train.epochs=1",)),
    (("model.vocab_size=368", "optim.lr=1e-4"), "epochs, and the limit is 20", ("train.epochs=1",)),
    (("train.steps=7",), "model.vocab_size = 151,936", ("model.vocab_size=368", "data.max_epochs=224")),
    (("train.epochs=2",), "model.vocab_size = 151,936", ("model.vocab_size=368",))])
def test_data_that_do_not_fit_are_refused_before_submission(
        packed_data: Any, tmp_path: Path, capsys: Any, settings: tuple[str, ...], message: str,
        added: tuple[str, ...]) -> None:
    more = format_set_options(settings)
    code, out, err = run_submit(capsys, "pretrain", *H100, "--nodes", "8", "qwen3-8b", "--data",
                                str(packed_data.text), "--run", str(tmp_path / "run"), *more)
    error, *proposed_lines = err.splitlines()
    assert code == 2 and message in error and out == ""
    # a proposed line has all missing settings
    assert len(proposed_lines) == bool(added)
    all_settings = "".join(f" --set {setting}" for setting in (*settings, *added))
    assert all(line.endswith(all_settings) for line in proposed_lines), proposed_lines


@pytest.mark.parametrize(("settings", "data_line"), [
    (("train.steps=100", "data.max_epochs=0"), "tokens    52.4 M: "), (("train.epochs=2",), "tokens    "),
    (("data.max_epochs=0",), "tokens    999.8 M: ")])
def test_a_dry_run_ends_with_tokens_time_and_cost(packed_data: Any, tmp_path: Path, capsys: Any,
                                                  settings: tuple[str, ...], data_line: str) -> None:
    more = format_set_options(settings)
    code, out, err = run_submit(capsys, "pretrain", *H100, "--nodes", "2", "qwen3-8b", "--data",
                                str(packed_data.text), "--run", str(tmp_path / "run"), *FITS, *more)
    *_, head, tokens, time, cost, jobs = out.splitlines()
    assert code == 0 and head == "# summary   pretrain qwen3-8b on 2 x 8 H100-80GB"
    assert tokens.startswith(f"# {data_line}") and " epochs of the " in tokens
    assert " GPU-hours" in time and cost.startswith("# cost      $") and " requeues at the time" in jobs
    assert err.splitlines() == [line.removeprefix("# ") for line in (head, tokens, time, cost, jobs)]


@pytest.mark.tier1_cases(1)
@pytest.mark.parametrize("limit", ["2:00:00", "12:00:00", "1-00:00:00", "7-00:00:00", "UNLIMITED"])
def test_requeues_follow_from_days_and_time_limit(tmp_path: Path, capsys: Any, limit: str) -> None:
    """Data that is not packed yet is accepted: an earlier job may write it."""
    code, out, _ = run_submit(capsys, "pretrain", *H100, "--nodes", "8", "--time", limit, "qwen3-8b",
                              "--data", str(tmp_path / "tokens"), "--run", str(tmp_path / "run"), "--set",
                              "train.steps=200000", "--set", "train.global_batch_size=128")
    *_, tokens, time, _, jobs = out.splitlines()
    assert code == 0 and tokens.endswith("; the data are not packed yet")
    amount, unit = time.split()[2:4]
    days = float(amount) / {"hours,": 24, "days,": 1, "hour,": 24, "day,": 1}[unit]
    # jobs of the time limit without the 600 s before its end, in which a job saves and stops
    expected = days * 86400 / (parse_time_limit(limit) - 600) - 1
    assert float(jobs.split()[2].replace(",", "")) == pytest.approx(max(0, expected), abs=1.5, rel=0.01)


def test_a_profile_without_gpus_shows_tokens_only(packed_data: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "site.yaml").write_text(
        'description: CPUs\npartition: p\naccount: ""\ntime_limit: "30"\nsignal_lead_s: 60\n'
        "gpus_per_node: 0\ncpus_per_node: 1\n")
    code, out, _ = run_submit(capsys, "pretrain", "--cluster", str(tmp_path / "site.yaml"), "--dry-run",
                              "tiny-qwen3", "--data", str(packed_data.text), "--run", str(tmp_path / "run"),
                              *FITS, "--set", "train.steps=2")
    assert code == 0 and out.splitlines()[-1].startswith("# tokens    8.19 K: ")
