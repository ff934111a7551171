"""Needles in an extension: their share in blends, their documents, and names that are taken."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megatron_sov.config import PhaseConfig, RunConfig
from megatron_sov.errors import UserError
from megatron_sov.mcore.cpu import open_door
from megatron_sov.recipes import get

open_door()

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
    assert (suite.kinds, suite.lengths, suite.depths, suite.samples) == (("multi-key",), (256, 512), (0.0, 0.5, 0.95), 20)
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
