"""The shape of routes: bytes, marks, and what no model can have done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError


@pytest.mark.parametrize(("experts", "dtype", "mark"), [
    (128, "uint8", 255), (255, "uint8", 255), (256, "uint16", 65535), (512, "uint16", 65535)])
def test_a_number_has_the_fewest_bytes_that_leave_one_value_free(experts: int, dtype: str, mark: int) -> None:
    shape = RouteShape(48, 8, experts)
    assert (shape.dtype, shape.mark) == (dtype, mark)
    assert shape.bytes_per_token == 48 * 8 * (1 if dtype == "uint8" else 2)
    assert shape.absent(3).nbytes == 3 * shape.bytes_per_token
    assert RouteShape.from_record(shape.record(), "x") == shape


def test_the_last_token_of_a_document_was_not_read() -> None:
    shape = RouteShape(1, 2, 4)
    assert shape.of_document(np.array([[[1, 2]], [[3, 0]]], np.uint8), 3).tolist() == [
        [[1, 2]], [[3, 0]], [[255, 255]]]


@pytest.mark.parametrize(("choice", "said"), [
    ([1, 4], r"sends token 1 in layer 2 of those with experts to \[1, 4\]; expert numbers must lie below 4, "
             r"or all be 255"),
    ([3, 3], r"token 1 in layer 2 .* to \[3, 3\]; a token visits an expert of a layer once"),
    ([2, 255], r"to \[2, 255\]; expert numbers must lie below 4"),
])
def test_what_no_model_does_is_named_with_token_and_layer(choice: list[int], said: str) -> None:
    shape = RouteShape(3, 2, 4)
    routes = shape.absent(2)
    routes[0] = [3, 0]
    assert shape.problem(routes) == ""
    routes[1, 2] = choice
    with pytest.raises(UserError, match=said):
        raise UserError(shape.problem(routes))
    assert "shape [2, 3, 1] and type uint8, must be [tokens, 3, 2] of uint8" in shape.problem(
        routes[:, :, :1])
    assert "type uint16" in shape.problem(routes.astype(np.uint16))


@pytest.mark.parametrize("record", [
    None, {}, {"layers": 0, "top_k": 2, "num_experts": 4, "dtype": "uint8"},
    {"layers": 1, "top_k": 5, "num_experts": 4, "dtype": "uint8"},
    {"layers": 1, "top_k": 2, "num_experts": 4, "dtype": "uint16"}])
def test_a_record_that_says_no_shape_is_refused(record: Any) -> None:
    with pytest.raises(UserError, match=r"DIR: source 'a': routes = .* cannot be read .*write the data"):
        RouteShape.from_record(record, "DIR: source 'a'")
