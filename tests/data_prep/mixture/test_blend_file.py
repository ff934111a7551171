"""Blend files: shares, products of tags, Solar's table, mistakes."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.cli import main
from data_prep.mixture.blend_file import (
    Blend, BlendEntry, BlendPhase, allot_shares, check_epochs, combine_phases, compute_epochs, find_blend,
    format_shares, read_blend)
from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from tests.pages_typed import blocks, page_section, shell_lines


def write_blend(folder: Path, text: str) -> Path:
    (folder / "blend.yaml").write_text(text)
    return folder / "blend.yaml"


def count_trillions(blend: Blend, tag: str) -> dict[str, float]:
    """Return each value of a tag -> trillions of tokens over all phases."""
    trillions: Counter[str] = Counter()
    for phase in blend.phases:
        for entry in phase.entries:
            trillions["|".join(entry.where[tag])] += phase.tokens * entry.share / 1e12
    return trillions


def test_solar_blend_equals_published_table() -> None:
    """Compare with Solar Open's published trillions of tokens per kind, and per phase with its shares of
    Korean and synthetic text in percent and its quality level."""
    blend = read_blend(find_blend("solar-open"))
    kinds = count_trillions(blend, "kind")
    assert {kind: round(t, 0 if kind == "en" else 1) for kind, t in kinds.items()} == {
        "en": 13, "math_code": 3.7, "ko": 1.1, "ja": 0.8, "multilingual": 0.8, "domain:*": 0.4}
    published = {"1": (10.8, 3.3, 10.2, "basic"), "2.A": (5.3, 3.2, 32.0, "L1"),
                 "2.B": (2.7, 16.4, 36.1, "L2"), "2.C": (1.2, 13.6, 64.5, "L3")}
    assert [phase.name for phase in blend.phases] == list(published)
    for phase in blend.phases:
        tokens, korean, synthetic, level = published[phase.name]
        entries = phase.entries
        assert phase.tokens == tokens * 1e12
        korean_share = sum(e.share for e in entries if e.where["kind"] == ("ko",))
        synthetic_share = sum(e.share for e in entries if e.where["synthetic"] == ("true",))
        assert 100 * korean_share == pytest.approx(korean, abs=1e-3)
        assert 100 * synthetic_share == pytest.approx(synthetic, abs=1e-3)
        assert {e.where["level"][0] for e in entries} == {level}
    assert sum(count_trillions(blend, "synthetic").values()) == pytest.approx(20.0)


@pytest.mark.parametrize(("blend", "recipe"),
                         [("solar-open", "solar-open-102b"), ("k-exaone", "k-exaone-236b")])
def test_shipped_blends_match_recipe_phases(blend: str, recipe: str) -> None:
    result = read_blend(find_blend(blend))
    assert [(p.name, p.tokens) for p in result.phases] == [(p.name, p.tokens)
                                                           for p in recipes.get(recipe).data.phases]


def test_product_gives_every_combination(tmp_path: Path) -> None:
    blend = read_blend(write_blend(tmp_path, """
phases:
  - name: main
    where: {level: [L2, L3]}
    product:
      kind: {ko: 25, "domain:*": 75}
      synthetic: {true: 40, false: 60, mixed: 0}
"""))
    [phase] = blend.phases
    assert blend.name == "blend" and phase.tokens == 0
    assert {(e.where["kind"], e.where["synthetic"]): e.share for e in phase.entries} == pytest.approx({
        (("ko",), ("true",)): 0.1, (("ko",), ("false",)): 0.15, (("domain:*",), ("true",)): 0.3,
        (("domain:*",), ("false",)): 0.45})
    assert {e.where["level"] for e in phase.entries} == {("L2", "L3")}
    assert phase.entries[0].describe() == "level=L2|L3 kind=ko synthetic=true (10 %)"


@pytest.mark.parametrize(("text", "lines"), [
    ("""name: x
phase: 3
phases:
  - name: a
    tokens: lots
  - {tokens: 1, shares: []}
  - {name: b, where: {kind: []}, product: {level: {L2: 120}}}
""", ["2: phase: no such setting; did you mean 'phases'?",
      "5: phases.0.tokens = \"lots\" must be a number",
      "6: phases.1.name: is missing",
      "6: phases.1.shares = [] must have at least 1 items",
      "7: phases.2.where.kind = [] must be a value of the tag",
      "7: phases.2.product.level.L2 = 120 must be at most 100"]),
    ("""phases:
  - name: a
    tokens: 5
    shares:
      - {kind: en, share: 50}
      - {kind: ko, share: 49}
  - name: a
    where: {level: L2}
    product: {level: {L2: 100}, synthetic: {true: 10, false: 80}}
  - {name: x, tokens: 1, shares: [{share: 100}]}
  - {name: b, tokens: 1, shares: [{kind: [], share: 100}]}
  - {name: c, tokens: 1}
  - {name: d, tokens: 1, shares: [{kind: en, share: 120}, {kind: ko, share: lots}]}
""", ["4: phases.0.shares: the shares add up to 99 %, and must to 100 %; change them by +1",
      "7: phases.1.name = \"a\" is the name of two phases",
      "7: phases.1.tokens: is missing; of several phases each needs its budget",
      "9: phases.1.product.level: level is a condition of the whole phase already",
      "9: phases.1.product.synthetic: the shares add up to 90 %, and must to 100 %",
      "10: phases.2.shares.0: must have a share in percent and at least",
      "11: phases.3.shares.0.kind = [] must be a value of the tag",
      "12: phases.4: must have either shares or product",
      "13: phases.5.shares.0.share = 120 must be a number, between 0 and 100",
      "13: phases.5.shares.1.share = \"lots\" must be a number, between 0 and 100"])])
def test_blend_mistakes_are_listed_with_lines(tmp_path: Path, text: str, lines: list[str]) -> None:
    with pytest.raises(UserError) as e:
        read_blend(write_blend(tmp_path, text))
    for line in lines:
        assert line in str(e.value), line


def test_unknown_blend_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--blend solar-opn: is no file and no blend that is shipped; did "
                                        r"you mean 'solar-open'\? \(shipped: k-exaone, solar-open\)"):
        find_blend("solar-opn")
    for text in ("", "- 1", "phases: {}", "phases: [3]"):
        with pytest.raises(UserError, match=r"blend\.yaml"):
            read_blend(write_blend(tmp_path, text))


def build_source(name: str, tokens: int, **tags: str) -> dict[str, Any]:
    return {"name": name, "splits": {"train": {"num_tokens": tokens}, "heldout": {"num_tokens": 1}},
            "tags": {key: [value] for key, value in tags.items()}}


SOURCES = [build_source("ko-basic", 100, kind="ko", level="basic"),
           build_source("ko-L3", 300, kind="ko", level="L3"),
           build_source("en-L3", 600, kind="en", level="L3"), build_source("code", 1000)]


def build_phase(name: str, tokens: float, *entries: tuple[dict[str, str], float]) -> BlendPhase:
    return BlendPhase(name, tokens, tuple(BlendEntry({k: (v,) for k, v in where.items()}, share)
                                          for where, share in entries))


def build_blend(*phases: BlendPhase) -> Blend:
    return Blend("test", phases)


TWO_PHASES = build_blend(
    build_phase("1", 800, ({"kind": "ko"}, 0.5), ({"kind": "en"}, 0.5)),
    build_phase("2", 200, ({"level": "L3", "kind": "ko"}, 0.25), ({"source": "c*"}, 0.75)))


def test_sources_of_an_entry_share_by_tokens() -> None:
    first, second = allot_shares(TWO_PHASES, SOURCES)
    # ko-basic and ko-L3 have 100 and 300 tokens
    assert first.shares == {"ko-basic": 0.125, "ko-L3": 0.375, "en-L3": 0.5} and first.tokens == 800
    assert second.shares == {"ko-L3": 0.25, "code": 0.75}
    # 0.8 of the first phase and 0.2 of the second
    assert combine_phases([first, second]) == pytest.approx({
        "ko-basic": 0.1, "ko-L3": 0.35, "en-L3": 0.4, "code": 0.15})
    assert compute_epochs([first, second], SOURCES) == pytest.approx({
        "ko-basic": 1.0, "ko-L3": 350 / 300, "en-L3": 400 / 600, "code": 0.15})


def test_tokens_scale_all_phases_alike() -> None:
    assert [p.tokens for p in allot_shares(TWO_PHASES, SOURCES, num_tokens=1e6)] == [8e5, 2e5]
    one_phase = build_blend(build_phase("main", 0, ({"kind": "ko"}, 1.0)))
    [main_phase] = allot_shares(one_phase, SOURCES, num_tokens=1e6)
    assert main_phase.tokens == 1e6
    assert combine_phases([main_phase]) == {"ko-basic": 0.25, "ko-L3": 0.75}


def get_refusal(refused: Blend, sources: Sequence[dict[str, Any]] = SOURCES) -> str:
    """Return the error of a blend that does not fit the sources."""
    with pytest.raises(UserError) as e:
        allot_shares(refused, sources)
    return str(e.value)


def test_entries_without_source_are_listed() -> None:
    blend = build_blend(build_phase("1", 1, ({"kind": "ja"}, 0.1), ({"kind": "ko", "level": "L1"}, 0.2),
                                    ({"kind": "en"}, 0.7)),
                        build_phase("2", 1, ({"kind": "math_code"}, 1.0)))
    lines = get_refusal(blend).splitlines()
    assert lines[1:] == ["  phase 1: no source is kind=ja (10 %)",
                         "  phase 1: no source is kind=ko level=L1 (20 %)",
                         "  phase 2: no source is kind=math_code (100 %)"]
    assert lines[0] == (
        "blend test: 3 problems; the sources are ko-basic, ko-L3, en-L3, code, their tags kind: en, ko; "
        "level: L3, basic; pack what is missing, change the blend, or give missing shares to the others of "
        "their phase with --missing spread")
    assert "their tags none (pack them with --tag)" in get_refusal(blend, [build_source("web", 5)])
    without_korean = [build_source("ko", 0, kind="ko"), build_source("code", 1), *SOURCES[2:3]]
    assert "no source is kind=ko" in get_refusal(TWO_PHASES, without_korean)


def test_source_in_two_entries_is_rejected() -> None:
    twice = build_blend(build_phase("1", 1, ({"kind": "ko"}, 0.5), ({"level": "L3"}, 0.5)))
    assert ("phase 1: source ko-L3 is meant by two entries, kind=ko (50 %) and level=L3 (50 %); tell them "
            "apart" in get_refusal(twice))


def test_missing_shares_may_be_spread() -> None:
    blend = build_blend(build_phase("1", 100, ({"kind": "ja"}, 0.2), ({"kind": "en"}, 0.6),
                                    ({"source": "code"}, 0.2)))
    [phase] = allot_shares(blend, SOURCES, "spread")
    assert phase.shares == pytest.approx({"en-L3": 0.75, "code": 0.25})  # 0.6 : 0.2
    assert "  nothing for kind=ja (20 %): its share is spread over the others" in format_shares(
        [phase], SOURCES)
    with pytest.raises(UserError, match="phase 1: no source is kind=ja"):
        allot_shares(build_blend(build_phase("1", 1, ({"kind": "ja"}, 1.0))), SOURCES, "spread")


def test_table_shows_epochs_per_source() -> None:
    lines = format_shares(allot_shares(TWO_PHASES, SOURCES), SOURCES)
    assert lines == [
        "phase 1, 800 tokens",
        "  ko-basic  12.5000 %                    100 tokens         1 epochs",
        "  ko-L3     37.5000 %                    300 tokens         1 epochs",
        "  en-L3     50.0000 %                    400 tokens     0.667 epochs",
        "phase 2, 200 tokens",
        "  ko-L3     25.0000 %                     50 tokens     0.167 epochs",
        "  code      75.0000 %                    150 tokens      0.15 epochs",
        "all phases",
        "  ko-basic                    100 tokens available, 1 epochs",
        "  ko-L3                       300 tokens available, 1.17 epochs",
        "  en-L3                       600 tokens available, 0.667 epochs",
        "  code                      1,000 tokens available, 0.15 epochs"]


def test_too_many_epochs_are_rejected_by_source() -> None:
    phases = allot_shares(TWO_PHASES, SOURCES, num_tokens=4000)
    with pytest.raises(UserError) as e:
        check_epochs(phases, SOURCES, 4)
    assert str(e.value).splitlines()[1:] == ["  source ko-L3: 4.667 epochs of its 300 tokens"]
    check_epochs(phases, SOURCES, 4.7)


@pytest.mark.deep
def test_page_commands_run(tokenizers: dict[str, Path], cwd: Path) -> None:
    Path("tokenizer").symlink_to(tokenizers["solar-open"])
    for name, kind, synthetic in (("en-L2", "en", False), ("ko-L2", "ko", False),
                                  ("ko-synthetic", "ko", True)):
        rows = [{"text": f"{name} document {i} " * 200, "kind": kind, "level": "L2", "synthetic": synthetic}
                for i in range(60)]
        Path("text", name).mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), f"text/{name}/00000.parquet")
    Path("more").mkdir()
    Path("more/law.jsonl").write_text("\n".join(json.dumps({"text": f"Article {i}."}) for i in range(60)))
    page = page_section("curriculum.md", "Data mixtures")
    [blend] = blocks(page, "yaml")
    Path("blend.yaml").write_text(blend)
    commands = [shlex.split(line) for line in shell_lines(page, "sh")]
    assert len(commands) == 4
    for program, *arguments in commands:
        assert program == "sov-data" and main(arguments) == 0, arguments
    phases = {p["name"]: p["blend"] for p in read_manifest("mixed").content["phases"]}
    # the two Korean sources share 24 of 80 by their tokens, about 4 : 1
    assert phases["foundation"] == pytest.approx({
        "en-L2": 56 / 80, "ko-L2": 24 / 80 * 0.8, "ko-synthetic": 0.06}, rel=0.2)
    assert phases["domains"] == pytest.approx({"law": 0.6, "en-L2": 0.4})
