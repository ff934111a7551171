"""Expert routes in token shards: written as a sidecar file, memory-mapped, and packed into rows with their
tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.documents.shard_files import IndexedWriter, RouteShape
from megatron_sov.base.errors import UserError
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.requirements import build_route_shape, check_routes_and_encoders
from megatron_sov.train.data.rows import build_row, join_rows
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.data.streams import PackedSegment

MODEL = recipes.get("tiny-k-exaone").model
LENGTHS = (3, 5, 4)


def build_routes(document: int, shape: RouteShape) -> np.ndarray:
    """Return routes that encode document and token: expert (document + token + layer) and the following
    ones."""
    token, layer, rank = np.ogrid[:LENGTHS[document] - 1, :shape.layers, :shape.top_k]
    return ((document + token + layer + rank) % shape.num_experts).astype(shape.dtype)


def write_shards(folder: Path, shape: RouteShape, **changes: Any) -> Path:
    """Write token shards with routes; `changes` modifies the manifest."""
    with create_artifact(folder, "tokens") as artifact:
        for split in ("train", "heldout"):
            with IndexedWriter(artifact.path / split, "uint16", {"routes": shape.dtype}) as writer:
                for document, length in enumerate(LENGTHS):
                    tokens = np.arange(length, dtype=np.uint16) + 10 * (document + 1)
                    rows = np.concatenate([build_routes(document, shape), shape.build_unrecorded(1)])
                    writer.write(np.array([length], np.int32), {"bin": tokens, "routes": rows.reshape(-1)})
        splits = {split: {"shards": [{"prefix": split}], "num_tokens": sum(LENGTHS)}
                  for split in ("train", "heldout")}
        artifact.content = {
            "content_version": 2, "tokenizer_sha256": "t" * 64, "vocab_size": 50, "sources": [
                {"name": "rollouts", "format": "text", "sidecars": ["routes"],
                 "routes": shape.record() | changes, "splits": splits}]}
    return folder


def test_routes_are_packed_with_their_tokens(tmp_path: Path) -> None:
    shape = build_route_shape(MODEL)
    assert (shape.layers, shape.top_k, shape.num_experts) == (
        MODEL.num_layers - MODEL.num_dense_layers, MODEL.num_experts_per_token, MODEL.num_experts)
    folder = write_shards(tmp_path / "data", shape)
    assert (folder / "train.routes").stat().st_size == sum(LENGTHS) * shape.bytes_per_token
    (source,) = open_sources({str(folder): 1.0}, 64)
    assert (source.routes, source.columns) == (shape, ())
    check_routes_and_encoders([source], MODEL)
    documents = source.open_split("train")
    row = build_row(OrderedSample(0, (PackedSegment(1, 2, 3), PackedSegment(0, 0, 2))), documents, 7,
                    routes=source.routes)
    assert row.routes is not None and row.routes.shape == (7, shape.layers, shape.top_k)
    assert row.tokens[:5].tolist() == [22, 23, 24, 10, 11]
    no_routes = shape.build_unrecorded(1)
    # A document's last token was generated and never read, so it has no routes; neither has padding.
    assert np.array_equal(row.routes, np.concatenate([
        build_routes(1, shape)[2:], no_routes, build_routes(0, shape)[:2], no_routes, no_routes]))
    row_without_routes = build_row(OrderedSample(0, (PackedSegment(2, 0, 4),)), documents, 4)
    assert row_without_routes.routes is None
    assert join_rows([row_without_routes, row_without_routes]).routes is None
    joined = join_rows([row_without_routes, row]).routes
    assert joined is not None and (joined[:4] == shape.mark).all() and np.array_equal(joined[4:], row.routes)


def test_impossible_routes_are_named_with_file_and_document(tmp_path: Path) -> None:
    shape = build_route_shape(MODEL)
    folder = write_shards(tmp_path / "data", shape)
    (source,) = open_sources({str(folder): 1.0}, 64)
    content = bytearray((folder / "train.routes").read_bytes())
    content[4 * shape.bytes_per_token] = content[4 * shape.bytes_per_token + 1]
    (folder / "train.routes").write_bytes(content)
    (source,) = open_sources({str(folder): 1.0}, 64)
    assert len(source.open_split("train").routes(1, 2, 2)) == 2
    with pytest.raises(UserError, match=r"train\.routes: document 1, from"):
        source.open_split("train").routes(1, 1, 3)
    (folder / "train.routes").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train\.routes: has \d+ bytes"):
        source.open_split("train")


def test_routes_of_another_model_are_refused(tmp_path: Path) -> None:
    model_shape = build_route_shape(MODEL)
    for field, value in (("layers", model_shape.layers + 1), ("top_k", model_shape.top_k + 1),
                         ("num_experts", model_shape.num_experts + 1)):
        shape = dataclasses.replace(model_shape, **{field: value})
        sources = open_sources({str(write_shards(tmp_path / field, shape)): 1.0}, 64)
        with pytest.raises(UserError, match=rf"{field}: source 'rollouts' has routes with {field} = {value}, "
                                            rf"but the model has .* = {getattr(model_shape, field)}"):
            check_routes_and_encoders(sources, MODEL)
    with pytest.raises(UserError, match="no layer has experts"):
        check_routes_and_encoders(sources, recipes.get("tiny-qwen3").model)
    with pytest.raises(UserError, match="source 'rollouts': routes"):
        open_sources({str(write_shards(tmp_path / "unsaid", model_shape, dtype="uint32")): 1.0}, 64)
