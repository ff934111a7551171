"""What a run's folder is made with: the same command goes on in it, another one is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.synth.candidates import CANDIDATES, PARTS, RUN
from data_prep.synth.generator import Generator
from data_prep.synth.models import Model
from data_prep.synth.templates import Prompt
from megatron_sov.artifacts import atomic_write, disk_errors, to_json
from megatron_sov.digests import file_digest
from megatron_sov.errors import UserError, list_problems
from megatron_sov.outputs import refuse_nowhere
from megatron_sov.work.journal import differences

ANSWERS = "answers.sqlite"
_DECIDES = ("generator", "version", "settings", "model", "judge", "identity", "judge_identity",
            "template_digests", "files", "judge_max_tokens")
"""What samples depend on, besides items and answers."""
_BEFORE = {"judge_max_tokens": 1024}
"""What was so in folders of versions that could not set it."""


@dataclass(frozen=True)
class Identity:
    """What stands in `run.json`."""

    generator: str
    """Its name."""
    version: int
    """Of the generator."""
    kind: str
    """Form of its records."""
    settings: Mapping[str, Any]
    """Of the generator, defaults filled in."""
    model: str
    """Of the writer, as its endpoint calls it."""
    engine: str
    """Its address, or its folder."""
    identity: str
    """What stands for it in what answers are kept by."""
    judge: str
    """As `model`, of the judge."""
    judge_engine: str
    """As `engine`."""
    judge_identity: str
    """As `identity`."""
    templates: Mapping[str, int]
    """Name -> version."""
    template_digests: Mapping[str, str]
    """Name -> hash of its text."""
    files: Mapping[str, str]
    """File beside the input -> hash."""
    inputs: tuple[str, ...]
    """As they were given."""
    input_price: float
    """Of a million tokens that the writer reads."""
    output_price: float
    """Of a million tokens that it writes."""
    judge_max_tokens: int
    """Of a judge's answer."""

    @staticmethod
    def of(generator: Generator, prompts: Mapping[str, Prompt], writer: Model, judge: Model,
           inputs: tuple[Path, ...], judge_max_tokens: int) -> Identity:
        """Return what a run is made with; raises UserError where a model's folder cannot be read."""
        settings = json.loads(to_json(asdict(generator.settings)))
        return Identity(
            generator.name, generator.version, generator.kind, settings,
            writer.name, writer.told, writer.identity(), judge.name, judge.told, judge.identity(),
            {name: prompt.version for name, prompt in prompts.items()},
            {name: prompt.digest for name, prompt in prompts.items()},
            {str(file): file_digest(file) for file in generator.files()},
            tuple(map(str, inputs)), writer.input_price, writer.output_price, judge_max_tokens)

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """Return what differs from an earlier command's, in what samples depend on."""
        now = json.loads(to_json(asdict(self)))
        return differences({name: before.get(name, _BEFORE.get(name)) for name in _DECIDES},
                           {name: now[name] for name in _DECIDES})


def check_folder(output: Path) -> None:
    """Raise `UserError` where a run cannot have its folder: it is something else's."""
    refuse_nowhere(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    if output.exists() and any(output.iterdir()) and not (output / RUN).is_file():
        raise UserError(f"--output {output}: exists and is no folder of `sov-data synth`; choose another one")


def read_before(output: Path) -> dict[str, Any] | None:
    """Return what the folder's last command was made with; None for a new folder."""
    try:
        said = json.loads((output / RUN).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{output / RUN}: is damaged ({type(e).__name__}); restore it from a copy, or name "
                        "another output folder") from None
    return said if isinstance(said, dict) else {}


def settle(output: Path, identity: Identity, redo: bool) -> None:
    """Take the folder for this command.

    Args:
        output: the folder.
        identity: what the command makes items with.
        redo: whether items that are done are made again; their answers stay.

    Raises:
        UserError: its items were made with something else, and `redo` is not asked for.
    """
    before = read_before(output)
    has_begun = any((output / CANDIDATES).glob(PARTS)) or (output / ANSWERS).exists()
    # a command that stopped at its input has made nothing that other settings could contradict
    changed = identity.differences(before) if before is not None and has_begun else []
    if changed and not redo:
        raise UserError(list_problems(
            f"--output {output}: was made with other settings", changed,
            "name another folder, or pass --redo: its items are made again, and answers that still fit cost "
            "nothing"))
    with disk_errors(output):
        if redo:
            for part in (output / CANDIDATES).glob(PARTS):
                part.unlink()
        atomic_write(output / RUN, to_json(asdict(identity)))
