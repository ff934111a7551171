"""Trees of hashes and the paths in them are those of RFC 6962."""

from __future__ import annotations

import hashlib

import pytest

from megatron_sov.audit.merkle import inclusion_path, merkle_root, root_by_path

RFC_LEAVES = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")]
"""Of Certificate Transparency's own tests."""


def test_the_root_is_that_of_rfc_6962() -> None:
    """The vectors of Certificate Transparency's own tests (merkle_tree_test.cc)."""
    leaves = RFC_LEAVES
    assert merkle_root([]) == hashlib.sha256(b"").hexdigest()
    assert merkle_root(leaves[:1]) == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert merkle_root(leaves[:3]) == "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"
    assert merkle_root(leaves) == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


@pytest.mark.parametrize(("index", "size", "path"), [
    (0, 1, ()),
    (0, 8, ("96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4")),
    (5, 8, ("bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7")),
    (2, 3, ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",)),
    (1, 5, ("6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"))])
def test_paths_are_those_of_certificate_transparency(index: int, size: int, path: tuple[str, ...]) -> None:
    """The vectors of its own tests (merkle_tree_test.cc, kPaths)."""
    assert inclusion_path(RFC_LEAVES[:size], index) == list(path)


def test_a_path_leads_to_the_root_of_its_own_leaf_and_tree_alone() -> None:
    leaves = [bytes([i]) for i in range(19)]
    for size in range(1, 20):
        root = merkle_root(leaves[:size])
        for index in range(size):
            path = inclusion_path(leaves[:size], index)
            assert root_by_path(leaves[index], index, size, path) == root
            assert size == 1 or root_by_path(b"x", index, size, path) != root
            with pytest.raises(ValueError, match="too long"):
                root_by_path(leaves[index], index, size, [*path, "00" * 32])
            for other in {(index + 1) % size, 0} - {index}:
                try:
                    assert root_by_path(leaves[index], other, size, path) != root
                except ValueError as e:
                    assert "its path is too" in str(e)
