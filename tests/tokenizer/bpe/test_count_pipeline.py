"""From input files to a vocabulary: weights of groups, samples, the memory limit, and too little text."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from tokenizer.bpe import count_pipeline
from tokenizer.bpe.count_pipeline import learn_vocabulary
from tokenizer.mixture import SourceGroup
from tokenizer.presets import K_EXAONE, CountPlan


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files of 200 documents, of about 60 and 20 KB."""
    rng, folder = random.Random(3), tmp_path / "corpus"
    folder.mkdir()
    for name, repeats in (("en", 3), ("ko", 1)):
        words = ["".join(rng.choices("abcdefgh" if name == "en" else "가나다라마", k=4)) for _ in range(40)]
        lines = [json.dumps({"text": " ".join(rng.choices(words, k=20 * repeats))}) for _ in range(200)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def make_plan(tmp_path: Path) -> CountPlan:
    """Return a plan of 480 tokens, of which those from 400 on may be superwords."""
    (tmp_path / "work").mkdir(exist_ok=True)
    return CountPlan(K_EXAONE, 480, 400, True, 1 << 30, None, 1, tmp_path / "work")


def build_groups(corpus: Path, *weights: float | None) -> list[SourceGroup]:
    return [SourceGroup(name, (corpus / f"{name}.jsonl",), weight)
            for name, weight in zip(("en", "ko"), weights, strict=True)]


def test_weights_are_met_by_bytes(corpus: Path, tmp_path: Path) -> None:
    learned = learn_vocabulary(make_plan(tmp_path), build_groups(corpus, 1, 3))
    en, ko = learned.facts
    assert ko["seen_bytes"] / en["seen_bytes"] == pytest.approx(3, rel=0.02)
    assert en["seen_bytes"] + ko["seen_bytes"] == pytest.approx(en["num_bytes"] + ko["num_bytes"], rel=0.01)
    assert len(learned.vocabulary.tokens) == 480 - 64 and learned.stage_1_tokens == 400 - 64


def test_superwords_come_from_a_sample(corpus: Path, tmp_path: Path) -> None:
    plan = replace(make_plan(tmp_path), superword_sample_bytes=20_000)
    first, second = learn_vocabulary(plan, build_groups(corpus, None, None)).stages
    assert first["reaches_tokens"] == 400 and second["reaches_tokens"] == 480
    assert second["seen_bytes"] == pytest.approx(20_000, rel=0.05) and first["seen_bytes"] > 100_000


def test_memory_limit_bounds_words_and_is_reported(corpus: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count_pipeline, "BASE_BYTES", 0)
    monkeypatch.setattr(count_pipeline, "LEARNING_BYTES_PER_BYTE", 1)
    plan = replace(make_plan(tmp_path), vocab_size=340, transition_size=340, max_memory_bytes=300)
    [stage] = learn_vocabulary(plan, build_groups(corpus, None, None)).stages
    assert stage["dropped_words"] > 20 and stage["least_count"] > 1 and 0 < stage["dropped_share"] < 1


def test_too_little_text_reports_reached_and_required_size(corpus: Path, tmp_path: Path) -> None:
    plan = replace(make_plan(tmp_path), vocab_size=9000, transition_size=9000)
    with pytest.raises(UserError, match=r"only \d+ tokens were reached from 0\.\d+ MB .* give it about "
                                        r"\d+(\.\d+)? MB like it"):
        learn_vocabulary(plan, build_groups(corpus, None, None))


def test_samples_do_not_depend_on_the_order_of_units(corpus: Path, tmp_path: Path) -> None:
    samples = learn_vocabulary(make_plan(tmp_path), build_groups(corpus, None, None)).samples
    documents = [json.loads(line)["text"] for line in (corpus / "en.jsonl").read_text().splitlines()]
    assert samples["en"] == "\n".join(sorted(documents))


def test_inputs_without_weights_are_read_once(corpus: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(count_pipeline, "measure_groups", refuse)
    plan = replace(make_plan(tmp_path), vocab_size=400)
    learned = learn_vocabulary(plan, build_groups(corpus, None, None))
    assert [fact["num_documents"] for fact in learned.facts] == [200, 200]
    with pytest.raises(AssertionError, match="measured"):
        learn_vocabulary(plan, build_groups(corpus, 1, 3))
