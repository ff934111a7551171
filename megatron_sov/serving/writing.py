"""One answer as it grows: its tokens, its text up to what ends it, and how much of the text is sure."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sov.generate.request import STOP, Stop

CUT_CHARACTER = "\ufffd"
"""What the beginning of a character of several tokens is shown as."""


class Writing:
    """An answer that is being written."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...],
                 end_ids: tuple[int, ...]) -> None:
        """Begin with nothing.

        Args:
            decode: from ids to text.
            stops: strings that end the answer, and do not belong to it.
            end_ids: tokens that end it.
        """
        self._decode, self._ends = decode, end_ids
        self._stop = Stop(end_ids, stops, decode)
        self.tokens: list[int] = []
        """Ids, with the one that ends it."""
        self.logprobs: list[float] = []
        """Of each token."""
        self.reason: str | None = None
        """What has ended it; None: nothing yet."""
        self._text, self._first, self._shown = "", 0, 0

    def add(self, token: int, logprob: float, reason: str | None) -> None:
        """Take the next token; what comes behind the end is passed over.

        Args:
            token: its id.
            logprob: its log-probability.
            reason: why the model goes on no further; None: it does.
        """
        if self.reason is not None:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.reason = STOP if self._stop.ends(self.tokens) else reason

    def text(self) -> str:
        """Return the text of all tokens, up to the string that ends it."""
        return self._stop.cut_text(self._decode(self.tokens))

    def sure_text(self) -> str:
        """Return the beginning of the text that what comes will not change, while it is being written.

        Tokens are decoded together with those before them that have been shown, from the last place where
        that was whole, so that each is read a few times and not with all that went before.
        """
        before = self._decode(self.tokens[self._first:self._shown])
        behind = self._decode(self.tokens[self._first:])
        if len(behind) > len(before) and not behind.endswith(CUT_CHARACTER):
            self._text += behind[len(before):]
            self._first, self._shown = self._shown, len(self.tokens)
        held = max((_begun(self._text, stop) for stop in self._stop.texts), default=0)
        return self._stop.cut_text(self._text[:len(self._text) - held])


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may begin a stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
