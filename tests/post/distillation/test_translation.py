"""What a teacher of another tokenizer says, in the student's tokens: compared with probabilities that are
counted byte by byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_sov.base.errors import UserError
from megatron_sov.post.distillation.translation import NOTHING, UNHEARD, TokenTranslation

END = "<|end|>"
def tokenizer(folder: Path, merges: list[str], end: str = END) -> Path:
    """Write a byte-level tokenizer of the 256 bytes and some merges ("a b"), with a token that ends texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(m.replace(" ", "") for m in merges)])}
    made = Tokenizer(models.BPE(vocabulary, [tuple(m.split()) for m in merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(end, special=True)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return folder


def opened(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def translation(student: Path, teacher: Path) -> TokenTranslation:
    return TokenTranslation(student, teacher, opened(student).get_vocab_size(),
                            opened(teacher).get_vocab_size())


def said(size: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Return [rows, size] log-probabilities."""
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)


SENTENCES = {"say a brown": 0.3, "say a black": 0.1, "say an apple": 0.24, "say an angle": 0.16, "sat": 0.2}
SHORT = ["l e", "Ġ a", "p p", "Ġa pp", "Ġapp le", "Ġ b", "r o", "w n", "s a"]
LONG = ["s a", "Ġ a", "Ġa Ġ", "Ġa n", "b r", "y Ġan", "l e"]


def counted(made: Tokenizer, end: str) -> dict[tuple[int, ...], dict[int, float]]:
    """Return the tokens behind each beginning of a sentence, with their probabilities."""
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for text, share in SENTENCES.items():
        ids = [*made.encode(text).ids, made.token_to_id(end)]
        for i, token in enumerate(ids):
            behind = found.setdefault(tuple(ids[:i]), {})
            behind[token] = behind.get(token, 0) + share
    return {key: {token: share / sum(behind.values()) for token, share in behind.items()}
            for key, behind in found.items()}


@pytest.mark.parametrize(("student", "teacher"), [(SHORT, LONG), (LONG, SHORT), (SHORT, SHORT), (LONG, []),
                                                  ([], LONG)])
def test_a_teacher_that_knows_the_texts_says_how_probable_the_students_tokens_are(
        student: list[str], teacher: list[str], tmp_path: Path) -> None:
    """Whatever both write " a", " a " or " an" with; in the other direction tokens begin inside of others."""
    both = translation(tokenizer(tmp_path / "s", student), tokenizer(tmp_path / "t", teacher, end="</s>"))
    ours, theirs = opened(tmp_path / "s"), opened(tmp_path / "t")
    wanted, known, size = counted(ours, END), counted(theirs, "</s>"), theirs.get_vocab_size()
    num_heard = num_own = 0
    for text in SENTENCES:
        ids = [*ours.encode(text).ids, ours.token_to_id(END)]
        document = both.document(ids)
        whole = torch.full((len(document.ids), size), NOTHING)
        for row in range(len(document.ids) - 1):
            for token, share in known[tuple(document.ids[:row + 1])].items():
                whole[row, token] = math.log(share)
        of_next = whole.gather(1, torch.tensor([[*document.ids[1:], 0]]).T)[:, 0]
        logprobs, token = whole.sort(descending=True)
        got, values = both.rows(document, ids, token[:, :9], logprobs[:, :9], of_next, 8)
        for row in range(len(ids) - 1):
            num_own += 1
            if values[row, 0] == UNHEARD:
                continue
            num_heard += 1
            assert got[row, 0] == ids[row + 1]
            for i, value in zip(got[row].tolist(), values[row].exp().tolist(), strict=True):
                exact = wanted[tuple(ids[:row + 1])].get(i, 0.0)
                assert value == pytest.approx(exact, abs=1e-5) or (i != ids[row + 1] and value < 1e-9)
    assert num_heard > 0.6 * num_own


def test_events_are_texts_that_mean_the_same_to_both(tmp_path: Path) -> None:
    """The student's tokens are longer here and shorter there; what each is written with is looked up one by
    one."""
    student = tokenizer(tmp_path / "s", ["a b", "c d", "ab cd"])
    teacher = tokenizer(tmp_path / "t", ["e f", "ef a", "a b", "c d"], end="</s>")
    both, ours, theirs = translation(student, teacher), opened(student), opened(teacher)
    text = "xabcdefab"
    ids, other = ours.encode(text).ids, theirs.encode(text).ids
    assert [ours.id_to_token(t) for t in ids] == ["x", "abcd", "e", "f", "ab"]
    assert [theirs.id_to_token(t) for t in other] == ["x", "ab", "cd", "efa", "b"]
    document = both.document(ids)
    assert document.at.tolist() == [0, 2, -1, -1, 4], "where tokens of both end at the same byte"
    size = theirs.get_vocab_size()
    whole = said(size, len(other))
    logprobs, token = whole.sort(descending=True)
    of_next = whole.gather(1, torch.tensor([[*other[1:], 0]]).T)[:, 0]
    got, values = both.rows(document, ids, token, logprobs.float(), of_next, size - 2)

    names = {name: index for name, index in ours.get_vocab().items() if name.isascii()}
    first_of_ours = [theirs.id_to_token(theirs.encode(name).ids[0]) for name in names if name != END]
    first_of_theirs = [ours.id_to_token(ours.encode(name).ids[0]) for name in theirs.get_vocab()
                       if name.isascii() and name != "</s>"]
    alike = [name for name in names if name in theirs.get_vocab()
             and first_of_ours.count(name) == first_of_theirs.count(name) == 1]
    assert "cd" in alike and "x" in alike, "and not what is hidden by longer ones:"
    assert "ab" not in alike and "e" not in alike

    def found(row: int) -> dict[str, float]:
        return {ours.id_to_token(int(i)): math.exp(v)
                for i, v in zip(got[row], values[row].tolist(), strict=True) if v > NOTHING}

    for row, own, probability in ((0, "abcd", math.exp(of_next[0] + of_next[1])),  # one token spans two
                                  (1, "e", sum(math.exp(whole[2, theirs.token_to_id(name)])
                                               for name in ("e", "ef", "efa")))):  # or begins longer ones
        wanted = {name: math.exp(whole[document.at[row], theirs.token_to_id(name)]) for name in alike}
        wanted |= {END: math.exp(whole[document.at[row], theirs.token_to_id("</s>")]), own: probability}
        assert {k: v for k, v in found(row).items() if k.isascii()} == pytest.approx(wanted, rel=1e-5)
        assert sum(found(row).values()) < 1, "the rest of both is one event more"
    assert values[2, 0] == UNHEARD, "of efa e and ef may have ended, and what is behind these nobody asked"
    # what may be part of a longer token is not heard of, nor what stands behind it
    begun = translation(tokenizer(tmp_path / "b", ["a b", "ab c"]), tokenizer(tmp_path / "c", []))
    ids = opened(tmp_path / "b").encode("xabd").ids
    whole = said(257, 4).fill_(math.log(1 / 257))
    for share, says in ((0.5, [False, False, False]), (0.01, [True, True, False])):
        whole[2] = math.log((1 - share) / 256)
        whole[2, opened(tmp_path / "c").token_to_id("c")] = math.log(share)
        logprobs, token = whole.sort(descending=True)
        of_next = whole.gather(1, torch.tensor([[*begun.document(ids).ids[1:], 0]]).T)[:, 0]
        values = begun.rows(begun.document(ids), ids, token, logprobs.float(), of_next, 8)[1]
        assert (values[:, 0] <= 0).tolist() == says
    assert all(len(set(row)) == size - 2 for row in got.tolist()), "ids are distinct in each row"


def test_a_special_token_that_the_teacher_lacks_is_read_as_its_text(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "s", [])
    made = opened(student)
    made.add_special_tokens([AddedToken("<|user|>", special=True)])
    made.save(str(student / "tokenizer.json"))
    teacher = tokenizer(tmp_path / "t", ["h i"])
    document = translation(student, teacher).document(made.encode("<|user|>hi").ids)
    assert opened(teacher).decode(document.ids) == "<|user|>hi"
    assert document.at.tolist() == [7, -1, 8]


def test_a_teacher_that_changes_texts_is_refused(tmp_path: Path) -> None:
    from tokenizers import normalizers

    student, teacher = tokenizer(tmp_path / "s", []), tokenizer(tmp_path / "t", [])
    made = opened(teacher)
    made.normalizer = normalizers.Replace("x", "yy")
    made.save(str(teacher / "tokenizer.json"))
    with pytest.raises(UserError, match=r"\(3 bytes became 4\)"):
        translation(student, teacher).document(opened(student).encode("axb").ids)
