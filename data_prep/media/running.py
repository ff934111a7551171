"""A run of `sov-data encode-media` from what was asked for to the artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.libraries import require
from data_prep.media.finishing import KIND, finish
from data_prep.media.settings import MediaSettings
from data_prep.media.units import Unit, UnitEncoder, plan
from megatron_sov.artifacts import refuse_existing
from megatron_sov.errors import UserError
from megatron_sov.media.vocabulary import AUDIO, IMAGE, VIDEO
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.outputs import refuse_nowhere
from megatron_sov.settings import Code, Problem, SettingsError, as_problem
from megatron_sov.work.arrays import refuse_living
from megatron_sov.work.folders import slurm_folder, work_folder
from megatron_sov.work.parts import open_parts

MADE_BY = "sov-data encode-media"
SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Order:
    """What a command was asked for."""

    inputs: tuple[Path, ...]
    """Files of records, or folders of them."""
    output: Path
    """The artifact."""
    settings: MediaSettings
    """How media are encoded."""
    threads: int
    """Processes that decode, each asked by a thread."""
    overwrite: bool = False
    """Whether an artifact that is there is replaced."""

    @property
    def work(self) -> Path:
        """Hidden folder beside the output that keeps complete units until the output is."""
        return work_folder(self.output)

    @property
    def slurm(self) -> Path:
        """Hidden folder beside the output with the logs of Slurm's jobs, which outlive the work."""
        return slurm_folder(self.output)

    def files(self) -> list[Path]:
        """Return the files of records, in order.

        Raises:
            UserError: there are none.
        """
        found: list[Path] = []
        for path in self.inputs:
            if path.is_file():
                found.append(path)
                continue
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"--input {path}: holds no file of records ({' or '.join(SUFFIXES)}); name "
                                "one")
            found += inside
        return found

    def ready(self) -> list[Unit]:
        """Return the units, with nothing in the way of making them.

        Raises:
            UserError: settings, paths or the output are.
        """
        p = [*map(as_problem, require("it", "PIL", "soundfile", "scipy", extra="omni")),
             *(Problem(Code.FILE, "--input", "does not exist", path, "check the path")
               for path in self.inputs if not path.exists())]
        if not self.settings.media_root.is_dir():
            p.append(Problem(Code.FILE, "--media-root", "is no folder", self.settings.media_root,
                             "name the one that paths in the records begin from"))
        if p:
            raise SettingsError("", p)
        refuse_existing(self.output, KIND, self.overwrite)
        refuse_nowhere(self.output)
        units = list(plan(self.files()))
        if not units:
            raise UserError("--input: holds no records; write one JSON object per line")
        return units


def run_order(order: Order) -> dict[str, Any]:
    """Encode what is not encoded, and write the artifact; returns the manifest's content.

    Raises:
        UserError: records, media, settings or the disk are in the way; what is done is kept.
    """
    units = order.ready()
    encoder = UnitEncoder(order.settings, order.work, order.threads)
    with open_parts(order.output, MADE_BY):
        refuse_living(order.slurm)
        try:
            encode_units(encoder, units, shows=True)
        finally:
            encoder.close()
        return finished(order, units, encoder.identity)


def encode_units(encoder: UnitEncoder, units: list[Unit], *, shows: bool) -> None:
    """Make units that are not there."""
    with work_bar("encoding", len(units), "unit", shows) as bar:
        for unit in units:
            encoder.encode(unit)
            bar.update(1)


def finished(order: Order, units: list[Unit], identity: str) -> dict[str, Any]:
    """Write the artifact, and print what it holds."""
    content = finish(order.settings, units, identity, order.work, order.output, overwrite=order.overwrite)
    media = content["num_media"]
    print(f"{content['num_records']:,} records of kind {content['format']} with {media[IMAGE]:,} pictures, "
          f"{media[AUDIO]:,} sounds and {media[VIDEO]:,} videos")
    if content["num_bad"]:
        listed = ", ".join(f"{count:,} {code}" for code, count in content["num_bad"].items())
        print(f"left out: {listed}; see bad_media.jsonl")
    print(f"wrote {order.output}; pack it with `sov-data pack --format {content['format']} --input "
          f"{order.output} ...`")
    return content
