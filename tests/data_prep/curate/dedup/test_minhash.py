"""Step `minhash_dedup` finds the same near duplicates as a comparison of all pairs."""

import random
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.curate.dedup import clusters as clusters_module, minhash
from data_prep.curate.dedup.clusters import DROPPED, Clusters, DocumentOrder, sort_edges
from data_prep.curate.dedup.minhash import MinhashDedup, MinhashSettings, compute_shingles
from data_prep.curate.dedup.work_files import Register, read_bucket, write_array
from data_prep.curate.pipeline.step import Doc
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, run_step
from tests.typed_words import keys_of


def draw_words(draw: random.Random, count: int) -> list[str]:
    return [f"w{draw.randrange(5000)}" for _ in range(count)]


def plant_near_duplicates(num_texts: int, seed: int = 0) -> list[str]:
    """Return texts; some are copies of an earlier text with exchanged words."""
    draw = random.Random(seed)
    texts: list[list[str]] = []
    for number in range(num_texts):
        if number % 3:
            texts.append(draw_words(draw, draw.randrange(3, 120)))
        else:
            copy = list(draw.choice(texts)) if texts else draw_words(draw, 80)
            for _ in range(draw.choice((0, 1, 1, 2, 4))):
                copy[draw.randrange(len(copy))] = f"x{draw.randrange(99)}"
            texts.append(copy)
    return [" ".join(text) for text in texts]


def compare_all_pairs(documents: list[Doc], threshold: float, ngram: int) -> dict[str, str]:
    """Return dropped document -> remaining similar document; all pairs are compared, longest first."""
    sets = [set(compute_shingles(d.text, ngram).tolist()) for d in documents]

    def are_similar(one: set[int], other: set[int]) -> bool:
        num_common = len(one & other)
        return num_common > 0 and num_common >= threshold * len(one | other)

    kept: list[int] = []
    found = {}
    for number in sorted(range(len(documents)), key=lambda n: (-len(documents[n].text), n)):
        keeper = next((other for other in kept if are_similar(sets[number], sets[other])), None)
        if keeper is None:
            kept.append(number)
        else:
            found[documents[number].id] = documents[keeper].id
    return found


def build_windows(count: int, step: int = 3, size: int = 60) -> list[str]:
    """Return overlapping windows over one text: neighbours are similar, distant windows share no words."""
    text = [f"w{number}x" for number in range(step * count + size)]
    return [" ".join(text[step * number:step * number + size]) for number in range(count)]


def find_duplicates(view: MemoryView, **settings: Any) -> dict[str, str]:
    outcomes = run_step(MinhashDedup, MinhashSettings(**{"partitions": 3, **settings}), view)
    assert {o.reason for o in outcomes.values()} <= {"", "near duplicate"}
    return {id_: o.values["duplicate_of"] for id_, o in outcomes.items() if o.reason}


def test_pairs_equal_a_comparison_of_all_pairs(tmp_path: Path) -> None:
    documents = docs(*plant_near_duplicates(90))
    expected = compare_all_pairs(documents, 0.7, 3)
    assert len(expected) > 15
    view = MemoryView.of([documents], tmp_path)
    assert find_duplicates(view, threshold=0.7, ngram=3, num_bands=100, rows_per_band=4) == expected


SECOND_CHAIN = [text.upper().replace("W", "V") for text in build_windows(20)]
CHAINS = {
    "windows": build_windows(40),
    "shuffled": random.Random(3).sample(build_windows(40), 40),
    "star": ["x y z " + " ".join(f"w{i}x" for i in range(60))] * 9 + build_windows(1),
    "two chains": list(chain.from_iterable(zip(build_windows(20), SECOND_CHAIN, strict=True))),
    "none": build_windows(12, step=30)}


@pytest.mark.parametrize("name", CHAINS)
def test_each_dropped_text_is_similar_to_a_remaining_text(tmp_path: Path, name: str) -> None:
    documents = docs(*CHAINS[name])
    shards = [documents[:15], docs(*CHAINS[name][15:], shard=1)] if len(documents) > 15 else [documents]
    documents = [document for shard in shards for document in shard]
    duplicates = find_duplicates(MemoryView.of(shards, tmp_path), threshold=0.7, ngram=5,
                                 num_bands=100, rows_per_band=3)
    assert duplicates == compare_all_pairs(documents, 0.7, 5)
    sets = {d.id: set(compute_shingles(d.text, 5).tolist()) for d in documents}
    for dropped, keeper in duplicates.items():
        assert keeper not in duplicates
        assert len(sets[dropped] & sets[keeper]) >= 0.7 * len(sets[dropped] | sets[keeper])


@pytest.mark.parametrize("longest_at", [0, 7, 30, 59])
def test_a_crowd_is_compared_with_its_longest_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   longest_at: int) -> None:
    monkeypatch.setattr(minhash, "MAX_FIRST_DOCUMENTS", 2)
    text = " ".join(draw_words(random.Random(5), 80))
    texts = [text] * 60
    texts[longest_at] += " longer"
    shards = [docs(*texts[start:start + 15], shard=number) for number, start in enumerate(range(0, 60, 15))]
    duplicates = find_duplicates(MemoryView.of(shards, tmp_path))
    longest = shards[longest_at // 15][longest_at % 15]
    assert len(duplicates) == 59 and set(duplicates.values()) == {longest.id}


def test_results_do_not_depend_on_shards_and_partitions(tmp_path: Path) -> None:
    texts = plant_near_duplicates(60, seed=1)
    results = []
    for size, partitions in ((60, 3), (25, 1), (7, 16)):
        shards = [docs(*texts[start:start + size], shard=start) for start in range(0, 60, size)]
        place = {d.id: number for number, d in enumerate(d for shard in shards for d in shard)}
        duplicates = find_duplicates(MemoryView.of(shards, tmp_path / str(size)), threshold=0.6, ngram=2,
                                     partitions=partitions)
        results.append({place[one]: place[other] for one, other in duplicates.items()})
    assert results[0] == results[1] == results[2] != {}


def test_priority_comes_before_length(tmp_path: Path) -> None:
    text = " ".join(draw_words(random.Random(2), 60))
    web, book = docs(text, f"{text} longer", "."), docs(text.upper(), source="book", shard=3)
    assert find_duplicates(MemoryView.of([web, book], tmp_path / "a", book=1)) == dict.fromkeys(
        (web[0].id, web[1].id), book[0].id)
    assert find_duplicates(MemoryView.of([web, book], tmp_path / "b")) == dict.fromkeys(
        (web[0].id, book[0].id), web[1].id)


def test_thai_and_korean_are_compared_by_characters(tmp_path: Path) -> None:
    thai = ("ผู้ใดกระทำความผิดตามพระราชบัญญัตินี้ต้องระวางโทษจำคุกไม่เกินหนึ่งปี"
            "หรือปรับไม่เกินสองหมื่นบาทหรือทั้งจำทั้งปรับ")
    korean = ("모든 국민은 법 앞에 평등하다. 누구든지 성별 종교 또는 사회적 신분에 의하여 "
              "차별을 받지 아니한다.")
    documents = docs(thai, thai[:60] + " " + thai[60:], korean, korean.replace(" ", ""), thai[::-1])
    assert set(find_duplicates(MemoryView.of([documents], tmp_path))) == {documents[0].id, documents[3].id}


def test_all_invalid_settings_are_reported() -> None:
    assert keys_of(MinhashSettings()) == []
    assert keys_of(MinhashSettings(0, 0, 0, 0, -1, 0)) == [
        "threshold", "num_bands", "rows_per_band", "ngram", "seed", "partitions"]
    assert keys_of(MinhashSettings(num_bands=1000)) == ["num_bands"]


COUNTS = (5, 0, 7, 0, 0, 9)
"""Number of documents in each shard; some shards are empty."""


def register_random_lengths(register: Register, draw: random.Random, longest: int) -> dict[int, int]:
    """Register documents with 1 to `longest` - 1 characters; return document number -> length."""
    lengths: dict[int, int] = {}
    for rank, count in enumerate(COUNTS):
        register.write_table(rank, [(row, draw.randrange(1, longest), f"web:{rank}:{row}")
                                    for row in range(count)])
        lengths |= {rank << 32 | int(r["row"]): int(r["characters"]) for r in register.read_table(rank)}
    return lengths


def search_plainly(order: list[int], pairs: list[list[int]]) -> dict[int, int]:
    """Map each dropped document to the first remaining document that it forms a pair with."""
    similar: dict[int, set[int]] = {number: set() for number in order}
    for one, other in pairs:
        similar[one].add(other)
        similar[other].add(one)
    kept: list[int] = []
    duplicates = {}
    for number in order:
        keeper = next((other for other in kept if other in similar[number]), None)
        if keeper is None:
            kept.append(number)
        else:
            duplicates[number] = keeper
    return duplicates


@pytest.mark.parametrize("in_memory", [1 << 20, 10, 3, 1])
@pytest.mark.parametrize("num_pairs", [0, 1, 9, 40, 120])
def test_selection_is_that_of_a_greedy_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              num_pairs: int, in_memory: int) -> None:
    monkeypatch.setattr(clusters_module, "EDGES_IN_MEMORY", in_memory)
    monkeypatch.setattr(clusters_module, "_EDGE_BLOCK", 4)
    draw = random.Random(num_pairs)
    shards = [docs(*["x"] * max(count, 1), source="book" if rank == 2 else "web", shard=rank)
              for rank, count in enumerate(COUNTS)]
    # Shards of lower priority (here `web`) have higher ranks.
    view = MemoryView.of(shards, tmp_path, **({"book": 1} if num_pairs == 40 else {}))
    register = Register(tmp_path / "documents")
    lengths = register_random_lengths(register, draw, 2 if num_pairs == 120 else 4)
    pairs = [draw.sample(sorted(lengths), 2) for _ in range(num_pairs)]
    order = DocumentOrder(view)
    numbers = np.array(pairs, np.uint64).reshape(-1, 2)
    characters = np.array([[lengths[one], lengths[other]] for one, other in pairs], np.uint64).reshape(-1, 2)
    edges = order.build_edges(numbers, characters)
    files = [tmp_path / f"{part}.npy" for part in range(3)]
    for part, file in enumerate(files):
        write_array(file, sort_edges(edges[part::3]))
    clusters = Clusters(view, register, tmp_path / "scratch")
    clusters.select_documents(files)
    clusters.write_dropped(tmp_path / "dropped")

    def place(number: int) -> tuple[int, int, int]:
        is_book = num_pairs == 40 and number >> 32 == 0  # the shard with the higher priority has rank 0
        return (0 if is_book else 1, -lengths[number], number)

    expected = search_plainly(sorted(lengths, key=place), pairs)
    found = [read_bucket(tmp_path / "dropped", DROPPED, rank) for rank in range(len(COUNTS))]
    assert {int(r["doc"]): int(r["keeper"]) for part in found for r in part} == expected
