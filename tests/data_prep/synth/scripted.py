"""Models for tests: an `Ask` whose model is a function of the request."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.synth.generator import Ask, GeneratedSample, Generator, GeneratorItem, T
from data_prep.synth.known import generator_class
from megatron_sov.base.settings import parse_settings
from megatron_sov.work.endpoints.cache import EndpointCache

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from synthesis.endpoint import Replies, completion


class ScriptedDoor:
    """A model that is a function of the request."""

    model = "scripted"

    def __init__(self, reply: Replies) -> None:
        self._reply = reply
        self.requests: list[Mapping[str, Any]] = []

    def key(self, payload: Mapping[str, Any]) -> str:
        return EndpointCache.key("", payload)

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        payload = json.loads(json.dumps(payload))  # as it goes through a wire
        self.requests.append(payload)
        return read(json.loads(json.dumps(completion(self._reply(payload)))))


class ScriptedAsk(Ask):
    """Asks a function, with the real templates.

    Args:
        reply: the model.
        item_id: of the item; part of every seed.
        generator: whose prompts may be asked.
    """

    def __init__(self, reply: Replies, item_id: str = "x", generator: type[Generator] | None = None) -> None:
        self._door = ScriptedDoor(reply)
        super().__init__(item_id, generator.prompts() if generator else {},
                         {"writer": self._door, "judge": self._door})

    @property
    def requests(self) -> list[Mapping[str, Any]]:
        """Return what was asked so far, in order."""
        return self._door.requests

    @property
    def calls(self) -> int:
        """Return how often the model was asked so far."""
        return len(self._door.requests)


def generator(name: str, **settings: Any) -> Generator:
    """Return a generator with settings that are sound."""
    cls = generator_class(name)
    return cls(parse_settings(cls.Settings, settings, name))


def replies_of(*texts: Any) -> Replies:
    """Return a model that says one text after the other, whatever it is asked."""
    left = list(texts)
    return lambda request: left.pop(0)


def by_system(**answers: Any) -> Replies:
    """Return a model whose answer depends on a word of the system message (`_` stands for a blank); a number
    is the grade of the judge."""
    def reply(request: Mapping[str, Any]) -> Any:
        system = request["messages"][0]["content"]
        found = next(answer for word, answer in answers.items() if word.replace("_", " ") in system)
        found = found(request["messages"][-1]["content"]) if callable(found) else found
        return json.dumps({"score": found}) if isinstance(found, (int, float)) else found

    return reply


def samples_of(generator: Generator, item: GeneratorItem, reply: Replies) -> list[GeneratedSample]:
    """Return what a generator makes of one item with a scripted model; its templates are checked first."""
    return list(generator.make(item, ScriptedAsk(reply, item.id, type(generator))))
