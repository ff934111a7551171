"""Log-probabilities of packed documents by a reference model, computed once before the first training step.

The reference is the initial model, or another checkpoint that computes the numbers before the run starts; no
second model stays in memory. RUN/reference contains the log-probabilities in parts of `PART_DOCUMENTS`
documents: a killed job continues at the next part, and a resumed run reads the existing parts.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import format_json, manifest_sha256, translate_disk_errors, write_atomically
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.sealed import find_seal_damage, write_sealed
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.infer.engines.load import run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import RunConfig, layout_settings
from megatron_sov.post.document_logprobs import RunningLogprobs, score_documents
from megatron_sov.runs.checkpoints import hash_checkpoint_files
from megatron_sov.runs.folder import REFERENCE
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.token_shards import Documents, DocumentView
from megatron_sov.train.guards.gate import GateView
from megatron_sov.work.progress.progress_bar import create_bar

IDENTITY = "reference.json"
"""File in RUN/reference with digests of the reference and the data, and the sample length."""
COLUMN = "reference_logprobs"
"""Column: log p(label) by the reference."""
PART_DOCUMENTS = 4096
"""Documents per part, a file."""


class Reference:
    """Computes a run's column `COLUMN` before the first step."""

    def __init__(self, run: Path, start: Path, sources: Sequence[Source], max_tokens: int,
                 heldout: Mapping[str, range] = MappingProxyType({})) -> None:
        """Describe the sources, without computing log-probabilities.

        Args:
            run: folder of the run.
            start: checkpoint of the reference.
            sources: preferences.
            max_tokens: length of the longest sample; later tokens of a document get no log-probability.
            heldout: source -> indices of the first held-out documents, which the run measures.
        """
        self._folder, self._max_tokens = run / REFERENCE, max_tokens
        self._identity: dict[str, Any] = {
            "reference_sha256": hash_checkpoint_files(start), "max_tokens": max_tokens,
            "data_sha256": {s.name: manifest_sha256(s.artifact) for s in sources if s.artifact is not None}}
        self._files = {s.name: ReferenceFiles(self._folder, s.name, s.open_split("train")) for s in sources}
        self.sources = tuple(dataclasses.replace(
            s, train_documents=ReferencedDocuments(self._files[s.name])) for s in sources)
        """Sources with the column `COLUMN`; `score_heldout` computes the values."""
        self._heldout = {s.name: ReferenceFiles(self._folder, f"{s.name}.heldout", s.open_split("heldout"),
                                                len(heldout[s.name]))
                         for s in sources if heldout.get(s.name)}
        # Held-out documents are computed and checked like training documents.
        self._files |= {f"{name}.heldout": files for name, files in self._heldout.items()}

    def heldout_logprobs(self, source: Source) -> np.ndarray | None:
        """Return log p for the tokens of a source's measured held-out documents, float32; None without
        held-out documents."""
        files = self._heldout.get(source.name)
        return None if files is None else files.read_all()

    def score_heldout(self, view: GateView) -> None:
        """Compute missing parts by the trained model, whose weights must equal the reference; called by all
        processes. Raises `UserError`: RUN/reference belongs to another reference, or the disk is full."""
        begin_s = time.monotonic()
        num_parts, num_tokens = self._compute_missing(view, view.config.train.micro_batch_size)
        view.events.write("reference", parts=num_parts, tokens=num_tokens,
                          seconds=time.monotonic() - begin_s, **self._identity)

    def score_in_processes(self, checkpoint: Path, config: RunConfig, nproc: int | None) -> None:
        """Compute missing parts by `checkpoint`, on processes that end before the run begins.

        Args:
            checkpoint: the reference.
            config: settings of the run; the reference uses the same layout and precision.
            nproc: local processes.

        Raises:
            UserError: RUN/reference belongs to another reference, a document is too long for `checkpoint`, or
                the disk is full.
        """
        if self._read_identity() == self._identity and not self._find_missing():
            return
        target = Target(checkpoint, False)
        self._refuse_too_long(target)
        run_forward_model(target, layout_settings(config), nproc,
                          lambda loaded: self._compute_missing(loaded, config.train.micro_batch_size))

    def _refuse_too_long(self, target: Target) -> None:
        for name, files in self._files.items():
            lengths = files.documents.lengths
            longest = min(int(np.asarray(lengths[np.arange(len(lengths))]).max(initial=0)), self._max_tokens)
            if longest > target.max_tokens:
                raise UserError(f"--reference {target.path}: reads at most {target.max_tokens} tokens, and "
                                f"source {name!r} has samples of {longest}; name another model, or make "
                                "samples shorter (data.phases)")

    def _find_missing(self) -> list[tuple[str, int]]:
        """Return (source, part) of missing and damaged parts, and warn about damaged parts."""
        missing: list[tuple[str, int]] = []
        for name, files in self._files.items():
            for part in range(len(files)):
                if damage := files.find_damage(part):
                    missing.append((name, part))
                    if files.get_file(part).exists():
                        warn(f"{damage}; it is computed again")
        return missing

    def _compute_missing(self, model: RunningLogprobs, rows_per_batch: int) -> tuple[int, int]:
        """Compute and write the missing parts; return part and token counts."""
        # IDENTITY is written before the first part, because the checksum of a part covers IDENTITY.
        run_on_main(model.world, self._open_files)
        # Rank 0 decides: processes with different lists would wait in a collective forever.
        missing, num_tokens = run_on_main(model.world, self._find_missing), 0
        with create_bar("reference", len(missing), "part", model.world.is_main) as bar:
            for name, part in missing:
                files = self._files[name]
                numbers = score_documents(model, files.documents, files.find_range(part), self._max_tokens,
                                          rows_per_batch)
                run_on_main(model.world, partial(write_sealed, files.get_file(part), numbers.tobytes(),
                                                 files.identify(part)))
                num_tokens += len(numbers)
                bar.update(1)
        return len(missing), num_tokens

    def check_unchanged(self) -> None:
        """Check that a resumed run, whose weights differ from the reference by now, has every part. Raises
        `UserError`: the data changed, samples became longer, or a part is missing or damaged."""
        file, identity = self._folder / IDENTITY, self._read_identity()
        data, max_tokens = identity.get("data_sha256", {}), identity.get("max_tokens", 0)
        changed = [name for name, sha256 in self._identity["data_sha256"].items() if data.get(name) != sha256]
        if changed:
            raise UserError(f"{file}: holds no log-probabilities of source {changed[0]!r} as it is now; "
                            "resume with the earlier data, or start a new --run --from the last checkpoint")
        if max_tokens < self._identity["max_tokens"]:
            raise UserError(f"{file}: its log-probabilities reach to token {max_tokens} of a document, and "
                            f"samples have {self._identity['max_tokens']} (data.phases); resume with samples "
                            "of at most that length, or start a new --run --from the last checkpoint")
        for files in self._files.values():
            for part in range(len(files)):
                if damage := files.find_damage(part):
                    raise UserError(f"{damage}; the run no longer has the weights that computed it: "
                                    "start a new --run --from the last checkpoint")

    def _open_files(self) -> None:
        file = self._folder / IDENTITY
        if file.is_file():
            if self._read_identity() != self._identity:
                raise UserError(f"{file}: belongs to another reference, other data or other lengths of "
                                "samples; delete the folder, and its files are computed again")
            return
        with translate_disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, format_json(self._identity))

    def _read_identity(self) -> dict[str, Any]:
        file = self._folder / IDENTITY
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (ValueError, TypeError, RecursionError) as e:
            raise UserError(f"{file}: is damaged ({e}); delete the folder") from None


class ReferenceFiles:
    """Log-probabilities for the documents in a split: float32 files with log p per token as a label, 0 for
    the first token in a document."""

    def __init__(self, folder: Path, name: str, documents: Documents,
                 num_documents: int | None = None) -> None:
        """Prepare, without reading a file.

        Args:
            folder: RUN/reference.
            name: name of source and split, the prefix of the files.
            documents: documents of the split.
            num_documents: number of scored documents, the first ones; None: all.
        """
        self._folder, self._name, self.documents = folder, name, documents
        self._num_documents = len(documents.lengths) if num_documents is None else num_documents
        self._open = lru_cache(maxsize=64)(self._open_part)
        self._verified: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the files again
        return ReferenceFiles, (self._folder, self._name, self.documents, self._num_documents)

    def __len__(self) -> int:
        return -(-self._num_documents // PART_DOCUMENTS)

    def get_file(self, part: int) -> Path:
        return self._folder / f"{self._name}.{part:06d}.f32"

    def find_range(self, part: int) -> range:
        return range(part * PART_DOCUMENTS, min((part + 1) * PART_DOCUMENTS, self._num_documents))

    def compute_offsets(self, part: int) -> np.ndarray:
        """Return the first token of each document in a part, and the end, as [documents + 1] int64."""
        lengths = self.documents.lengths[np.asarray(self.find_range(part))]
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def read_logprobs(self, document: int, start: int, count: int) -> np.ndarray:
        """Return log p for `count` tokens in a document from `start`, float32. Raises `UserError`: the file
        is missing or damaged."""
        part, index = divmod(document, PART_DOCUMENTS)
        offsets, part_logprobs = self._open(part)
        first = offsets[index] + start
        logprobs: np.ndarray = part_logprobs[first:first + count]
        return logprobs

    def read_all(self) -> np.ndarray:
        """Return log p for the tokens of all documents, concatenated; errors as in `read_logprobs`."""
        return np.concatenate([self._open(part)[1] for part in range(len(self))])

    def find_damage(self, part: int) -> str | None:
        """Return the problem if a part's file is missing or damaged, otherwise None."""
        return find_seal_damage(self.get_file(part), self.identify(part))

    def identify(self, part: int) -> str:
        """Return the text that a part's checksum covers: the content of `IDENTITY` and the file name."""
        file = self._folder / IDENTITY
        identity = file.read_text(encoding="utf-8") if file.is_file() else ""
        return f"{identity}{self.get_file(part).name}"

    def _open_part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        offsets = self.compute_offsets(part)
        # Verified once per process, because the checksum reads the whole file.
        if part not in self._verified and (damage := self.find_damage(part)):
            raise UserError(f"{damage}; start the run again in another folder")
        self._verified.add(part)
        count = int(offsets[-1])
        if not count:
            return offsets, np.zeros(0, np.float32)  # an empty file cannot be mapped
        return offsets, np.memmap(self.get_file(part), np.float32, "r", shape=(count,))


class ReferencedDocuments(DocumentView):
    """Documents in a split, with the column `COLUMN`."""

    def __init__(self, files: ReferenceFiles) -> None:
        super().__init__(files.documents, files.documents.is_plain)
        self._files, self.lengths = files, files.documents.lengths
        self.columns = (*self.columns, COLUMN)

    def __reduce__(self) -> tuple[Any, ...]:
        return ReferencedDocuments, (self._files,)

    def locate(self, document: int) -> tuple[Documents, int, int]:
        return self._documents, document, 0

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        if name == COLUMN:
            return self._files.read_logprobs(document, start, count)
        return super().column(name, document, start, count)
