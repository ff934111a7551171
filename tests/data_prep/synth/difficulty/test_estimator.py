"""Figures of a problem's form: what they count, and that nothing breaks them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from data_prep.synth.difficulty.estimator import NAMES, form

NGRAMS = Ngrams(NgramSettings(num_buckets=1 << 10))


def figures(text: str) -> dict[str, float]:
    return dict(zip(NAMES, form(text, NGRAMS).tolist(), strict=True))


def test_numbers_and_signs_are_counted() -> None:
    found = figures("If 12 + 3.5 = x, what is \\frac{x}{1,000}?")
    assert found["numbers"] == math.log1p(3) and found["decimals"] == math.log1p(1)
    assert found["largest_number"] == pytest.approx(math.log10(1001))
    assert found["second_number"] == pytest.approx(math.log10(13))
    assert found["operators"] == math.log1p(3) and found["commands"] == math.log1p(1)
    assert found["questions"] == math.log1p(1) and found["latin"] == 1.0


def test_scripts_are_shares_of_letters() -> None:
    found = figures("삼각형 ABC 의 넓이")
    assert found["hangul"] == pytest.approx(6 / 9) and found["latin"] == pytest.approx(3 / 9)


@pytest.mark.parametrize("text", ["", " ", "9" * 5000, "1,2,3,4.5.6", "0" * 400 + ".", "1." + "3" * 4000,
                                  "²³^", "\\" * 3000, "\ud7a3" * 10, "٣٤٥ १२"])
def test_any_text_has_finite_figures(text: str) -> None:
    found = form(text, NGRAMS)
    assert found.shape == (len(NAMES),) and np.isfinite(found).all()
