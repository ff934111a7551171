"""Start engine servers for a run, and send them the trainer's weights before each round."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.convert import export_weights, to_hf
from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.engine.parallel.world import run_on_each_rank, run_on_main
from megatron_sov.infer.engines.server_engine import ServerEngine, ServerLocations, open_server_engine
from megatron_sov.infer.engines.server_process import EngineServers
from megatron_sov.infer.engines.target import find_target
from megatron_sov.infer.request import Tokens
from megatron_sov.model.pretrained import CONFIG
from megatron_sov.runs.rounds import Policy
from megatron_sov.train.feed import FeedView

COMPARED_TOKENS = 256
"""Tokens of a prompt for which `LiveServers.check` compares log-probabilities."""
MAX_GAP_NATS = 0.25
"""Limit for the mean log-probability difference between trainer and engine, in nats per token: bf16
stays far below, a layer with wrong weights exceeds the limit."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings to start a run's servers."""

    start: Path
    """Checkpoint or Hugging Face folder from --from."""
    places: ServerLocations
    servers: EngineServers
    longest: int
    """Tokens in the longest sequence, prompt and response."""
    vocab_size: int
    with_routes: bool
    """Whether servers return expert routes."""


@dataclass
class LiveServers:
    """Servers with the live weights; every process has an object, and rank 0 has the servers."""

    settings: ServerSettings
    meters: dict[str, float] = field(default_factory=dict)
    engine: ServerEngine | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _opening: Future[None] | None = None
    _context: Any = None
    """Context manager of `engine`."""
    _closed: threading.Event = field(default_factory=threading.Event)
    """Ends the servers, also during their start."""
    _loaded_step: int | None = None
    """Policy step of the weights on the servers; None: unknown, another client may have changed them."""

    @property
    def is_open(self) -> bool:
        return self.engine is not None and self._opening is None

    def is_opening(self, limit_s: float) -> bool:
        """Start the servers on rank 0, wait up to `limit_s`, and return whether they are still starting."""
        if self.engine is None and self._opening is None:
            self._opening = self._pool.submit(self._open_servers)
        if self._opening is not None and wait([self._opening], limit_s).done:
            opening, self._opening = self._opening, None
            opening.result()
        return self._opening is not None

    def _open_servers(self) -> None:
        settings = self.settings
        target = find_target(settings.start)
        model = target.path if target.is_hf else settings.places.logs / "model"
        if not (model / CONFIG).is_file():
            # Servers read its config.json and start with its weights.
            to_hf(target.path, model)
        self._context = open_server_engine(
            model, settings.vocab_size, settings.longest, settings.servers,
            locations=settings.places, with_routes=settings.with_routes, stop_event=self._closed)
        self.engine = self._context.__enter__()
        if not settings.places.urls:
            self._loaded_step = 0  # servers of this run start with the initial weights

    def push_weights(self, view: FeedView, policy: Policy) -> None:
        """Send the live weights to the servers; called by all processes together."""
        began_s = time.monotonic()
        if run_on_main(view.world, lambda: self._loaded_step != policy.step):
            self._send_weights(view, policy)
        self.meters = {"push_s": time.monotonic() - began_s}

    def check(self, view: FeedView, policy: Policy, prompt: Tokens) -> None:
        """Check that the servers have the live weights; called by all processes together, also during
        generation.

        Args:
            view: the run, whose model is the policy.
            policy: identity of the live weights.
            prompt: token ids to score by trainer and servers.

        Raises:
            UserError: the log-probabilities differ by more than `MAX_GAP_NATS`.
        """
        text = list(prompt[:COMPARED_TOKENS])
        if len(text) > 1:
            logprobs = compute_logprobs(view.policy, text)
            run_on_main(view.world, lambda: self._compare_logprobs(text, logprobs, policy))

    def close(self) -> None:
        self._closed.set()  # else the wait for a remote server may last half an hour
        self._pool.shutdown()
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = self.engine = None

    def _send_weights(self, view: FeedView, policy: Policy) -> None:
        weights = export_weights(view.policy.model)
        self._loaded_step = None

        def update_engine(rank: int, size: int) -> None:
            try:
                if rank == 0:
                    assert self.engine is not None, "the servers are not open"
                    self.engine.update(weights, policy.step)
                    self._loaded_step = policy.step
            finally:
                # every rank gathers each weight, also after an error on rank 0
                for _ in weights:
                    pass

        run_on_each_rank(update_engine)

    def _compare_logprobs(self, text: Sequence[int], expected: Sequence[float], policy: Policy) -> None:
        """Compare each server's log-probabilities of `text` with the trainer's, `expected`."""
        assert self.engine is not None, "the servers are not open"
        gaps = [sum(abs(a - b) for a, b in zip(logprobs, expected, strict=True)) / len(expected)
                for logprobs in self.engine.fleet.score(text)]
        gap = self.meters["engine_gap_nats"] = max(gaps, default=0.0)
        if gap > MAX_GAP_NATS:
            raise UserError("--engine vllm: a server's log-probabilities of a known text "
                            f"are {gap:.3g} nats a token from the trainer's at step {policy.step} (at most "
                            f"{MAX_GAP_NATS:g}): the server did not load the weights or computes another "
                            "model; look at its log")


def compute_logprobs(model: ForwardModel, text: Sequence[int]) -> list[float]:
    """Return log p(token | preceding tokens) for each token after the first, in nats (collective)."""
    logits = model.logits(DocumentBatch([text], get_local_device()), torch.arange(len(text) - 1))
    labels = torch.tensor(text[1:], device=logits.device)
    logprobs: list[float] = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0].tolist()
    return logprobs
