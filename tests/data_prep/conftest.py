"""Packs of one tokenizer share a proof."""

import pytest

from data_prep.shards.encode import Encoder
from megatron_sov.base.artifacts import sha256_file

Proof = tuple[bool, str]
PROOFS: dict[str, Proof] = {}


@pytest.fixture(autouse=True)
def each_tokenizer_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove once per tokenizer that tiktoken gives its ids: the
    proof takes most of the time of a small pack."""
    prove = Encoder.prove_fast

    def prove_once(encoder: Encoder, samples: list[str]) -> Proof:
        known = sha256_file(encoder.file)
        if known not in PROOFS:
            PROOFS[known] = prove(encoder, samples)
        return PROOFS[known]

    monkeypatch.setattr(Encoder, "prove_fast", prove_once)
