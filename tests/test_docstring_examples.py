"""Examples in docstrings run and print what they show."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for package in ("megatron_sov", "data_prep", "tokenizer", "layout_proof")
    for file in (ROOT / package).rglob("*.py")
    if "    >>> " in file.read_text(encoding="utf-8"))


@pytest.mark.each("module", WITH_EXAMPLES)
def test_examples_print_their_shown_output(module: str, cwd: Path) -> None:
    import megatron_sov

    _ = megatron_sov.Objective  # prepares the process for megatron, which some of these modules import
    result = importlib.import_module(module)
    assert doctest.testmod(result, optionflags=doctest.ELLIPSIS).failed == 0


def test_public_classes_have_an_example() -> None:
    import megatron_sov
    from megatron_sov.train.data.requirements import NeededColumn

    classes = [megatron_sov.RunConfig, megatron_sov.GlobalBatch, megatron_sov.LossSums, NeededColumn,
               megatron_sov.LanguageModelling, megatron_sov.Document,
               megatron_sov.LeftOut, megatron_sov.UserError]
    assert [cls.__name__ for cls in classes if ">>> " not in (cls.__doc__ or "")] == []
