"""Checks for hardware that lies: bits that should be equal are compared,
and the process that differs is named."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch.distributed as dist

from megatron_sov.config import GuardConfig
from megatron_sov.errors import SilentCorruption
from megatron_sov.mcore.model import local_shards
from megatron_sov.mcore.model.language_model import LanguageModel
from megatron_sov.mcore.parallel.object_collectives import gather_objects
from megatron_sov.obs.events import EventLog
from megatron_sov.obs.warning import warn


class SdcChecks:
    """Compares replicas of weights, and repetitions of a computation."""

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings

    def probe_is_due(self, step: int) -> bool:
        """Return whether a micro-batch is computed twice in this step (1-based)."""
        return self._settings.probe_every_steps > 0 and step % self._settings.probe_every_steps == 0

    def repeat(self, step: int, model: LanguageModel, compute: Callable[[int], None],
               events: EventLog) -> None:
        """Compute twice and compare the gradients; called by all processes together.

        Args:
            compute: runs forward and backward passes (turn 0, then 1) that leave this process's own
                gradients in the model.
        """
        found = []
        for turn in range(2):
            compute(turn)
            found.append([int(local_shards.checksum([g])) for g in local_shards.gradients(model)])
        self._measure(step, local_shards.ranks_where(found[0] != found[1]),
                    "the same micro-batch gave other gradients when it was computed again", events)

    def compare(self, step: int, model: LanguageModel, events: EventLog) -> None:
        """Compare the weights that several processes hold; called by all processes together,
        before a checkpoint."""
        if self._settings.compare_replicas:
            self._measure(step, local_shards.differing_replicas(model),
                          "weights differ from those of their replicas", events)

    def _measure(self, step: int, ranks: list[int], what: str, events: EventLog) -> None:
        if not ranks:
            return
        hosts = gather_objects(platform.node())
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
        text = f"silent corruption after step {step}: {what} ({named})"
        fields = {"step": step, "ranks": ranks, "hosts": [hosts[r] for r in ranks]}
        if self._settings.on_sdc == "exit":
            events.write("sdc", **fields, text=text)
            raise SilentCorruption(f"{text}; nothing is saved from here on, "
                                   "test that machine before it is used again")
        if dist.get_rank() == 0:
            warn(text, events.write, "sdc", **fields)
