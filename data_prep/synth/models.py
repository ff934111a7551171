"""The models of a run: where each is, what it is called, how it is asked, and what may be used up of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.synth.generator import Door, Role, T
from data_prep.synth.options import MaxTokensField, SynthOptions, duration_s
from megatron_sov.base.errors import StopRequested, UserError, download
from megatron_sov.base.settings import NotNegative, NotNegativeInt, ProblemCode, SettingsProblem
from megatron_sov.work.endpoints.answers import BadAnswer, EndpointUnavailable, NeverAnswered
from megatron_sov.work.endpoints.cache import EndpointCache, Usage
from megatron_sov.work.endpoints.endpoint import Endpoint, EndpointLimits
from megatron_sov.work.endpoints.local_server import serving
from megatron_sov.work.endpoints.transport import address_problems, is_address
from megatron_sov.work.processes.pool import StopSignal

BACKOFF_S = 1.0
LOCAL_PATIENCE_S = 60.0
_BUDGET_LOOK_S = 0.5
_WHOLE_BYTES = 1 << 24
_ENDS_BYTES = 1 << 20
"""Of larger files, begin and end stand for what lies between."""


@dataclass(frozen=True)
class Model:
    """One model of a run."""

    engine: str
    """Address up to `/v1`, or a folder."""
    model: str
    """As the endpoint calls it; of a folder, empty: its name."""
    key_env: str = ""
    """Variable of the environment with the key; empty: none is sent."""
    max_tokens_field: MaxTokensField = "max_tokens"
    """What the longest answer stands in, where requests are sent; none: it is not sent."""
    options: tuple[str, str] = field(default=("--engine", "--model"), compare=False)
    """What the command line calls address and name."""

    @property
    def is_local(self) -> bool:
        return not is_address(self.engine)

    @property
    def name(self) -> str:
        return self.model or Path(self.engine).resolve().name

    @property
    def location(self) -> str:
        """What stands in files for where it is."""
        return str(Path(self.engine).resolve()) if self.is_local else self.engine.rstrip("/")

    def problems(self) -> list[SettingsProblem]:
        """Return every rule between address and name that is broken, by option."""
        where, name = self.options
        p: list[SettingsProblem] = []
        if not self.is_local:
            p += address_problems(where, self.engine, f"{where.replace('engine', 'api-key-env')}")
            if not self.model:
                p.append(SettingsProblem(ProblemCode.RULE, name, "say which model of the endpoint is asked"))
        elif "://" in self.engine:
            p.append(SettingsProblem(ProblemCode.RULE, where,
                                     "must be an address such as http://localhost:8000/v1, or a folder"))
        return p

    def sent(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a request as the endpoint takes it; what it is kept by stays the same."""
        # keys are made of the request before this: another field name keeps all answers valid
        others = {name: value for name, value in request.items() if name != "max_tokens"}
        if self.max_tokens_field == "none" or "max_tokens" not in request:
            return others
        return {**others, self.max_tokens_field: request["max_tokens"]}

    def identity(self) -> str:
        """Return what stands for the model in what answers are kept by: wherever it is served, its answers
        are its answers."""
        if self.is_local:
            return f"local:{identity_of(Path(self.engine), self.options[0])}"
        return f"endpoint:{self.model}"


@dataclass(frozen=True)
class Most:
    """Limits of a run; 0: none."""

    tokens: NotNegativeInt = 0
    """Read and written, by all commands on a folder."""
    time_s: NotNegative = 0.0
    """Of one command."""


class Budget:
    """Lets requests pass, from any thread, while the most that they can take is there beside what was used by
    earlier commands.  While others are under way, one that does not fit waits for what they leave."""

    def __init__(self, most: Most, used: Usage, stop: StopSignal) -> None:
        self._most, self._stop = most, stop
        self._tokens, self._held_tokens, self._num_held = used.input_tokens + used.output_tokens, 0, 0
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
                # each time round: a limit may be reached while this thread waits
                self._stop.check()
                self._check_time()
                limit = self._most.tokens
                if not limit or self._tokens + self._held_tokens + tokens <= limit:
                    break
                # no request is under way that could leave something, so waiting would never end
                if not self._num_held:
                    raise StopRequested(
                        f"--max-tokens-total {limit}: {self._tokens:,} tokens are used, and the next request "
                        f"may take {tokens:,}; raise it, and the same command goes on")
                self._changed.wait(_BUDGET_LOOK_S)
            # the most that it may take is set aside now: threads together never pass the limit
            self._held_tokens += tokens
            self._num_held += 1
            self._began_s[threading.get_ident()] = time.monotonic()

    def leave(self, most: Usage, billed: Usage) -> None:
        """Note what a request that has passed took."""
        with self._changed:
            self._held_tokens -= most.input_tokens + most.output_tokens
            self._num_held -= 1
            self._tokens += billed.input_tokens + billed.output_tokens
            # the longest request so far decides whether one more fits into the time that is left
            took_s = time.monotonic() - self._began_s.pop(threading.get_ident())
            self._longest_s = max(self._longest_s, took_s)
            self._changed.notify_all()

    def _check_time(self) -> None:
        left_s = self._end_s - time.monotonic()
        if left_s < self._longest_s or left_s <= 0:
            raise StopRequested(f"--max-time {self._most.time_s:g} s: {max(left_s, 0):.0f} s are left, and a "
                                f"request has taken {self._longest_s:.0f} s; the same command goes on")


class EndpointDoor:
    """One model behind an endpoint, asked as often at once as the run has slots, until it is asked to stop;
    `patience_s`: how long the endpoint may answer nobody."""

    def __init__(self, endpoint: Endpoint, model: str, slots: threading.Semaphore, stop: StopSignal,
                 patience_s: float) -> None:
        self._endpoint, self._slots, self._stop, self._patience_s = endpoint, slots, stop, patience_s
        self.model = model
        self.key = endpoint.key

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Return what `read` makes of the answer; raises as `Endpoint.ask` does, and `EndpointUnavailable`
        where the endpoint has long answered nobody."""
        with self._slots:
            self._stop.check()
            began_s = time.monotonic()
            try:
                return self._endpoint.ask(payload, read)
            except NeverAnswered:
                raise
            except (BadAnswer, TimeoutError) as e:
                # one request that fails is one item's; an endpoint that answers no thread for so long is away
                silent_s = time.monotonic() - max(began_s, self._endpoint.answered_s)
                if silent_s >= self._patience_s and not isinstance(e, EndpointUnavailable):
                    raise EndpointUnavailable(f"{e}; it has answered nobody for {silent_s:.0f} s") from None
                raise


@contextlib.contextmanager
def opened(writer: Model, judge: Model, options: SynthOptions, cache: EndpointCache, budget: Budget,
           stop: StopSignal) -> Iterator[dict[Role, Door]]:
    """Yield the doors to both models; a folder is served as long as the context is open."""
    slots = threading.Semaphore(options.threads)
    with contextlib.ExitStack() as stack:
        doors: dict[Model, Door] = {}
        # often both are one model, which is then served once
        for model in dict.fromkeys((writer, judge)):
            url, name, key = model.engine.rstrip("/"), model.name, ""
            if model.is_local:
                served = stack.enter_context(serving(
                    Path(model.engine).resolve(),
                    f"--engine {model.engine}: `megatron-sov serve` did not start: ",
                    sleep=stop.sleep))
                url, key, name = served.url, served.key, served.model
            # a server of this machine that answers nobody has ended, and nobody starts it again
            patience_s = duration_s("--patience", options.patience)
            patience_s = min(patience_s, LOCAL_PATIENCE_S) if model.is_local else patience_s
            endpoint = Endpoint(f"{url}/chat/completions", model.key_env,
                                EndpointLimits(options.timeout, options.max_attempts, BACKOFF_S, 0.0, 0.0,
                                               0.0, 0.0, patience_s),
                                cache, known_as=model.identity(), gate=budget, sleep=stop.sleep,
                                told=lambda sentence: print(sentence, flush=True), key=key,
                                sent=model.sent,
                                accepted_models=None if model.is_local else options.accept_model)
            doors[model] = EndpointDoor(endpoint, name, slots, stop, patience_s)
        yield {"writer": doors[writer], "judge": doors[judge]}


def identity_of(folder: Path, option: str = "--engine") -> str:
    """Return a hash that stands for a model's files: small ones whole, of large ones size, begin and end.

    Args:
        folder: of the model.
        option: that names it, for sentences.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: is neither an address (http://...) nor a folder of a model"
                        f"{download(folder)}")
    digest = hashlib.sha256()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise UserError(f"{option} {folder}: is empty; pass a checkpoint or a Hugging Face folder")
    for file in files:
        size_bytes = file.stat().st_size
        # name and size too: files that change places make another model
        digest.update(f"{file.relative_to(folder)}\0{size_bytes}\0".encode())
        with open(file, "rb") as f:
            if size_bytes <= _WHOLE_BYTES:
                digest.update(f.read())
            else:
                digest.update(f.read(_ENDS_BYTES))
                f.seek(-_ENDS_BYTES, os.SEEK_END)
                digest.update(f.read())
    return digest.hexdigest()
