"""What is called wrongly fails when it is loaded, with what it should have taken."""

from __future__ import annotations

import pytest

from megatron_sov.errors import UserError
from megatron_sov.plugins.signatures import check_methods, takes

METHODS = {"read": ("path",), "write": ("path", "text")}


class Good:
    def read(self, path, encoding="utf-8"): ...
    def write(self, *anything): ...


class Bad:
    def read(self): ...


def test_arguments_by_position() -> None:
    assert takes(len, ("x",)) and takes(Good, ()) and takes(lambda *a: a, ("a", "b"))
    assert not takes(lambda: 0, ("x",)) and not takes(lambda x, *, y: 0, ("x",)) and not takes("text", ())


def test_methods_of_a_class() -> None:
    check_methods(Good, "mine.py:Good", "a store", METHODS)
    with pytest.raises(UserError, match=r"^mine.py:Bad: a store needs read\(self, path\), write\(self, path, "
                                        r"text\); it has read\(self\)$"):
        check_methods(Bad, "mine.py:Bad", "a store", METHODS)
    with pytest.raises(UserError, match=r"is a Good; a store is a class with read\(self, path\), "
                                        r"write\(self, path, text\)"):
        check_methods(Good(), "mine.py:good", "a store", METHODS)
    with pytest.raises(UserError, match=r"a store needs .*; it has none"):
        check_methods(int, "mine.py:int", "a store", METHODS)
