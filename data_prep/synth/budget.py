"""What a run may use up: tokens, money, time.  A request passes only while the most that it can take fits."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from data_prep.synth.stopping import Stop
from megatron_sov.endpoints.cache import Usage
from megatron_sov.errors import StopRequested
from megatron_sov.settings import NotNegative, NotNegativeInt

_LOOK_S = 0.5
"""Between two looks at whether the run was asked to stop."""


@dataclass(frozen=True)
class Most:
    """Limits of a run; 0: none."""

    tokens: NotNegativeInt = 0
    """Read and written, by all commands on a folder."""
    cost: NotNegative = 0.0
    """In the currency of the prices, by all commands on a folder."""
    time_s: NotNegative = 0.0
    """Of one command."""


class Budget:
    """Lets requests pass while what they may take is there, from any thread.

    While others are under way, a request that does not fit waits for what they leave.

    Args:
        most: the limits.
        used: by earlier commands.
        stop: of the run.
    """

    def __init__(self, most: Most, used: Usage, stop: Stop) -> None:
        self._most, self._stop = most, stop
        self._tokens, self._cost = used.input_tokens + used.output_tokens, used.cost
        self._held_tokens, self._held_cost, self._num_held = 0, 0.0, 0
        self._longest_s = 0.0
        self._began_s: dict[int, float] = {}
        self._end_s = time.monotonic() + most.time_s if most.time_s else float("inf")
        self._changed = threading.Condition()

    def enter(self, most: Usage) -> None:
        """Let a request pass that may take as much as `most`.

        Raises:
            StopRequested: it would break a limit, or the run was asked to stop.
        """
        tokens = most.input_tokens + most.output_tokens
        with self._changed:
            while True:
                self._stop.check()
                self._check_time()
                broken = self._broken(tokens, most.cost)
                if not broken:
                    break
                if not self._num_held:
                    raise StopRequested(broken)
                self._changed.wait(_LOOK_S)
            self._held_tokens += tokens
            self._held_cost += most.cost
            self._num_held += 1
            self._began_s[threading.get_ident()] = time.monotonic()

    def leave(self, most: Usage, billed: Usage) -> None:
        """Note what a request that has passed took."""
        with self._changed:
            self._held_tokens -= most.input_tokens + most.output_tokens
            self._held_cost -= most.cost
            self._num_held -= 1
            if not self._num_held:  # sums of floats leave crumbs
                self._held_cost = 0.0
            self._tokens += billed.input_tokens + billed.output_tokens
            self._cost += billed.cost
            took_s = time.monotonic() - self._began_s.pop(threading.get_ident())
            self._longest_s = max(self._longest_s, took_s)
            self._changed.notify_all()

    def _check_time(self) -> None:
        left_s = self._end_s - time.monotonic()
        if left_s < self._longest_s or left_s <= 0:
            raise StopRequested(f"--max-time {self._most.time_s:g} s: {max(left_s, 0):.0f} s are left, and a "
                                f"request has taken {self._longest_s:.0f} s; the same command goes on")

    def _broken(self, tokens: int, cost: float) -> str:
        """Return which limit a request would break."""
        most = self._most
        if most.tokens and self._tokens + self._held_tokens + tokens > most.tokens:
            return (f"--max-tokens-total {most.tokens}: {self._tokens:,} tokens are used, and the next "
                    f"request may take {tokens:,}; raise it, and the same command goes on")
        if most.cost and self._cost + self._held_cost + cost > most.cost:
            return (f"--max-cost {most.cost:g}: {self._cost:.4f} is spent, and the next request may cost "
                    f"{cost:.4f}; raise it, and the same command goes on")
        return ""
