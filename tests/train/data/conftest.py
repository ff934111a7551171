"""Token sources in which every token encodes its source, document and position."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_sov.train.data.sources import Source


class Numbered:
    """Documents of given lengths; token t of document d is 100 * (d + 1) + t."""

    is_plain = False
    columns = ("score",)

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int32)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        assert start + count <= self.lengths[document]
        return np.arange(start, start + count, dtype=np.int64) + 100 * (document + 1)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return (self.tokens(document, start, count) / 1000).astype(np.float32)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return (self.tokens(document, start, count) % 3).astype(np.uint8)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        assert name == "score"
        return (-self.tokens(document, start, count) / 10).astype(np.float32)


@pytest.fixture(scope="session")
def numbered() -> type[Numbered]:
    """Return the class (test modules cannot import this file)."""
    return Numbered


@pytest.fixture(scope="session")
def make_source() -> Callable[..., Source]:
    """Return `make(name, lengths, share=1.0, is_chat=False)`: a source of numbered documents."""

    def make(name: str, lengths: list[int], share: float = 1.0, *, is_chat: bool = False) -> Any:
        return Source(name, None, "chat" if is_chat else "text", {}, {"train": sum(lengths)}, share,
                      train_documents=Numbered(lengths), columns=Numbered.columns)

    return make
