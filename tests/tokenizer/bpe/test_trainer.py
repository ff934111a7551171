"""BPE merges equal textbook BPE, tiktoken and Hugging Face's trainer, with and without superwords."""

import inspect
import json
import random
import textwrap
import unicodedata
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, strategies as st
from tokenizers import Tokenizer, pre_tokenizers, trainers

from tokenizer.bpe import trainer
from tokenizer.bpe.merging import JoinRule
from tokenizer.bpe.segmenting import find_last_merge, merge_parts
from tokenizer.bpe.split_pattern import build_untrained_tokenizer
from tokenizer.bpe.trainer import Merge, MergeLearner, PretokenWords
from tokenizer.bpe.vocabulary import Vocabulary, spell_token
from tokenizer.formats.hf_files import build_tokenizer
from tokenizer.mixture import NUM_BUCKETS, GroupSizes, PieceSampler, TextPiece, choose_share
from tokenizer.presets import K_EXAONE, SOLAR_OPEN

# Merging by ranks against tiktoken, and the last merge that produces a token.

def draw_vocabulary(seed: int) -> dict[bytes, int]:
    """Return token -> rank: all bytes, then random strings of a, b and c, many of which no merge reaches."""
    rng = random.Random(seed)
    words = {bytes(rng.choices(b"abc", k=rng.randint(2, 6))) for _ in range(40)}
    shuffled = rng.sample(sorted(words), len(words))
    return {bytes([b]): b for b in range(256)} | {word: 256 + i for i, word in enumerate(shuffled)}


@pytest.mark.each("seed", range(20))
def test_one_merge_per_token_equals_ranks(seed: int) -> None:
    ranks = draw_vocabulary(seed)
    encoding = tiktoken.Encoding("drawn", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    as_floats: dict[bytes, float] = dict(ranks)
    pairs = {find_last_merge([bytes([b]) for b in token], as_floats): rank
             for token, rank in ranks.items() if len(token) > 1}
    rng = random.Random(seed)
    for _ in range(200):
        text = bytes(rng.choices(b"abc", k=rng.randint(1, 30)))
        parts = merge_parts([bytes([b]) for b in text], lambda a, b: pairs.get((a, b)))
        if text not in ranks:  # tiktoken looks a whole text up first
            assert [ranks[p] for p in parts] == encoding.encode_ordinary(text.decode())


def test_an_unreachable_token_has_no_last_merge() -> None:
    ranks: dict[str, float] = {"bc": 3, "ab": 4, "abc": 5, "cab": 6, "cabc": 2, "acac": 7}
    assert find_last_merge(list("abc"), ranks) == ("a", "bc")
    assert find_last_merge(list("cab"), ranks) == ("c", "ab")
    assert find_last_merge(list("cabc"), ranks) == ("c", "abc")  # built from lower-ranked tokens
    assert find_last_merge(list("acac"), ranks) is None


TEXT = [inspect.getsource(textwrap), "한국어 문장은 한국어로 씁니다. 문장 하나.\n" * 20,
        "<|end|> for i in x:\n    i += 1\n" * 20]
ANY_JOIN = JoinRule(max_bytes=99, max_words=0, keeps_words_apart=False, only_superwords=False)
PLAIN = replace(SOLAR_OPEN, split_pattern=r"[^|]+|\|")


def get_merges(vocabulary: Vocabulary) -> list[tuple[bytes, bytes]]:
    return [(vocabulary.tokens[a], vocabulary.tokens[b]) for a, b in vocabulary.merges]


@given(st.lists(st.text(alphabet="aab|", max_size=30), max_size=8), st.integers(2, 9))
def test_few_letters_many_ties_and_overlaps(learn: Callable[..., Vocabulary],
                                            brute_force: Callable[..., list], texts: list[str],
                                            max_token_bytes: int) -> None:
    preset = replace(PLAIN, max_token_bytes=max_token_bytes)
    assert get_merges(learn(preset, 256 + 40, texts)) == brute_force(preset, 256 + 40, texts)


@pytest.mark.each("capacity", [3, 50_000])
@pytest.mark.each("preset", [SOLAR_OPEN, replace(K_EXAONE, superword_pattern="")])
def test_merges_equal_those_of_hugging_faces_trainer(learn: Callable[..., Vocabulary], preset, capacity: int,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "FIRST_PAIRS", capacity)  # small arrays have to grow many times
    monkeypatch.setattr(trainer, "FIRST_PLACES", 1000 * capacity)
    theirs = build_untrained_tokenizer(preset)
    theirs.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, show_progress=False, max_token_length=preset.max_token_bytes + 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    expected = json.loads(theirs.to_str())["model"]["merges"]
    assert len(expected) > 800
    result = get_merges(learn(preset, 2000, TEXT))
    assert [[spell_token(a), spell_token(b)] for a, b in result] == [list(e) for e in expected]


def test_counts_beyond_32_bits() -> None:
    words = PretokenWords(np.array([0, 1, 1, 0]), np.array([2, 2]), np.array([1 << 40, (1 << 40) - 1]))
    learner = MergeLearner(words, [b"a", b"b"], ANY_JOIN, 2, 9)
    assert list(learner.iter_merges()) == [Merge(0, 1, 1 << 40), Merge(1, 0, (1 << 40) - 1)]


# A sample of a group, collected from its units before the size of the group is known.

LIMIT_BYTES = 1000


def measure_group(pieces: list[TextPiece]) -> GroupSizes:
    row = np.zeros(NUM_BUCKETS, np.int64)
    for piece in pieces:
        row[piece.bucket] += len(piece.raw)
    return GroupSizes(len(pieces), int(row.sum()), row)


@pytest.mark.each("num_buckets", [3, 40, NUM_BUCKETS])
def test_units_keep_every_piece_that_the_group_sample_may_need(num_buckets: int) -> None:
    generator = random.Random(num_buckets)
    units = [[TextPiece(b"x" * generator.randrange(1, 300), generator.randrange(num_buckets))
              for _ in range(200)]
             for _ in range(3)]
    group_sampler = PieceSampler(LIMIT_BYTES)
    for unit in units:
        unit_sampler = PieceSampler(LIMIT_BYTES)
        for piece in unit:
            unit_sampler.add_piece(piece)
        for piece in unit_sampler.get_pieces():
            group_sampler.add_piece(piece)
    pieces = [piece for unit in units for piece in unit]
    sizes = measure_group(pieces)
    share = choose_share(sizes, LIMIT_BYTES / sizes.num_bytes)
    expected = [piece for piece in pieces if share.count_passes(piece.bucket)]
    sampled = [piece.raw for piece in group_sampler.get_pieces() if share.count_passes(piece.bucket)]
    assert expected and sorted(sampled) == sorted(piece.raw for piece in expected)


def test_pieces_in_memory_exceed_the_limit_by_at_most_a_bucket() -> None:
    sampler = PieceSampler(LIMIT_BYTES)
    for number in range(5000):
        sampler.add_piece(TextPiece(b"x" * 100, number * 7919 % NUM_BUCKETS))
    assert sum(len(piece.raw) for piece in sampler.get_pieces()) == LIMIT_BYTES + 100


NOUNS = ["cat", "dog", "bird", "고양이", "강아지", "año", "Straße"]
generator = random.Random(4)
PHRASES = ("one of the {0}s", "in the {0}", "그 {0} 그리고", "{0}, {0}!\n")
SUPER_TEXT = [" ".join(generator.choice(PHRASES).format(n) for n in generator.choices(NOUNS, k=80))
              for _ in range(4)]


@pytest.mark.each(("max_words", "only"), [(2, False), (4, False), (4, True)])
def test_both_stages_equal_brute_force(learn: Callable[..., Vocabulary], brute_force: Callable[..., list],
                                       max_words: int, only: bool) -> None:
    preset = replace(K_EXAONE, max_superword_words=max_words)
    result = learn(preset, 420, SUPER_TEXT, transition=330, only=only)
    assert get_merges(result) == brute_force(preset, 420, SUPER_TEXT, transition=330, only=only)
    words = [len(t.decode(errors="replace").split()) for t in result.tokens]
    assert max(words) == max_words and result.count_superwords() > 20


@given(st.lists(st.text(alphabet="ab  ", max_size=60), min_size=1, max_size=6), st.booleans())
@example(texts=["aaa       ab"] * 2, only=False)  # a run of six spaces has no word
def test_random_letters_and_spaces_equal_brute_force(learn: Callable[..., Vocabulary],
                                                     brute_force: Callable[..., list], texts: list[str],
                                                     only: bool) -> None:
    result = learn(K_EXAONE, 300, texts, transition=262, only=only)
    assert get_merges(result) == brute_force(K_EXAONE, 300, texts, transition=262, only=only)


def test_superword_stage_adds_the_requested_number_of_superwords(learn: Callable[..., Vocabulary]) -> None:
    mixed, only = (learn(K_EXAONE, 420, SUPER_TEXT, transition=275, only=only) for only in (False, True))
    assert mixed.count_superwords() < only.count_superwords() == 420 - 275
    assert all(len(token.split()) > 1 for token in only.tokens[275:])
    assert mixed.tokens[:275] == only.tokens[:275]


def test_no_merge_of_stage_1_joins_words_by_their_bytes(learn: Callable[..., Vocabulary]) -> None:
    # Wide spaces end in byte 0x80, like many letters: a merge of 0x80 with a space would join Korean words.
    text = ["1\u1680  2\u2000  3\u3000  ." * 50] * 40 + ["네가 내가 보가 했다"] * 30
    vocabulary = learn(K_EXAONE, 290, text)
    assert not [t for t in vocabulary.tokens if t[-1:] == b" " and t[-2:-1] > b"\x7f"]
    # without superwords the merge is harmless
    assert any(t.endswith(b"\x80 ") for t in learn(SOLAR_OPEN, 290, text).tokens)


@pytest.fixture(scope="module")
def solar(build_trained_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return build_trained_tokenizer(SOLAR_OPEN, 370, SUPER_TEXT)


@pytest.fixture(scope="module")
def superwords(learn: Callable[..., Vocabulary]) -> Tokenizer:
    trained = build_tokenizer(K_EXAONE, learn(K_EXAONE, 420, SUPER_TEXT, transition=330))
    trained.encode_special_tokens = True
    return trained


def test_vocabulary_is_exact_with_specials_then_bytes_first(solar: Tokenizer) -> None:
    vocab = solar.get_vocab()
    assert solar.get_vocab_size() == 370 and sorted(vocab.values()) == list(range(370))
    assert [t for t, i in sorted(vocab.items(), key=lambda e: e[1]) if i < 64] == SOLAR_OPEN.special_by_id()
    assert all(len(t) == 1 for t, i in vocab.items() if 64 <= i < SOLAR_OPEN.smallest_vocab)


@given(st.text())
def test_solar_round_trips_every_text(solar: Tokenizer, text: str) -> None:
    ids = solar.encode(text, add_special_tokens=False).ids
    assert solar.decode(ids, skip_special_tokens=False) == text
    assert all(i >= 64 for i in ids)


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"),
                                  st.sampled_from("\u1112\u1161\u11ab\u0301e a  "))))
def test_exaone_round_trips_composed_text(superwords: Tokenizer, text: str) -> None:
    assert (superwords.decode(superwords.encode(text, add_special_tokens=False).ids)
            == unicodedata.normalize("NFC", text))


def test_only_nfc_maps_decomposed_hangul_to_composed_ids(solar: Tokenizer, superwords: Tokenizer) -> None:
    composed, decomposed = "고양이", unicodedata.normalize("NFD", "고양이")
    assert superwords.encode(composed).ids == superwords.encode(decomposed).ids
    assert solar.encode(composed).ids != solar.encode(decomposed).ids
