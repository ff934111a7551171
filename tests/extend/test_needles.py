"""Needles in an extension: their share in blends, their documents, and names that are taken."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from megatron_sov.config import NeedleConfig, NeedleKind, PhaseConfig, RunConfig, apply_settings
from megatron_sov.errors import UserError
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron
from megatron_sov.recipes import get

prepare_megatron()

from megatron_sov.data.token_shards import Source  # noqa: E402
from megatron_sov.eval.needle.suite import make_suite  # noqa: E402
from megatron_sov.extend.decontamination import search  # noqa: E402
from megatron_sov.extend.needles import make_needles, with_needles_in_blends  # noqa: E402


def config_of(data: Path, share: float, **blend: float) -> RunConfig:
    run = get("tiny-solar-open")
    phases = (PhaseConfig("a", seq_len=128, blend=blend), PhaseConfig("b", seq_len=96))
    return dataclasses.replace(run, data=dataclasses.replace(run.data, paths={str(data): 1.0}, phases=phases),
                               needle=dataclasses.replace(run.needle, train_share=share))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_blends_keep_their_proportions_beside_the_needles(share: float) -> None:
    first, second = with_needles_in_blends(config_of(Path("x"), share, en=3.0, ko=1.0)).data.phases
    total = sum(first.blend.values())
    assert first.blend["needle"] / total == pytest.approx(share)
    assert (first.blend["en"], first.blend["ko"], second.blend) == (3.0, 1.0, {})


@pytest.mark.parametrize(("share", "blend"), [(0.0, {"en": 1.0}), (0.5, {"en": 1.0, "needle": 0.1})])
def test_blends_stay_without_needles_and_where_they_are_named(share: float, blend: dict[str, float]) -> None:
    config = config_of(Path("x"), share, **blend)
    assert with_needles_in_blends(config) == config


def test_documents_are_as_long_as_the_longest_phase_and_the_test_as_set(token_shards: Path) -> None:
    needles = make_needles(config_of(token_shards, 0.1), token_shards)
    (source,) = needles.sources
    assert source.name == "needle" and int(source.shard("train").lengths[7]) == 128
    suite = needles.suite
    assert (suite.kinds, suite.lengths, suite.depths, suite.samples) == (
        ("multi-key",), (256, 512), (0.0, 0.5, 0.95), 20)
    assert [h.language for h in suite.haystacks] == ["code"] and suite.distractor_share == 0.25
    assert make_needles(config_of(token_shards, 0.0), token_shards).sources == ()


def test_blends_name_short_needle_documents(token_shards: Path) -> None:
    config = config_of(token_shards, 0.0, first=1.0, **{"needle/64": 1.0})
    (short,) = make_needles(config, token_shards).sources
    assert (short.name, short.share, int(short.shard("train").lengths[0])) == ("needle/64", 0.0, 64)
    both = make_needles(config_of(token_shards, 0.1, first=1.0, **{"needle/64": 1.0}), token_shards).sources
    assert {s.name: int(s.shard("train").lengths[0]) for s in both} == {"needle": 128, "needle/64": 64}
    with pytest.raises(UserError, match=r"after the / stands a number of tokens, e\.g\. needle/4096"):
        make_needles(config_of(token_shards, 0.1, **{"needle/x": 1.0}), token_shards)


def test_the_name_of_the_source_is_kept_for_it(token_shards: Path, tmp_path: Path) -> None:
    data = shutil.copytree(token_shards, tmp_path / "data")
    text = (data / "manifest.json").read_text().replace('"name": "first"', '"name": "needle"')
    (data / "manifest.json").write_text(json.dumps(json.loads(text) | {"sha256": ""}))
    with pytest.raises(UserError, match="a source named 'needle' is kept"):
        make_needles(config_of(data, 0.1), data)


KINDS = get_args(NeedleKind)


@pytest.mark.parametrize("setting", ["kinds", "train_kinds"])
@pytest.mark.parametrize("kind", ["multi-value", "multi-query", "variable-tracking"])
def test_documents_are_of_the_kind_that_is_set(setting: str, kind: NeedleKind, token_shards: Path) -> None:
    """Questions of these kinds have eight words of answers; those of the others have two."""
    config = apply_settings(config_of(token_shards, 0.5), [f"needle.{setting}={json.dumps([kind])}"])
    needles = make_needles(config, token_shards)
    (source,) = needles.sources
    weights = source.shard("train").loss_weights(0, 0, 128)
    assert (weights == 30).sum() % 8 == 0 and (weights[-8:] == 30).all()
    assert needles.suite.kinds == ((kind,) if setting == "kinds" else ("multi-key",))


@dataclasses.dataclass(frozen=True)
class Text:
    """One document."""

    ids: list[int]
    is_plain, columns = True, ()

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(self.ids)])

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return np.array(self.ids[start:start + count], np.int64)


def made(documents: Any) -> Source:
    return Source("needle", None, "text", {}, {"train": int(documents.lengths.sum())}, 1.0, made=documents)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_document_holds_a_question_of_any_test(kind: NeedleKind, token_shards: Path) -> None:
    config = config_of(token_shards, 0.5)
    config = dataclasses.replace(config, needle=NeedleConfig(train_kinds=(kind,), kinds=KINDS,
                                                             lengths_tokens=(256,), samples=2))
    needles = make_needles(config, token_shards)
    questions = list(needles.suite.questions())
    clean = search(questions, list(needles.sources), 1 << 20)
    assert (clean.questions_found, clean.scanned_tokens) == (0, {"needle": 256 * 128})
    asked = make_suite(dataclasses.replace(config.needle, kinds=(kind,)), needles.suite.haystacks)
    for _, _, examples in asked.examples():
        for example in examples:
            assert search(questions, [made(Text(example.prompt))],
                          1 << 20).questions_found > 0, "the search sees them"
