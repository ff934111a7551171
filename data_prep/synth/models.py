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
from data_prep.synth.options import MaxTokensField, SynthOptions
from megatron_sov.base.errors import StopRequested, UserError, suggest_download
from megatron_sov.base.settings import ProblemCode, SettingsProblem
from megatron_sov.work.endpoints.answers import BadAnswer, EndpointUnavailable, RequestRefused
from megatron_sov.work.endpoints.cache import EndpointCache, Usage
from megatron_sov.work.endpoints.endpoint import Endpoint, EndpointLimits
from megatron_sov.work.endpoints.local_server import serve_model
from megatron_sov.work.endpoints.transport import find_address_problems, is_url
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
        return not is_url(self.engine)

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
            p += find_address_problems(where, self.engine, f"{where.replace('engine', 'api-key-env')}")
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


class Budget:
    """Lets requests pass, from any thread, while the tokens that they may take and those of earlier requests
    stay within a limit.  A request that does not fit waits for those under way.

    Args:
        limit: tokens read and written by all commands on a folder; 0: no limit.
        used: by earlier commands.
        stop: ends waiting.
    """

    def __init__(self, limit: int, used: Usage, stop: StopSignal) -> None:
        self._limit, self._stop = limit, stop
        self._used, self._reserved, self._num_open = used.input_tokens + used.output_tokens, 0, 0
        self._changed = threading.Condition()

    def enter(self, most: Usage) -> None:
        """Let a request pass that may take as much as `most`.

        Raises:
            StopRequested: it would break the limit, or the run was asked to stop.
        """
        tokens = most.input_tokens + most.output_tokens
        with self._changed:
            self._stop.check()
            while self._limit and self._used + self._reserved + tokens > self._limit:
                # no request is under way that could leave something, so waiting would never end
                if not self._num_open:
                    raise StopRequested(
                        f"--max-tokens-total {self._limit}: {self._used:,} tokens are used, and the next "
                        f"request may take {tokens:,}; raise it, and the same command goes on")
                self._changed.wait(_BUDGET_LOOK_S)
                self._stop.check()
            # the most that it may take is set aside now: threads together never pass the limit
            self._reserved += tokens
            self._num_open += 1

    def leave(self, most: Usage, billed: Usage) -> None:
        """Note what a request that has passed took."""
        with self._changed:
            self._reserved -= most.input_tokens + most.output_tokens
            self._num_open -= 1
            self._used += billed.input_tokens + billed.output_tokens
            self._changed.notify_all()


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
            except RequestRefused:
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
                served = stack.enter_context(serve_model(
                    Path(model.engine).resolve(),
                    f"--engine {model.engine}: `megatron-sov serve` did not start: ",
                    sleep=stop.sleep))
                url, key, name = served.url, served.key, served.model
            # a server of this machine that answers nobody has ended, and nobody starts it again
            patience_s = min(options.patience, LOCAL_PATIENCE_S) if model.is_local else options.patience
            endpoint = Endpoint(f"{url}/chat/completions", model.key_env,
                                EndpointLimits(options.timeout, options.max_attempts, BACKOFF_S, 0.0, 0.0,
                                               0.0, 0.0, patience_s),
                                cache, cache_name=model.identity(), gate=budget, sleep=stop.sleep,
                                report=lambda sentence: print(sentence, flush=True), key=key,
                                transform=model.sent,
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
                        f"{suggest_download(folder)}")
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
