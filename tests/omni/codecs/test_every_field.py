"""Each field of each class of a codec's settings, driven over its bounds and to wrong types."""

from __future__ import annotations

from tests.base.settings.every_field import classes_below, find_wrongs


def test_each_field_is_told_by_its_code_from_every_source() -> None:
    found = list(classes_below("megatron_sov/omni/codecs"))
    assert len(found) > 4
    assert not [wrong for cls in found for wrong in find_wrongs(cls)]
