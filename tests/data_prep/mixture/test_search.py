"""The search itself, on losses whose best mixture is known, and on what small models would give."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.mixture import search as search_module
from data_prep.mixture.blend_file import Cluster, MixtureSearchSettings, read_blend, read_search
from data_prep.mixture.fitting import Judgement, Shares, space_of
from data_prep.mixture.search import (
    BEST, JUDGED, NATURAL, UNIFORM, FoundMixture, Losses, ProxySettings, Tried, blend_of, clusters_of, page,
    search, summary)
from data_prep.shards.pack import PackSettings, PackSource, pack
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError

SETTINGS = MixtureSearchSettings("tiny-qwen3-4b", {"clean": 1.0}, steps=10, seq_len=32, rounds=(16, 6, 4),
                                 judged=6, candidates=2000, fit="log_ridge")
SPACE = space_of("abcd", [700, 200, 80, 20], 0, 4)
WORTH = np.array([0.0, 0.1, 0.5, 0.4])
"""What makes the target's text: the best mixture of a loss -sum(worth log share)."""


def losses_of(shares: Shares, noise: float = 0.002) -> list[Losses]:
    """A loss of diminishing returns, with noise that is each mixture's own, as a seed's is."""
    found = []
    for row in np.atleast_2d(shares):
        own = np.random.default_rng(abs(hash(row.tobytes())) % 2**32).normal(0, noise)
        found.append({"clean": float(1 - 0.3 * (WORTH * np.log(row + 0.02)).sum() + own), "other": 9.0})
    return found


def test_the_best_mixture_is_found() -> None:
    found = search(SETTINGS, SPACE, losses_of)
    loss = {one.role: one.loss for one in found.tried}
    best = losses_of(WORTH, noise=0)[0]["clean"]
    assert found.chosen.loss - best < 0.1 * (loss["natural"] - best)
    assert found.chosen.loss < min(loss["uniform"], loss["natural"]) - 0.02
    assert np.abs(np.array(list(found.chosen.shares.values())) - WORTH).sum() < 0.4
    assert found.kept_apart is not None and (found.kept_apart.spearman or 0) > 0.7
    roles = [one.role for one in found.tried]
    assert [roles.count(r) for r in ("natural", "uniform", "round 1", "judged", "round 2", "round 3",
                                     "predicted best")] == [1, 1, 14, 6, 6, 4, 1]
    means = {r: np.mean([one.loss for one in found.tried if one.role == r]) for r in ("round 1", "round 3")}
    assert means["round 3"] < means["round 1"], "later rounds lie near the best"


def test_mixtures_kept_apart_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[int] = []
    real = search_module.fitting.fit
    monkeypatch.setattr(search_module.fitting, "fit",
                        lambda shares, *rest: fitted.append(len(shares)) or real(shares, *rest))
    search(SETTINGS, SPACE, losses_of)
    assert fitted == [16, 22, 26, 27]


def test_the_same_seed_finds_the_same_and_another_draws_others() -> None:
    one, again = (search(SETTINGS, SPACE, losses_of) for _ in range(2))
    assert one == again
    other = search(dataclasses.replace(SETTINGS, seed=1), SPACE, losses_of)
    assert {tuple(t.shares.values()) for t in one.tried[2:]}.isdisjoint(
        tuple(t.shares.values()) for t in other.tried[2:])


def test_caps_hold_and_targets_have_weights() -> None:
    capped = space_of("abcd", [700, 200, 80, 20], 1000, 4)
    settings = dataclasses.replace(SETTINGS, targets={"clean": 1.0, "other": 3.0}, rounds=(16,), judged=0)
    found = search(settings, capped, losses_of)
    assert all(one.shares["d"] <= 0.08 + 1e-9 for one in found.tried) and found.kept_apart is None
    assert found.chosen.loss == pytest.approx((found.chosen.losses["clean"] + 3 * 9.0) / 4)
    tight = space_of("abcd", [100, 100, 100, 100], 1600, 4)
    with pytest.raises(UserError, match=r"the caps leave only 0 mixtures to draw"):
        search(settings, tight, losses_of)


def test_a_loss_that_is_no_number_is_named() -> None:
    def broken(shares: Shares) -> list[Losses]:
        return [{"clean": float("nan")} for _ in shares]

    with pytest.raises(UserError, match=r"targets.clean: a small model's loss on it is nan"):
        search(SETTINGS, SPACE, broken)


def record(name: str, train: int, heldout: int = 5, **tags: str) -> dict[str, Any]:
    return {"name": name, "tags": {k: [v] for k, v in tags.items()},
            "splits": {"train": {"num_tokens": train}, "heldout": {"num_tokens": heldout}}}


DATA = [record("w1", 30, topic="t1"), record("w2", 10, topic="t1"), record("w3", 60, topic="t2"),
        record("clean", 10), record("empty", 0, topic="t2")]


def test_clusters_are_sources_or_values_of_a_tag() -> None:
    assert [c.name for c in clusters_of(SETTINGS, DATA)] == ["w1", "w2", "w3"]
    by_topic = clusters_of(dataclasses.replace(SETTINGS, group_by="topic"), DATA)
    assert by_topic == [Cluster("t1", {"w1": 0.75, "w2": 0.25}, 40), Cluster("t2", {"w3": 1.0}, 60)]
    assert blend_of(np.array([0.4, 0.6]), by_topic) == pytest.approx({"w1": 0.3, "w2": 0.1, "w3": 0.6})
    with_target = dataclasses.replace(SETTINGS, sources=("w?", "clean"))
    assert [c.name for c in clusters_of(with_target, DATA)] == ["w1", "w2", "w3", "clean"]


@pytest.mark.parametrize(("change", "said"), [
    ({"targets": {"clear": 1.0}}, "targets.clear: the data has no such source; did you mean 'clean'?"),
    ({"sources": ("x*",)}, "sources: 'x*' fits no source"),
    ({"sources": ("w1",)}, "1 of the data's are mixed (w1)"),
    ({"group_by": "topic", "sources": ("*",)}, "source clean has no value of this tag"),
])
def test_what_does_not_fit_the_data_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        clusters_of(dataclasses.replace(SETTINGS, **change), DATA)
    assert said in str(e.value)
    with pytest.raises(UserError, match=r"targets\.clean: the source holds no documents out"):
        clusters_of(SETTINGS, [*DATA[:3], record("clean", 10, heldout=0)])


class Pretend:
    """In the place of `Proxies`: losses from a law, one killed after so many models."""

    trained: list[dict[str, float]] = []
    limit = 10**9

    def __init__(self, work: Path, settings: ProxySettings, workers: int) -> None:
        self._file = work / "known.json"
        work.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Losses] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def losses(self, blends: Sequence[dict[str, float]], done: Callable[[], object]) -> list[Losses]:
        for blend in blends:
            if str(blend) not in self._known:
                if len(Pretend.trained) >= Pretend.limit:
                    raise KeyboardInterrupt
                Pretend.trained.append(blend)
                self._known[str(blend)] = {"clean": 2.0 - 0.1 * np.log(blend.get("good", 0.0) + 0.05)}
                self._file.write_text(json.dumps(self._known))
            done()
        return [self._known[str(blend)] for blend in blends]


@pytest.fixture
def shards(tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, count in (("good", 40), ("bad", 200), ("clean", 40)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(
            json.dumps({"text": f"{name} document {i}"}) for i in range(count)))
    pack(tokenizers["solar-open"], [PackSource(n, tmp_path / f"{n}.jsonl") for n in ("good", "bad", "clean")],
         tmp_path / "shards", PackSettings(0.2))
    (tmp_path / "search.yaml").write_text(
        "name: mine\nrecipe: tiny-qwen3-4b\ntargets: {clean: 1}\nsteps: 5\nseq_len: 32\nrounds: [8, 3]\n"
        "judged: 3\ncandidates: 500\nfit: log_ridge\n")
    monkeypatch.setattr(search_module, "Proxies", Pretend)
    monkeypatch.chdir(tmp_path)
    Pretend.trained, Pretend.limit = [], 10**9
    return tmp_path


def test_a_search_writes_a_blend_that_mix_reads(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["mix", "shards", "--search", "search.yaml", "--output", "found"]
    assert main([*command, "--dry-run"]) == 0
    assert not Path("found").exists() and not Pretend.trained
    out = capsys.readouterr().out
    assert out.startswith("15 small models of tiny-qwen3-4b, 5 steps each: rounds of 8, 3, 3 to judge by, "
                          "the predicted best\n")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "mix by it: sov-data mix shards --blend found/blend.yaml" in out
    assert not Path(".found.work").exists()
    manifest = read_manifest("found", "mixture")
    assert manifest.content["chosen"]["good"] > 0.7 and set(manifest.files) == {"blend.yaml", "tried.jsonl",
                                                                               "report.html"}
    [phase] = read_blend(Path("found/blend.yaml")).phases
    assert {e.where["source"]: e.share for e in phase.entries}[("good",)] == pytest.approx(
        manifest.content["chosen"]["good"])
    assert main(["mix", "shards", "--blend", "found/blend.yaml", "--output", "mixed"]) == 0
    weights = {s["name"]: s["weight"] for s in read_manifest("mixed").content["sources"]}
    assert weights["good"] == pytest.approx(manifest.content["chosen"]["good"]) and "clean" not in weights
    rows = [json.loads(line) for line in Path("found/tried.jsonl").read_text().splitlines()]
    assert len(rows) == 15 and rows[0]["role"] == "natural"
    assert main(command) == 2 and "found: already exists" in capsys.readouterr().err


def test_a_killed_search_goes_on_and_finds_the_same(shards: Path) -> None:
    command = ["mix", "shards", "--search", "search.yaml", "--output"]
    assert main([*command, "whole"]) == 0
    num_trained = len(Pretend.trained)
    for limit in (3, 9, 13, 10**9):
        kept = len(Pretend.trained) - num_trained
        Pretend.limit = num_trained + limit
        assert main([*command, "parts"]) == (0 if limit == 10**9 else 130), kept
    assert len(Pretend.trained) == 2 * num_trained, "nothing was trained twice"
    for name in ("blend.yaml", "tried.jsonl"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()


def test_the_page_says_what_was_found_and_runs_nothing_of_the_datas() -> None:
    hostile = "<script>alert(1)</script>"
    settings = dataclasses.replace(SETTINGS, name=hostile, rounds=(6,), judged=3, candidates=200)
    space = space_of([hostile, "b"], [3, 1], 0, 4)
    found = search(settings, space, lambda shares: [{"clean": 1 + float(row[0])} for row in shares])
    html = page(settings, space, found)
    assert hostile not in html and "&lt;script&gt;alert(1)" in html
    assert f"{found.chosen.loss:.4f}" in html and "kept apart" in html
    assert html.count("predicted best") >= 1 and "cross-validation" in html


def tried(role: str, good: float, predicted: float, loss: float) -> Tried:
    return Tried(role, {"good": good, "bad": 1 - good}, predicted, {"clean": loss}, loss)


def test_the_summary_compares_and_judges_the_predictions() -> None:
    best = tried(BEST, 0.9, 1.0, 1.05)
    everything = (tried(NATURAL, 0.1, 2.0, 2.1), tried(UNIFORM, 0.5, 1.5, 1.45),
                  tried(JUDGED, 0.6, 1.4, 1.41), best)
    found = FoundMixture(everything, best, "log_ridge",
                         {"log_ridge": Judgement(0.1, 0.9), "boosting": Judgement(0.3, None)},
                         Judgement(0.01, 0.5))
    assert summary(found) == [
        "natural: 2.1000 bits per byte", "uniform: 1.4500 bits per byte",
        "predicted best: 1.0500 bits per byte",
        "chosen (predicted best): 1.0500 bits per byte, predicted 1.0000",
        "  good   90.00 %  (natural 10.00 %)", "  bad    10.00 %  (natural 90.00 %)",
        "log_ridge (used): predicts mixtures that it was not fitted to "
        "within 0.1000 (rmse), rank correlation 0.90",
        "boosting: predicts mixtures that it was not fitted to "
        "within 0.3000 (rmse), rank correlation none (too few, or all alike)",
        "1 mixtures kept apart: predicted within 0.0100 (rmse), rank correlation 0.50"]


def written(folder: Path, text: str) -> Path:
    (folder / "search.yaml").write_text(text)
    return folder / "search.yaml"


def test_a_short_file_and_a_long_one(tmp_path: Path) -> None:
    short = "recipe: tiny-qwen3-4b\ntargets: {clean: 1}\nsteps: 60\nseq_len: 128\n"
    assert read_search(written(tmp_path, short)) == MixtureSearchSettings(
        "tiny-qwen3-4b", {"clean": 1.0}, 60, 128)
    found = read_search(written(tmp_path, short + """
name: mine
settings: [optim.lr=1e-3]
from: runs/base
sources: ["web-*"]
group_by: topic
rounds: [8, 2]
judged: 0
fit: boosting
candidates: 500
tokens: 2e9
max_epochs: 2.5
seed: 3
"""))
    assert found == MixtureSearchSettings(
        "tiny-qwen3-4b", {"clean": 1.0}, 60, 128, "mine", ("optim.lr=1e-3",), "runs/base",
        ("web-*",), "topic", (8, 2), 0, "boosting", 500, 2e9, 2.5, 3)
    assert found.num_proxies == 11


def test_every_mistake_is_told_with_its_line(tmp_path: Path) -> None:
    file = written(tmp_path, """recipe: 3
targets: {clean: 0, other: x}
step: 5
seq_len: 1
rounds: [2, 0]
judged: -1
fit: forest
settings: train.steps=3
tokens: many
sources: [1]
seed: 1.5
""")
    with pytest.raises(SettingsError) as e:
        read_search(file)
    assert [(p.line, p.key) for p in e.value.problems] == [
        (1, "recipe"), (2, "targets.clean"), (2, "targets.other"), (4, "seq_len"),
        (8, "settings"), (10, "sources.0"), (5, "rounds.1"), (6, "judged"), (7, "fit"), (9, "tokens"),
        (11, "seed"), (3, "step")]  # which explains that there is no steps
    rest = "recipe: r\ntargets: {clean: 1}\nsteps: 6\nseq_len: 8\n"
    for wrong in ("rounds: [5, 6]", "settings: [train.seed=3]", "from: 3"):
        with pytest.raises(SettingsError) as e:
            read_search(written(tmp_path, rest + wrong))
        assert [p.line for p in e.value.problems] == [5], wrong
    with pytest.raises(SettingsError, match="recipe: is missing"):
        read_search(written(tmp_path, ""))
