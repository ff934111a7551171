"""What Python reads and JSON does not know is refused."""

import json

import pytest

from megatron_sov.documents.strict_json import finite, no_constant


def read(text: str) -> object:
    return json.loads(text, parse_constant=no_constant, parse_float=finite)


def test_json_is_read_as_ever() -> None:
    text = '{"a": [1, -0.5, 1e308, null, true, "NaN"], "b": 5e-324}'
    assert read(text) == json.loads(text)


@pytest.mark.parametrize(("text", "why"), [
    ("NaN", "NaN is no JSON"), ("[-Infinity]", "-Infinity is no JSON"),
    ('{"a": 1e999}', "1e999 is more than")])
def test_numbers_that_would_be_written_as_none_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(text)
