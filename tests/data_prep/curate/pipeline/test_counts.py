"""Document counts: the merged counts of parts equal the counts of all documents."""

from data_prep.curate.pipeline.counts import MAX_SAMPLES, DocumentCounts, hash_sample_id


def count_documents(numbers: list[int]) -> DocumentCounts:
    """Count documents of as many two-byte letters as their number: of each three, one is dropped, one changed
    to "x", and one kept."""
    counts = DocumentCounts()
    for i in numbers:
        counts.add_document(f"d{i}", "three" if i % 3 == 0 else "", "é" * i, "x" if i % 3 == 1 else None)
    return counts


def test_merged_counts_of_parts_equal_counts_of_all_documents() -> None:
    whole = count_documents(list(range(1, 100)))
    parts = DocumentCounts.merge_dicts(count_documents(list(range(start, 100, 4))).to_dict()
                                       for start in (3, 1, 4, 2))
    assert parts.to_dict() == whole.to_dict()
    assert (whole.documents_in, whole.documents_kept, whole.documents_changed) == (99, 66, 33)
    assert whole.bytes_in == sum(2 * i for i in range(1, 100))
    assert whole.bytes_kept == 33 + sum(2 * i for i in range(2, 100, 3))  # 33 changed to "x"
    assert whole.dropped == {"three": {"documents": 33, "bytes": sum(2 * i for i in range(3, 100, 3))}}


def test_samples_have_the_lowest_hashes_of_ids() -> None:
    dropped = [{"id": f"d{i}", "reason": "three", "before": "é" * i} for i in range(3, 100, 3)]
    lowest = sorted(dropped, key=hash_sample_id)[:MAX_SAMPLES]
    assert count_documents(list(range(1, 100))).samples == {"dropped": lowest}
