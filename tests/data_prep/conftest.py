"""A small tokenizer of each preset, trained once."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest

from data_prep.shards.encode import Encoder
from megatron_sov.base.artifacts import sha256_file

Proof = tuple[bool, str]
PROOFS: dict[str, Proof] = {}


@pytest.fixture(autouse=True)
def each_tokenizer_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packs of one tokenizer share the proof that tiktoken gives its ids,
    which takes longest of a small pack."""
    prove = Encoder.prove_fast

    def prove_once(encoder: Encoder, samples: list[str]) -> Proof:
        known = sha256_file(encoder.file)
        if known not in PROOFS:
            PROOFS[known] = prove(encoder, samples)
        return PROOFS[known]

    monkeypatch.setattr(Encoder, "prove_fast", prove_once)


@pytest.fixture(scope="session")
def tokenizers(run_command: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer artifacts with 384 ids: "solar-open" and "k-exaone"."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(inspect.getsource(textwrap)
                                     + "한국어 문장입니다. 다른 한국어 문장입니다.\n" * 20)
    for preset in ("solar-open", "k-exaone"):
        run_command("train", "--preset", preset, "--vocab-size", "384", "--input", str(folder / "text.txt"),
                    "--output", str(folder / preset), program="sov-tokenizer").check_returncode()
    return {preset: folder / preset for preset in ("solar-open", "k-exaone")}
