"""Translation of teacher probabilities to another tokenizer, compared with probabilities counted by bytes."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_sov.base.errors import UserError
from megatron_sov.post.distillation.translation import NO_OUTPUT, PADDING_LOGPROB, TokenTranslation

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


SENTENCES = {"say a brown": 0.3, "say a black": 0.1, "say an apple": 0.24, "say an angle": 0.16, "sat": 0.2}
SHORT = ["l e", "Ġ a", "p p", "Ġa pp", "Ġapp le", "Ġ b", "r o", "w n", "s a"]
LONG = ["s a", "Ġ a", "Ġa Ġ", "Ġa n", "b r", "y Ġan", "l e"]


def counted(made: Tokenizer, end: str) -> dict[tuple[int, ...], dict[int, float]]:
    """Return the tokens after each sentence prefix, with their probabilities."""
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for text, share in SENTENCES.items():
        ids = [*made.encode(text).ids, made.token_to_id(end)]
        for i, token in enumerate(ids):
            behind = found.setdefault(tuple(ids[:i]), {})
            behind[token] = behind.get(token, 0) + share
    return {key: {token: share / sum(behind.values()) for token, share in behind.items()}
            for key, behind in found.items()}


@pytest.mark.each(("student", "teacher"), [(SHORT, LONG), (LONG, SHORT), (SHORT, SHORT), (LONG, []),
                                                  ([], LONG)])
def test_translated_probabilities_equal_byte_counts(student: list[str], teacher: list[str],
                                                    tmp_path: Path) -> None:
    """Both may write " a", " a " or " an"; in the other direction tokens begin inside others."""
    both = translation(tokenizer(tmp_path / "s", student), tokenizer(tmp_path / "t", teacher, end="</s>"))
    ours, theirs = opened(tmp_path / "s"), opened(tmp_path / "t")
    wanted, known, size = counted(ours, END), counted(theirs, "</s>"), theirs.get_vocab_size()
    num_rows = num_own = 0
    for text in SENTENCES:
        ids = [*ours.encode(text).ids, ours.token_to_id(END)]
        document = both.translate_document(ids)
        whole = torch.full((len(document.ids), size), PADDING_LOGPROB)
        for row in range(len(document.ids) - 1):
            for token, share in known[tuple(document.ids[:row + 1])].items():
                whole[row, token] = math.log(share)
        of_next = whole.gather(1, torch.tensor([[*document.ids[1:], 0]]).T)[:, 0]
        logprobs, token = whole.sort(descending=True)
        got, values = both.translate_rows(document, ids, token[:, :9], logprobs[:, :9], of_next, 8)
        for row in range(len(ids) - 1):
            num_own += 1
            if values[row, 0] == NO_OUTPUT:
                continue
            num_rows += 1
            assert got[row, 0] == ids[row + 1]
            for i, value in zip(got[row].tolist(), values[row].exp().tolist(), strict=True):
                exact = wanted[tuple(ids[:row + 1])].get(i, 0.0)
                assert value == pytest.approx(exact, abs=1e-5) or (i != ids[row + 1] and value < 1e-9)
    assert num_rows > 0.6 * num_own


def test_an_unknown_special_token_is_read_as_text(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "s", [])
    made = opened(student)
    made.add_special_tokens([AddedToken("<|user|>", special=True)])
    made.save(str(student / "tokenizer.json"))
    teacher = tokenizer(tmp_path / "t", ["h i"])
    document = translation(student, teacher).translate_document(made.encode("<|user|>hi").ids)
    assert opened(teacher).decode(document.ids) == "<|user|>hi"
    assert document.aligned.tolist() == [7, -1, 8]


def test_a_teacher_that_changes_texts_is_refused(tmp_path: Path) -> None:
    from tokenizers import normalizers

    student, teacher = tokenizer(tmp_path / "s", []), tokenizer(tmp_path / "t", [])
    made = opened(teacher)
    made.normalizer = normalizers.Replace("x", "yy")
    made.save(str(teacher / "tokenizer.json"))
    with pytest.raises(UserError, match=r"\(3 bytes became 4\)"):
        translation(student, teacher).translate_document(opened(student).encode("axb").ids)
