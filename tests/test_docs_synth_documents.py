"""The page about data from documents: its example of Korean culture is typed as it stands."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.synth.known import generator_class
from data_prep.synth.running import make_generator
from megatron_sov.base.settings import parse_nested
from megatron_sov.judge.rewards.answers import Stem

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from synthesis.endpoint import ScriptedEndpoint, serving

from tests.data_prep.synth.models.cases import asked, fenced_text

PAGE = (Path(__file__).parents[1] / "docs/synth_documents.md").read_text(encoding="utf-8")
ADDRESS = "http://localhost:8000/v1"
FACTS = (("훈민정음 해례본", "손에 넣은 사람", "전형필", "훈민정음 해례본은 1940년에 전형필이 손에 넣었다."),
         ("전형필", "세운 곳", "보화각", "전형필은 1938년에 보화각을 세웠다."),
         ("보화각", "자리한 곳", "성북동", "보화각은 서울 성북동에 자리한다."))
QUESTIONS = {("훈민정음 해례본", "보화각"): "훈민정음 해례본을 손에 넣은 사람이 세운 곳은 무엇인가?",
             ("훈민정음 해례본", "성북동"): "훈민정음 해례본을 손에 넣은 사람이 세운 곳은 어디에 자리하는가?",
             ("전형필", "성북동"): "전형필이 세운 곳은 어디에 자리하는가?"}


def reply(request: Mapping[str, Any]) -> str:
    """Return what a good model says to the page's commands."""
    system, text = asked(request)
    if "You extract facts" in system:
        parts = ("subject", "relation", "object", "sentence")
        return "\n".join(f"<{part}>{said}</{part}>" for fact in FACTS if fact[3] in text
                         for part, said in zip(parts, fact, strict=True))
    if "You check whether a sentence" in system:
        return "<answer>yes</answer>"
    if "You write questions" in system:
        match = re.search(r'begins from "(.+?)" and asks for "(.+?)"', text)
        return f"<question>{QUESTIONS[match[1], match[2]]}</question>" if match else ""
    documents = "\n".join(fenced_text(text))
    for (start, end), question in QUESTIONS.items():
        if f"Question: {question}\n" in text:
            first = next(i for i, fact in enumerate(FACTS) if fact[0] == start)
            last = next(i for i, fact in enumerate(FACTS) if fact[2] == end)
            is_there = all(fact[3] in documents for fact in FACTS[first:last + 1])
            return f"<answer>{end if is_there else 'unknown'}</answer>"
    raise AssertionError(f"nobody knows what this is: {text[:200]}")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.deep
def test_the_example_of_korean_culture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "culture.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    lines = [line for block in blocks("bash") for line in block.splitlines()
             if "culture" in line or "hops" in line]
    assert len(lines) == 2
    with serving(ScriptedEndpoint(reply)) as server:
        for line in lines:
            assert main(shlex.split(line.replace(ADDRESS, server.url))[1:]) == 0
    rows = [json.loads(line) for line in (tmp_path / "work/hops/kept.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["answer"] for row in rows} == {
        question: end for (_, end), question in QUESTIONS.items()}
    assert all(Stem().score({**row, "response": f"정답은 {row['answer']}"}).reward == 1 for row in rows)


def test_settings_of_the_page_are_those_of_its_generators(tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in (line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()):
        words = shlex.split(line)
        assert make_generator(words[2], parse_nested([word for before, word in pairwise(words)
                                                        if before == "--set"]))
    named = set(re.findall(r"`((?:min|max)_\w+)`", PAGE))
    generators = ("rewrite", "triples", "multihop", "translation")
    assert named <= {field for name in generators
                     for field in generator_class(name).Settings.__dataclass_fields__}
