"""Writer and judge: address or folder, request form, token budget and clients."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.synth.requests import Role
from data_prep.synth.synth import MaxTokensField, SynthOptions
from megatron_sov.base.errors import StopRequested, UserError, suggest_download
from megatron_sov.base.settings import ProblemCode, SettingsProblem
from megatron_sov.model.pretrained import hash_model_folder
from megatron_sov.work.endpoints.cache import EndpointCache, Usage
from megatron_sov.work.endpoints.endpoint import Endpoint, EndpointLimits
from megatron_sov.work.endpoints.local_server import serve_model
from megatron_sov.work.endpoints.transport import find_address_problems, is_url
from megatron_sov.work.processes.pool import StopSignal

BACKOFF_S = 1.0
LOCAL_PATIENCE_S = 60.0
_STOP_POLL_S = 0.5


@dataclass(frozen=True)
class Model:
    """Writer or judge."""

    engine: str
    """Address up to `/v1`, or folder."""
    model: str
    """Name at the endpoint; "" for a folder: the folder's name."""
    key_env: str = ""
    """Environment variable with the key; "": no key."""
    max_tokens_field: MaxTokensField = "max_tokens"
    """Request field for the longest answer; none: omit the field."""
    options: tuple[str, str] = field(default=("--engine", "--model"), compare=False)
    """Command-line options for address and name, for messages."""

    @property
    def is_local(self) -> bool:
        return not is_url(self.engine)

    @property
    def name(self) -> str:
        return self.model or Path(self.engine).resolve().name

    def find_problems(self) -> list[SettingsProblem]:
        engine, name = self.options
        problems: list[SettingsProblem] = []
        if not self.is_local:
            problems += find_address_problems(engine, self.engine, engine.replace("engine", "api-key-env"))
            if not self.model:
                problems.append(SettingsProblem(ProblemCode.RULE, name,
                                                "say which model of the endpoint is asked"))
        elif "://" in self.engine:
            problems.append(SettingsProblem(
                ProblemCode.RULE, engine, "must be an address such as http://localhost:8000/v1, or a folder"))
        return problems

    def build_payload(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rename or drop `max_tokens` for the endpoint; cache keys use the request before this call."""
        payload = {name: value for name, value in request.items() if name != "max_tokens"}
        if "max_tokens" in request and self.max_tokens_field != "none":
            payload[self.max_tokens_field] = request["max_tokens"]
        return payload

    @cached_property
    def identity(self) -> str:
        """Name in cache keys, equal at every address. Raises `UserError`: the folder is missing or empty."""
        if not self.is_local:
            return f"endpoint:{self.model}"
        folder, option = Path(self.engine), self.options[0]
        if not folder.is_dir():
            raise UserError(f"{option} {folder}: is neither an address (http://...) nor a folder of a model"
                            f"{suggest_download(folder)}")
        if not any(folder.iterdir()):
            raise UserError(f"{option} {folder}: is empty; pass a checkpoint or a Hugging Face folder")
        return f"local:{hash_model_folder(folder)}"


class TokenBudget:
    """Admits up to `threads` requests at a time, while used and reserved tokens stay within a limit. A
    request that does not fit waits for running requests.

    Args:
        threads: concurrent requests over all clients.
        limit: tokens read and written by all commands on a folder; 0: no limit.
        used: tokens of earlier commands.
        stop: ends the waiting.
    """

    def __init__(self, threads: int, limit: int, used: Usage, stop: StopSignal) -> None:
        self._threads, self._limit, self._stop = threads, limit, stop
        self._num_used, self._num_reserved, self._num_running = _count_tokens(used), 0, 0
        self._changed = threading.Condition()

    def enter(self, most: Usage) -> None:
        """Reserve the worst case `most` for a request. Raises `StopRequested`: the request would exceed the
        limit, or the run should stop."""
        tokens = _count_tokens(most)
        with self._changed:
            self._stop.check()
            while (exceeds := self._limit and self._num_used + self._num_reserved + tokens > self._limit) or (
                    self._num_running >= self._threads):
                # no running request can release tokens, so waiting would never end
                if exceeds and not self._num_running:
                    raise StopRequested(
                        f"--max-tokens-total {self._limit}: {self._num_used:,} tokens are used, and the next "
                        f"request may take {tokens:,}; raise it, and the same command goes on")
                self._changed.wait(_STOP_POLL_S)
                self._stop.check()
            # reserved before the request: threads together never exceed the limit
            self._num_reserved += tokens
            self._num_running += 1

    def leave(self, most: Usage, billed: Usage) -> None:
        """Replace a finished request's reservation by the billed tokens."""
        with self._changed:
            self._num_reserved -= _count_tokens(most)
            self._num_running -= 1
            self._num_used += _count_tokens(billed)
            self._changed.notify_all()


def _count_tokens(usage: Usage) -> int:
    return usage.input_tokens + usage.output_tokens


@contextlib.contextmanager
def open_clients(writer: Model, judge: Model, options: SynthOptions, cache: EndpointCache,
                 stop: StopSignal) -> Iterator[dict[Role, Endpoint]]:
    """Yield a client for each role; a model folder is served while the context is open."""
    budget = TokenBudget(options.threads, options.max_tokens_total, cache.usage(), stop)
    with contextlib.ExitStack() as stack:
        clients: dict[Model, Endpoint] = {}
        # writer and judge are often equal: serve the folder once
        for model in dict.fromkeys((writer, judge)):
            url, name, key = model.engine.rstrip("/"), model.name, ""
            if model.is_local:
                served = stack.enter_context(serve_model(
                    Path(model.engine).resolve(),
                    f"--engine {model.engine}: `megatron-sov serve` did not start: ", sleep=stop.sleep))
                url, key, name = served.url, served.key, served.model
            # nobody restarts a local server
            patience_s = min(options.patience, LOCAL_PATIENCE_S) if model.is_local else options.patience
            clients[model] = Endpoint(f"{url}/chat/completions", model.key_env,
                                      EndpointLimits(options.timeout, options.max_attempts, BACKOFF_S, 0.0,
                                                     0.0, 0.0, 0.0, patience_s),
                                      cache, cache_name=model.identity, gate=budget,
                                      sleep=stop.sleep, model=name, key=key, transform=model.build_payload,
                                      report=lambda sentence: print(sentence, flush=True),
                                      accepted_models=None if model.is_local else options.accept_model)
        yield {"writer": clients[writer], "judge": clients[judge]}
