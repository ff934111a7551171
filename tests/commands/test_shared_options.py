"""Options of a command as words, which the command reads as the same options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.commands.evaluate.eval_judged import EvalPasskOptions
from megatron_sov.commands.models.generate import GenerateOptions
from megatron_sov.commands.models.serve import ServeOptions
from megatron_sov.commands.shared_options import words_of
from megatron_sov.infer.request import Sampling
from tests.typed_words import typed


@pytest.mark.parametrize("options", [
    GenerateOptions(target=Path("m"), prompt=("-1 plus 1?", "a  b"), chat=True, logprobs=True, json=True,
                    sampling=Sampling(5, 0.1, top_p=1e-9, num_drafts=2), nproc=3, settings=("a=1", "b=-x")),
    EvalPasskOptions(target=Path("m"), input=Path("p"), k=(1, 8), output=Path("o"), reward="math",
                     right_from=-0.5, reward_set=("unit=km",)),
    ServeOptions(target=Path("m"))])
def test_words_are_read_as_the_same_options(options: Any) -> None:
    assert typed(type(options), words_of(options)) == options


def test_defaults_take_no_words() -> None:
    assert words_of(ServeOptions(target=Path("m"))) == ["m"]
