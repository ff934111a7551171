"""A generator for tests: two answers to each line of a file, judged; run, it is `sov-data` that knows it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.cli import main
from data_prep.json_lines import read_objects
from data_prep.synth import known
from data_prep.synth.generator import Ask, GeneratedSample, Generator, GeneratorItem, Grade, SampleVerdict

NAME, REFERENCE = "echoes", f"{Path(__file__).stem}:Echoes"


@dataclass(frozen=True)
class Settings:
    """How lines are repeated."""

    tone: str = "plain"
    """Of the repetition."""
    min_score: Grade = 5.0
    """Of the judge."""


class Echoes(Generator):
    """Repeats lines."""

    name, kind, help, Settings = NAME, "text", "repeat lines", Settings
    prompts_file = Path(__file__).with_suffix(".yaml")

    def items(self, inputs: Sequence[Path]) -> Iterator[GeneratorItem]:
        for path in inputs:
            for where, record in read_objects(path):
                yield GeneratorItem(str(record["id"]), {"text": record["text"]}, where, "CC0")

    def make(self, item: GeneratorItem, ask: Ask) -> Iterator[GeneratedSample]:
        text = item.fields["text"]
        if text == "defect":
            raise KeyError("nobody thought of it")
        for number, reply in enumerate(ask("echoes/write", count=2, max_tokens=50, document=text,
                                           tone=self.settings.tone)):
            score = ask.judge("Is it the same?", {"line": text, "echo": reply.text})
            yield GeneratedSample({"text": reply.text}, (SampleVerdict("cut", not reply.is_cut),
                                                         SampleVerdict("judge",
                                                                       score >= self.settings.min_score)),
                                  notes={"score": score, "number": number})


def reply(request: Mapping[str, Any]) -> str:
    """Return what the scripted model says."""
    system, user = (message["content"] for message in request["messages"])
    if "You grade" in system:
        return json.dumps({"reason": "it is", "score": 2 if "bad" in user else 8})
    return f"{user.partition(': ')[2]} ({request['seed']})"


def add_generator(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let `sov-data` know the generator by its name."""
    packaged = known._packaged
    set_attribute(known, "FILES", (*known.FILES, NAME))
    set_attribute(known, "_packaged", lambda name: Echoes if name == NAME else packaged(name))


if __name__ == "__main__":
    add_generator()
    sys.exit(main())
