"""`ResponseSpans`: learned labels per document, with padding between joined samples."""


def test_a_pair_without_one_response_is_excluded() -> None:
    import torch

    from megatron_sov.post.sft import ResponseSpans

    responses = ResponseSpans(torch.tensor([0, 1, 4, 3, 3]), torch.tensor([1.0, 1.0, 0.0, 2.0]).double())
    assert responses.select_pairs().tolist() == [1, 0]
    assert responses.select_side(0).tolist() == [True, False, False, False, False]
    assert responses.select_side(1).tolist() == [False, True, False, False, False]
