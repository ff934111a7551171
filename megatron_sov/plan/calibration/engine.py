"""`megatron-sov plan RECIPE --cluster P --calibrate-engine URL`: what a step of decoding takes on a server
that runs, beside the roofline of its model and chip.

Some responses are written at a time, so many tokens each; the same again with more tokens each.  What the
second takes longer is steps alone: prompts, connections and queues are in both.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_sov.base.artifacts import to_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import SettingsError
from megatron_sov.model.config import RunConfig
from megatron_sov.plan.calibration.expected import ENGINE_SECONDS, LearnedCorrection, as_json, shipped
from megatron_sov.plan.post_training import EngineCosts, Engines, engines_of, step_s
from megatron_sov.plan.pricing import Pricing
from megatron_sov.plan.speed.parameters import Parameters
from megatron_sov.plan.speed.workload import of_model
from megatron_sov.work.endpoints.answers import BadAnswer, NeverAnswered
from megatron_sov.work.endpoints.token_server import ServerCalls
from megatron_sov.work.endpoints.transport import address_problems, missing_libraries

RUNNING = (1, 4, 16, 64, 256)
"""Responses at a time."""
PROMPT_TOKENS = 128
FEW_TOKENS, MANY_TOKENS = 16, 144
"""Of a response, in the shorter and the longer of two requests."""
REPEATS = 3
"""Of each request; the fastest counts, for what disturbs it only makes it slower."""
LARGEST_ID = 256
"""Of a prompt's tokens: a vocabulary of bytes has so many, and an id beyond its vocabulary ends a server."""
TIMEOUT_S = 600.0
KEY_ENV = "OPENAI_API_KEY"
FASTEST = 0.8
"""Share of the roofline's seconds that no step can be below: then it is another chip or another model."""


class AskedServer(Protocol):
    """A server's calls, or a test's."""

    def ask(self, path: str, payload: Mapping[str, Any]) -> Any:
        """Return the JSON of an answer."""
        ...

    def look(self, path: str) -> Any:
        """Return what it tells of itself."""
        ...


@dataclass(frozen=True)
class MeasuredDecoding:
    """Steps with so many responses at a time."""

    running: int
    context: float
    """Tokens of a response and its prompt in the mean over the steps."""
    step_s: float


def measure(server: AskedServer, model: str, clock: Callable[[], float] = time.perf_counter,
            told: Callable[[str], object] = lambda sentence: None) -> list[MeasuredDecoding]:
    """Return what steps take at each number of responses.

    Args:
        server: that is measured.
        model: as it calls its model.
        clock: seconds.
        told: is given a line for each number.

    Raises:
        UserError: it does not answer as asked.
        BadAnswer: it does not answer; so all here.
    """
    _written(server, model, RUNNING[0], FEW_TOKENS, 0)  # compiles, and allocates its buffers
    found = []
    for running in RUNNING:
        fastest = []
        for num_tokens in (FEW_TOKENS, MANY_TOKENS):
            times_s = []
            for repeat in range(REPEATS):
                began_s = clock()
                _written(server, model, running, num_tokens, repeat)
                times_s.append(clock() - began_s)
            fastest.append(min(times_s))
        took_s = (fastest[1] - fastest[0]) / (MANY_TOKENS - FEW_TOKENS)
        if took_s <= 0:
            raise UserError(f"--calibrate-engine: {MANY_TOKENS} tokens took no longer than {FEW_TOKENS}; the "
                            "server is busy with other requests, or answers from a cache; ask one that is "
                            "idle")
        found.append(MeasuredDecoding(running, PROMPT_TOKENS + (FEW_TOKENS + MANY_TOKENS) / 2, took_s))
        told(f"{running:,} responses at a time: {took_s * 1e3:.3g} ms a step, "
             f"{running / took_s:,.0f} tokens/s")
    return found


def _written(server: AskedServer, model: str, running: int, num_tokens: int, repeat: int) -> None:
    """Have responses written.

    Raises:
        UserError: other ones came than were asked for.
    """
    # another prompt in each request: a prefix cache would read none of the later ones
    drawn = random.Random(f"{running} {num_tokens} {repeat}")
    prompt = [drawn.randrange(LARGEST_ID) for _ in range(PROMPT_TOKENS)]
    answer = _answer(server.ask("/v1/completions", {
        "model": model, "prompt": prompt, "n": running, "max_tokens": num_tokens, "min_tokens": num_tokens,
        "ignore_eos": True, "temperature": 1.0}))
    choices, usage = answer.get("choices"), answer.get("usage")
    written = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if not isinstance(choices, list) or len(choices) != running or written != running * num_tokens:
        raise UserError(f"--calibrate-engine: {running} responses of {num_tokens} tokens were asked for, and "
                        f"{len(choices) if isinstance(choices, list) else 'no'} came with {written} tokens "
                        "together; the server must take `n` and `ignore_eos`, as vLLM and SGLang do")


def _answer(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise UserError("--calibrate-engine: the server's answer is no object of JSON")
    return answer


def served_model(server: AskedServer) -> str:
    """Return the name of the one model of a server.

    Raises:
        UserError: it serves none.
    """
    listed = _answer(server.look("/v1/models")).get("data")
    first = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str):
        raise UserError("--calibrate-engine: the server names no model at /v1/models")
    longest = first.get("max_model_len")
    if isinstance(longest, int) and longest < PROMPT_TOKENS + MANY_TOKENS:
        raise UserError(f"--calibrate-engine: the server takes {longest:,} tokens, and "
                        f"{PROMPT_TOKENS + MANY_TOKENS} are asked for; start it with a larger "
                        "--max-model-len")
    return str(first["id"])


# What the roofline does not tell: some seconds of every step, and some of every response in it.


def fit(engines: Engines, measured: Sequence[MeasuredDecoding], parameters: Parameters) -> EngineCosts:
    """Return the costs that explain measured steps best, in relative error.

    Seconds of a step and seconds of a layer cannot be told apart by one model: they, and those of a message,
    keep their ratio, so that a model of other depth is priced in proportion.

    Raises:
        UserError: steps are faster than the chip can be.
    """
    bare = replace(engines, costs=EngineCosts(step_s=0, layer_s=0, response_s=0, message_s=0))
    roofline = [step_s(bare, one.running, one.context, parameters) for one in measured]
    share = min(one.step_s / least for one, least in zip(measured, roofline, strict=True))
    if share < FASTEST:
        raise UserError(f"--calibrate-engine: a step takes {share:.0%} of the least that {engines.chip.name} "
                        "needs for the recipe's weights; name the recipe of the model that is served, and "
                        "the cluster and --engine-gpus that it runs on")
    # least squares of (a + b n - rest) / seconds: neither a nor b is negative
    weights = [1 / one.step_s ** 2 for one in measured]
    rest = [one.step_s - least for one, least in zip(measured, roofline, strict=True)]
    n = [float(one.running) for one in measured]
    per_step, per_response = _line(weights, n, rest)
    costs, layers = EngineCosts(), engines.shape.num_layers
    of_step = costs.step_s + layers * costs.layer_s + (2 * layers * costs.message_s if engines.tp > 1 else 0)
    factor = per_step / of_step
    return replace(costs, step_s=factor * costs.step_s, layer_s=factor * costs.layer_s,
                   message_s=factor * costs.message_s, response_s=per_response)


def _line(weights: Sequence[float], x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return a and b, neither negative, of the line a + b x with the least sum of weights (a + b x - y)^2."""
    w, wx, wy = sum(weights), _sum(weights, x), _sum(weights, y)
    wxx, wxy = _sum(weights, x, x), _sum(weights, x, y)
    b = (w * wxy - wx * wy) / (w * wxx - wx * wx)
    a = (wy - b * wx) / w
    if a >= 0 and b >= 0:
        return a, b
    # on the edge the better of the two lines with one parameter
    flat, steep = max(0.0, wy / w), max(0.0, wxy / wxx)
    if w * flat ** 2 - 2 * flat * wy <= wxx * steep ** 2 - 2 * steep * wxy:
        return flat, 0.0
    return 0.0, steep


def _sum(weights: Sequence[float], *factors: Sequence[float]) -> float:
    total = 0.0
    for i, weight in enumerate(weights):
        for factor in factors:
            weight *= factor[i]
        total += weight
    return total


def calibrate_engine(config: RunConfig, pricing: Pricing, url: str, num_gpus: int | None, out: Path | None,
                     base: LearnedCorrection | None, told: Callable[[str], object] = print) -> str:
    """Measure a server, write what was learned where `out` says, and return what came of it.

    Args:
        config: a run of the model that is served.
        pricing: the cluster that it is served on.
        url: address up to `/v1`.
        num_gpus: of the server; None: as few as `plan` would take.
        out: file of parameters.
        base: what else the file says; None: what comes with the package.
        told: is given a line for each number of responses.

    Raises:
        UserError: the server does not answer, or its steps are none of this model on this chip.
    """
    if problems := address_problems("--calibrate-engine", url, KEY_ENV):
        raise SettingsError("", problems)
    if missing := missing_libraries():
        raise UserError(missing[0])
    if out is not None:
        check_output("--output", out)
    server = ServerCalls(url, KEY_ENV, TIMEOUT_S)
    try:
        model = served_model(server)
        measured = measure(server, model, told=told)
    except NeverAnswered as e:
        raise UserError(f"--calibrate-engine: {e}") from None
    except (BadAnswer, TimeoutError) as e:
        raise UserError(f"--calibrate-engine: {e}; pass the address of a server that runs, such as "
                        "http://localhost:8000/v1") from None
    engines = engines_of(of_model(config.model), pricing)
    engines = replace(engines, tp=num_gpus or engines.tp)
    costs = fit(engines, measured, pricing.parameters)
    named = {name: getattr(costs, name) for name in ENGINE_SECONDS}
    learned = replace(base or shipped(), engine=named)
    if out is not None:
        write_output(out, to_json(as_json(learned, {
            "by": "megatron-sov plan --calibrate-engine", "served": model, "recipe": config.recipe,
            "gpu": engines.chip.name, "gpus": engines.tp, "steps": [vars(one) for one in measured]})))
    return _text(engines, measured, costs, pricing.parameters, out)


def _text(engines: Engines, measured: Sequence[MeasuredDecoding], costs: EngineCosts, parameters: Parameters,
          out: Path | None) -> str:
    shipped_costs, own = replace(engines, costs=EngineCosts()), replace(engines, costs=costs)
    lines = ["responses    measured  as fitted  as NeMo RL with vLLM (ms a step)"]
    for one in measured:
        fitted, published = (step_s(e, one.running, one.context, parameters) for e in (own, shipped_costs))
        lines.append(f"{one.running:>9,}  {one.step_s * 1e3:>10.2f} {fitted * 1e3:>10.2f} "
                     f"{published * 1e3:>10.2f}")
    where = f"wrote {out}; pass it as --parameters" if out is not None else "pass --output FILE to keep it"
    return "\n".join([*lines, where])
