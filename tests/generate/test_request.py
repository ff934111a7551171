"""What is asked: values without a meaning, and what ends a continuation."""

from __future__ import annotations

import pytest

from megatron_sov.errors import UserError
from megatron_sov.generate.request import Batching, Generated, Sampling, Stop


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def test_texts_end_a_continuation_wherever_tokens_cut_them() -> None:
    text = "그래요. END of it"
    tokens = list(text.encode())
    stop = Stop(texts=("END", "요?"), decode=decode)
    cut = stop.cut(tokens)
    assert decode(cut) == "그래요. END"
    assert [stop.ends(tokens[:n]) for n in range(1, len(cut) + 1)] == [False] * (len(cut) - 1) + [True]
    assert stop.cut_text(text) == "그래요. " and stop.cut_text("nothing") == "nothing"
    assert stop.cut(tokens[:5]) == tokens[:5]


def test_the_first_of_the_strings_cuts_the_text() -> None:
    assert Stop(texts=("c", "b")).cut_text("abcd") == "a"


def test_tokens_end_a_continuation() -> None:
    assert Stop((3, 4)).cut([1, 2, 4, 3]) == [1, 2, 4]
    assert Stop().cut([1, 2]) == [1, 2]


def test_memory_bounds_the_batch() -> None:
    batching = Batching(max_sequences=8, cache_tokens=100)
    assert [batching.slots(20, longest) for longest in (10, 12, 30, 100, 1000)] == [8, 8, 3, 1, 1]
    assert batching.slots(2, 10) == 2


@pytest.mark.parametrize(("wrong", "option"), [
    (Sampling(max_new_tokens=0), "--max-new-tokens"), (Sampling(temperature=-1), "--temperature"),
    (Sampling(top_k=-1), "--top-k"), (Sampling(top_p=0), "--top-p"), (Sampling(seed=-1), "--seed"),
    (Sampling(num_drafts=-1), "--speculative"),
    (Batching(max_sequences=0), "--batch-size"), (Batching(prefill_tokens=0), "--prefill-tokens")])
def test_values_without_meaning_are_named_by_option(wrong: Sampling | Batching, option: str) -> None:
    assert [problem.key for problem in wrong.problems()] == [option]


def test_what_follows_from_what_was_asked_stands_beside_the_tokens() -> None:
    stop = Stop((9,))
    written = [([1, 9], [-0.5, -0.25]), ([2, 3], [-1.0, -2.0]), ([], [])]
    found = Generated.of(written, Sampling(2, 0.7), stop, 4)
    assert found.finish_reasons == ["stop", "length", "length"]
    assert (found.temperature, found.version) == (0.7, 4)
    with pytest.raises(ValueError, match="prompt 0: the engine wrote 2 tokens and told 1 log-probabilities"):
        Generated.of([([1, 9], [-0.5])], Sampling(2), stop, 4)


@pytest.mark.parametrize("part", [{"top_k": 5}, {"top_p": 0.9}])
def test_samples_to_train_on_come_from_the_whole_distribution(part: dict[str, float]) -> None:
    cut = Sampling(4, 0.7, for_training=True, **part)
    with pytest.raises(UserError, match="samples that are trained on come from the whole distribution"):
        cut.check()
    Sampling(4, 0.7, **part).check()
    Sampling(4, 0.7, for_training=True).check()
    Sampling(4, 0.7, for_training=True, allow_truncation=True, **part).check()
