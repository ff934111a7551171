"""Sampling settings and stop rules."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.infer import request
from megatron_sov.infer.request import Batching, GenerationResult, Sampling, StopRule


class OddTokensOnly:
    """Rules that allow only odd tokens."""

    def allowed(self, written: Sequence[int]) -> np.ndarray:
        return np.arange(4) % 2 == 1


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def test_stop_strings_match_across_token_boundaries() -> None:
    text = "그래요. END of it"
    tokens = list(text.encode())
    stop = StopRule(texts=("END", "요?"), decode=decode)
    stopped = stop.cut(tokens)
    assert decode(stopped) == "그래요. END"
    assert [stop.is_met(tokens[:n])
            for n in range(1, len(stopped) + 1)] == [False] * (len(stopped) - 1) + [True]
    assert stop.truncate_text(text) == "그래요. " and stop.truncate_text("nothing") == "nothing"
    assert stop.cut(tokens[:5]) == tokens[:5]


def test_text_is_truncated_at_the_first_stop_string() -> None:
    assert StopRule(texts=("c", "b")).truncate_text("abcd") == "a"


def test_stop_tokens_end_a_continuation() -> None:
    assert StopRule((3, 4)).cut([1, 2, 4, 3]) == [1, 2, 4]
    assert StopRule().cut([1, 2]) == [1, 2]


def test_cache_limit_bounds_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "CACHE_TOKENS", 100)
    batching = Batching(8)
    assert [batching.slots(20, longest) for longest in (10, 12, 30, 100, 1000)] == [8, 8, 3, 1, 1]
    assert batching.slots(2, 10) == 2
    assert batching.slots(20, 10, state_tokens=15) == 4


@pytest.mark.each(("invalid_settings", "key"), [({"seed": -1}, "seed"),
                                                ({"for_training": True, "rules": OddTokensOnly()}, "rules")])
def test_invalid_sampling_settings_are_rejected(invalid_settings: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingsError) as e:
        Sampling(**invalid_settings).check()
    assert [found for _, found in e.value.codes] == [key]
    Sampling(rules=OddTokensOnly()).check()


def test_result_has_finish_reasons_and_version() -> None:
    stop = StopRule((9,))
    continuations = [([1, 9], [-0.5, -0.25]), ([2, 3], [-1.0, -2.0]), ([], [])]
    result = GenerationResult.of(continuations, Sampling(2, 0.7), stop, 4)
    assert result.finish_reasons == ["stop", "length", "length"]
    assert (result.temperature, result.version) == (0.7, 4)
    with pytest.raises(ValueError, match="engine returned 2 tokens"):
        GenerationResult.of([([1, 9], [-0.5])], Sampling(2), stop, 4)


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.9}])
def test_training_samples_reject_truncation(truncation: dict[str, float]) -> None:
    sampling = Sampling(4, 0.7, for_training=True, **truncation)
    with pytest.raises(UserError, match="samples for training"):
        sampling.check()
    Sampling(4, 0.7, **truncation).check()
    Sampling(4, 0.7, for_training=True).check()
    Sampling(4, 0.7, for_training=True, allow_truncation=True, **truncation).check()
