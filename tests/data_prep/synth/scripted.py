"""Scripted models: a `Requester` whose model is a function of the request."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from data_prep.synth.declared.generator import Generator, GeneratorDefinition, load_generator
from data_prep.synth.requests import Requester
from data_prep.synth.samples import GeneratedSample, GeneratorItem
from megatron_sov.base.settings import parse_settings
from megatron_sov.work.endpoints.cache import EndpointCache

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from synthesis.endpoint import Replies, completion

T = TypeVar("T")


class ScriptedClient:
    """A model that is a function of the request."""

    model = "scripted"

    def __init__(self, reply: Replies) -> None:
        self._reply = reply
        self.requests: list[Mapping[str, Any]] = []

    def key(self, payload: Mapping[str, Any]) -> str:
        return EndpointCache.key("", payload)

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        payload = json.loads(json.dumps(payload))  # as it arrives over HTTP
        self.requests.append(payload)
        return read(json.loads(json.dumps(completion(self._reply(payload)))))


class ScriptedRequester(Requester):
    """Sends requests to a function, with the real templates.

    Args:
        reply: the model.
        item_id: of the item; part of every seed.
        definition: of the generator whose prompts may be asked.
    """

    def __init__(self, reply: Replies, item_id: str = "x",
                 definition: GeneratorDefinition | None = None) -> None:
        self._client = ScriptedClient(reply)
        super().__init__(item_id, definition.prompts if definition else {},
                         {"writer": self._client, "judge": self._client})

    @property
    def requests(self) -> list[Mapping[str, Any]]:
        """Return the requests in order."""
        return self._client.requests

    @property
    def calls(self) -> int:
        """Return the number of requests."""
        return len(self._client.requests)


def build_generator(name: str, **settings: Any) -> Generator:
    """Return a generator with settings that are sound."""
    definition = load_generator(name)
    return Generator(definition, parse_settings(definition.Settings, settings, name))


def build_queue_model(*texts: Any) -> Replies:
    """Return a model that replies with the given texts in order."""
    left = list(texts)
    return lambda request: left.pop(0)


def build_model(**answers: Any) -> Replies:
    """Return a model whose reply depends on a phrase in the system message (`_` stands for a space). A number
    is the judge's grade; a function receives the user's message."""
    def reply(request: Mapping[str, Any]) -> Any:
        system = request["messages"][0]["content"]
        answer = next(answer for phrase, answer in answers.items() if phrase.replace("_", " ") in system)
        if callable(answer):
            answer = answer(request["messages"][-1]["content"])
        return json.dumps({"score": answer}) if isinstance(answer, (int, float)) else answer

    return reply


def collect_samples(generator: Generator, item: GeneratorItem, reply: Replies) -> list[GeneratedSample]:
    """Return the samples that a generator makes of one item with a scripted model and its real prompts."""
    requester = ScriptedRequester(reply, item.id, generator.definition)
    return list(generator.make_samples(item, requester))
