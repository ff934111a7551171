"""Fixtures: the program `sov-data`, and a check of tiktoken's ids once per tokenizer instead of in every
`sov-data pack`."""

import pytest

from data_prep import cli
from data_prep.shards.encode import Encoder
from megatron_sov.base.artifacts import sha256_file
from tests.command_output import Main

Proof = tuple[bool, str]
"""Result of `Encoder.prove_fast`."""
PROOFS: dict[str, Proof] = {}
"""Hash of a tokenizer file -> its proof."""


@pytest.fixture
def cli_main() -> Main:
    return cli.main


@pytest.fixture(autouse=True)
def each_tokenizer_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache `Encoder.prove_fast`, a comparison with tiktoken that takes most of the time of a small pack."""
    prove = Encoder.prove_fast

    def prove_once(encoder: Encoder, samples: list[str]) -> Proof:
        digest = sha256_file(encoder.file)
        if digest not in PROOFS:
            PROOFS[digest] = prove(encoder, samples)
        return PROOFS[digest]

    monkeypatch.setattr(Encoder, "prove_fast", prove_once)
