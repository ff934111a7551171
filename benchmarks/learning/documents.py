"""Documents for pretraining: random shares of a corpus, junk and a filter for it, and text that a model
wrote: `documents.py:DocumentShare`, `:WithJunk`, `:JunkLabels`, `:ScorerPipeline`, `:Openings`,
`:WrittenText`, `:DifficultyRows`."""

import base64
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import draw_fixed

HELD_OUT_SHARE = 0.1
"""Share of the documents that `DocumentShare` holds out, the same for every seed."""
LABELLED_SHARE = 0.2
"""Share of the documents that only `JunkLabels` returns."""
OPENING_CHARS, MIN_LINE_CHARS = 8, 24


@dataclass(frozen=True)
class DocumentShare:
    """A random share of the training documents, or the held-out documents."""

    seed: int = 0
    share: float = 0.0
    """0: the held-out documents."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row's text, or None if the document is not selected."""
        text = row["text"]
        is_held_out = draw_fixed(f"judged {text}") < HELD_OUT_SHARE
        is_selected = not is_held_out and draw_fixed(f"{self.seed} {text}") < self.share
        return {"text": text} if is_selected or (is_held_out and not self.share) else None


def write_junk(text: str) -> str:
    """Return junk of about the length of a text; the text's hash chooses one of four kinds."""
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    lines: list[str] = []
    kind, num_chars = rng.randrange(4), 0
    first_line = text.strip().split("\n")[0][:80]
    words = text.split() or ["-"]
    while num_chars < len(text):
        if kind == 0:
            line = f"{first_line} ({len(lines)})"
        elif kind == 1:
            line = (f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)} - - "
                    f"\"GET /{rng.choice('abc')}/{rng.randrange(10**6)} HTTP/1.1\" "
                    f"{rng.choice([200, 304, 404])} {rng.randrange(9999)}")
        elif kind == 2:
            line = base64.b64encode(rng.randbytes(54)).decode()
        else:
            line = " ".join(rng.choices(words, k=12))
        lines.append(line)
        num_chars += len(line) + 1
    return "\n".join(lines)


def is_labelled(row: Mapping[str, Any]) -> bool:
    return draw_fixed(f"label {row['text']}") < LABELLED_SHARE


@dataclass(frozen=True)
class WithJunk:
    """A document and as much junk, except for labelled documents."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [] if is_labelled(row) else [{"text": row["text"]}, {"text": write_junk(row["text"])}]


@dataclass(frozen=True)
class JunkLabels:
    """A labelled document with the label 1, and junk with the label 0."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        if not is_labelled(row):
            return []
        return [{"text": row["text"], "label": 1}, {"text": write_junk(row["text"]), "label": 0}]


@dataclass(frozen=True)
class ScorerPipeline:
    """A pipeline file for `sov-data run` that keeps documents with a high score."""

    raw: str
    """JSONL file of documents."""
    scorer: str
    """Folder that `sov-data scorer train` wrote."""
    step: str
    """quality or education."""
    min_score: float

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": "filter", "sources": [{"name": "raw", "path": self.raw, "kind": "en"}],
                "steps": [{self.step: {"model": self.scorer, "min_score": self.min_score}}],
                "output": {"name": "{source}"}}


@dataclass(frozen=True)
class Openings:
    """Prompts with the first characters of each line of a document that is long enough."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"prompt": line.strip()[:OPENING_CHARS]} for line in row["text"].split("\n")
                if len(line.strip()) >= MIN_LINE_CHARS]


@dataclass(frozen=True)
class WrittenText:
    """The document of a row of `megatron-sov generate --output`: its prompt and response."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": row["prompt"] + row["response"]}


@dataclass(frozen=True)
class DifficultyRows:
    """A row of `megatron-sov eval passk` as a problem with one answer for `sov-data difficulty label`."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"problem_id": f"{row['prompt_index']}-{row['sample']}", "prompt": row["prompt"],
                "num_right": int(row["reward"]), "num_answers": 1}
