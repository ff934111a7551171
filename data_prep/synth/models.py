"""The models of a run: where each is, what it is called, and how it is asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.synth.asking import JUDGE_MAX_TOKENS, Door
from data_prep.synth.budget import Budget
from data_prep.synth.engine import EndpointDoor
from data_prep.synth.generator import MaxTokensField, Role, Threads, Timeout
from data_prep.synth.local_engine import identity_of, serving
from data_prep.synth.stopping import Stop
from megatron_sov.endpoints.addresses import address_problems, is_address
from megatron_sov.endpoints.cache import EndpointCache
from megatron_sov.endpoints.endpoint import Endpoint, Limits
from megatron_sov.endpoints.recognition import CHAT_PROBES, Recognition
from megatron_sov.settings import AtLeastOne, Code, NotNegative, Problem

BACKOFF_S = 1.0
LOCAL_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Model:
    """One model of a run."""

    engine: str
    """Address up to `/v1`, or a folder."""
    model: str
    """As the endpoint calls it; of a folder, empty: its name."""
    key_env: str = ""
    """Variable of the environment with the key; empty: none is sent."""
    input_price: NotNegative = 0.0
    """Of a million tokens that it reads."""
    output_price: NotNegative = 0.0
    """Of a million tokens that it writes."""
    known_as: str = ""
    """What stands for it in what answers are kept by; empty: what follows from the rest."""
    max_tokens_field: MaxTokensField = "max_tokens"
    """What the longest answer stands in, where requests are sent; none: it is not sent."""
    options: tuple[str, str] = field(default=("--engine", "--model"), compare=False)
    """What the command line calls address and name."""

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, which the run serves itself."""
        return not is_address(self.engine)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.model or Path(self.engine).resolve().name

    @property
    def told(self) -> str:
        """What stands in files for where it is."""
        return str(Path(self.engine).resolve()) if self.is_local else self.engine.rstrip("/")

    def problems(self) -> list[Problem]:
        """Return every rule between address and name that is broken, by option."""
        where, name = self.options
        p: list[Problem] = []
        if not self.is_local:
            p += address_problems(where, self.engine, f"{where.replace('engine', 'api-key-env')}")
            if not self.model:
                p.append(Problem(Code.RULE, name, "say which model of the endpoint is asked"))
        elif "://" in self.engine:
            p.append(Problem(Code.RULE, where,
                             "must be an address such as http://localhost:8000/v1, or a folder"))
        return p

    def sent(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a request as the endpoint takes it; what it is kept by stays the same."""
        others = {name: value for name, value in request.items() if name != "max_tokens"}
        if self.max_tokens_field == "none" or "max_tokens" not in request:
            return others
        return {**others, self.max_tokens_field: request["max_tokens"]}

    def identity(self) -> str:
        """Return what stands for the model in what answers are kept by: wherever it is served, its answers
        are its answers."""
        if self.known_as:
            return self.known_as
        if self.is_local:
            return f"local:{identity_of(Path(self.engine), self.options[0])}"
        return f"endpoint:{self.model}"


OTHER_MODEL = ("name another --output, or pass --same-model if only the engine changed; then the kept "
               "answers are used")


@dataclass(frozen=True)
class Asked:
    """How endpoints are asked."""

    threads: Threads
    """Requests at a time."""
    timeout_s: Timeout
    """For an attempt."""
    max_attempts: AtLeastOne
    """For a request."""
    patience_s: NotNegative
    """How long an endpoint that is full or away is waited for."""
    judge_max_tokens: AtLeastOne = JUDGE_MAX_TOKENS
    """Of a judge's answer, with its thoughts."""
    same_model: bool = False
    """Whether endpoints' models are those whose answers are kept though they answer fixed questions
    otherwise."""


@contextlib.contextmanager
def opened(writer: Model, judge: Model, asked: Asked, cache: EndpointCache, budget: Budget, stop: Stop,
           program: Sequence[str] = ()) -> Iterator[dict[Role, Door]]:
    """Yield the doors to both models; a folder is served as long as the context is open."""
    slots = threading.Semaphore(asked.threads)
    limits = (asked.timeout_s, asked.max_attempts, BACKOFF_S, 0.0, 0.0)
    with contextlib.ExitStack() as stack:
        doors: dict[Model, Door] = {}
        for model in dict.fromkeys((writer, judge)):
            url, name, key = model.engine.rstrip("/"), model.name, ""
            if model.is_local:
                served = stack.enter_context(serving(Path(model.engine), list(program), stop))
                url, name, key = served.url, served.model, served.key
            # a server of this machine that answers nobody has ended, and nobody starts it again
            patience_s = min(asked.patience_s, LOCAL_PATIENCE_S) if model.is_local else asked.patience_s
            endpoint = Endpoint(f"{url}/chat/completions", model.key_env,
                                Limits(*limits, model.input_price, model.output_price, patience_s),
                                cache, known_as=model.identity(), gate=budget, sleep=stop.sleep,
                                told=lambda sentence: print(sentence, flush=True), key=key,
                                sent=model.sent,
                                recognition=None if model.is_local else Recognition(
                                    name, CHAT_PROBES, OTHER_MODEL, asked.same_model))
            doors[model] = EndpointDoor(endpoint, name, slots, stop, patience_s)
        yield {"writer": doors[writer], "judge": doors[judge]}
