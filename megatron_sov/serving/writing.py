"""One answer as it grows: its tokens, its text up to what ends it, and how much of the text is sure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_sov.generate.request import STOP, Stop, Written

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
        self.prompt: list[Written] = []
        """Of the prompt's tokens from the second on, where they are asked for: the token and then the most
        probable ones, with log-probabilities."""
        self.tops: list[list[tuple[int, float]]] = []
        """Of each token, where they are asked for: the most probable ones in its place."""
        self.reason: str | None = None
        """What has ended it; None: nothing yet."""
        self._text, self._first, self._shown = "", 0, 0

    def add(self, token: int, logprob: float, reason: str | None, ranked: Sequence[Written] = ()) -> None:
        """Take the next token; what comes behind the end is passed over.

        Args:
            token: its id.
            logprob: its log-probability.
            reason: why the model goes on no further; None: it does.
            ranked: see `News`.
        """
        if self.reason is not None:
            return
        self.tokens.append(token)
        if ranked:
            self.prompt += ranked[:-1]
            self.tops.append(top_of(ranked[-1]))
            logprob = ranked[-1][1][0]  # to the last bit what stands among the most probable ones
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


def top_of(ranked: Written) -> list[tuple[int, float]]:
    """Return the most probable tokens of a place, with their log-probabilities."""
    tokens, logprobs = ranked
    return list(zip(tokens[1:], logprobs[1:], strict=True))


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may begin a stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
