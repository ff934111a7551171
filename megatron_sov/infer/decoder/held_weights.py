"""Which weights an engine holds: one version whole, or, after an update that failed, none to be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import UserError

if TYPE_CHECKING:
    import torch

NamedTensors = Iterator[tuple[str, "torch.Tensor"]]
"""Hugging Face names and tensors of a whole model, as `convert.export_weights` gives them."""


class HeldWeights:
    """The version of an engine's weights; what writes with them asks `version`, and is refused where they
    are parts of two."""

    def __init__(self, engine: str) -> None:
        """Begin with the weights that were loaded, version 0, of an engine by its name."""
        self._engine, self._version = engine, 0
        self._failure: str | None = None

    @property
    def version(self) -> int:
        """The weights' version; raises as `check` does."""
        self.check()
        return self._version

    def check(self) -> None:
        """Raise `UserError` where the last update failed, so that the weights are of no version."""
        if self._failure is not None:
            raise UserError(f"the engine {self._engine} holds parts of two models: its update to version "
                            f"{self._failure}; update it with all weights, or load it anew")

    @contextlib.contextmanager
    def replaced(self, version: int, weights: Iterator[Any] | None, since: int | None = None
                 ) -> Iterator[None]:
        """Put the block's work in the place of the weights; until it has ended well there are none.

        Args:
            version: what they are then.
            weights: what is read from; closed if the block fails, so that processes which gather it together
                with this one can finish.
            since: the version that the block's work goes on from; None: from none.

        Raises:
            UserError: the weights are of another version than that; they stay.
        """
        if since is not None and self.version != since:
            _close(weights)
            raise UserError(f"the engine {self._engine} holds version {self.version}, and what has changed "
                            f"since version {since} would make nobody's weights of it; update it with all "
                            "weights")
        self._failure = f"{version} did not end"
        try:
            yield
        except BaseException as e:
            self._failure = f"{version} failed ({e})"
            _close(weights)
            raise
        self._version, self._failure = version, None


def _close(weights: Iterator[Any] | None) -> None:
    with contextlib.suppress(AttributeError):
        weights.close()  # type: ignore[union-attr]
