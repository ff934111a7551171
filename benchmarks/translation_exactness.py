"""How right a translation to another tokenizer is, beside a teacher that knows the texts exactly.

Usage: python benchmarks/translation_exactness.py --work FOLDER > benchmarks/results/translation_exactness.txt

FOLDER is that of `other_tokenizer.py`, whose two tokenizers and texts these are.  There are 6,144 of them,
each with a known probability, so that what comes next is counted in the tokens of both: the teacher says its
own counts, and what becomes of these in the student's tokens is compared with the student's.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import defaultdict
from pathlib import Path

import torch
from distillation_learning import ASKED, LEARNED, NAMES, THINGS
from other_tokenizer import VOCABULARY
from tokenizers import Tokenizer

from megatron_sov.post.distillation.translation import NOTHING, UNHEARD, TokenTranslation

TOP_K, END = 64, -7
Counts = dict[tuple[int, ...], dict[int, float]]


def texts() -> dict[str, float]:
    """Return all texts with their probabilities."""
    found = {}
    for thing, words in THINGS.items():
        answers = words.split()
        random.Random(thing).shuffle(answers)
        shares = [0.5 ** i for i in range(len(answers))]
        for wording in LEARNED + ASKED:
            for name in NAMES:
                for answer, share in zip(answers, shares, strict=True):
                    found[f"# {wording.format(thing=thing, name=name)} {answer} for {name}"] = share
    total = sum(found.values())
    return {text: share / total for text, share in found.items()}


def counted(tokenizer: Tokenizer, of: dict[str, float]) -> Counts:
    """Return the tokens behind each beginning of a text, with their probabilities."""
    found: Counts = defaultdict(lambda: defaultdict(float))
    for text, share in of.items():
        ids = [*tokenizer.encode(text).ids, END]
        for i, token in enumerate(ids):
            found[tuple(ids[:i])][token] += share
    return {key: {token: share / sum(behind.values()) for token, share in behind.items()}
            for key, behind in found.items()}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.15, help="of the texts that are translated")
    args = parser.parse_args()
    own, other = (args.work / f"tokenizer-{name}" for name in VOCABULARY)
    sizes = [size for _, size in VOCABULARY.values()]
    both = TokenTranslation(own, other, *sizes)
    student, teacher = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (own, other))
    world = texts()
    wanted, known = counted(student, world), counted(teacher, world)
    num_tokens = num_heard = 0
    entropy = entropy_heard = worst_own = worst_other = 0.0
    for text in random.Random(0).sample(sorted(world), round(args.share * len(world))):
        ids = student.encode(text).ids
        document = both.document(ids)
        whole = torch.full((len(document.ids), sizes[1]), NOTHING)
        for row in range(len(document.ids)):
            for token, share in known[tuple(document.ids[:row + 1])].items():
                if token != END:
                    whole[row, token] = math.log(share)
        of_next = whole.gather(1, torch.tensor([[*document.ids[1:], 0]]).T)[:, 0]
        best = whole.topk(2 * TOP_K)
        got, values = both.rows(document, ids, best.indices, best.values, of_next, TOP_K)
        for row in range(len(ids) - 1):
            behind = wanted[tuple(ids[:row + 1])]
            weight = -world[text] * sum(share * math.log(share) for share in behind.values())
            num_tokens, entropy = num_tokens + 1, entropy + weight
            if values[row, 0] == UNHEARD:
                continue
            num_heard, entropy_heard = num_heard + 1, entropy_heard + weight
            errors = [abs(value - behind.get(token, 0.0)) for token, value in
                      zip(got[row].tolist(), values[row].exp().tolist(), strict=True)]
            worst_own, worst_other = max(worst_own, errors[0]), max(worst_other, *errors[1:])
    print(f"{num_tokens} tokens of {round(args.share * len(world))} texts: the teacher is heard of "
          f"{num_heard / num_tokens:.1%} of them, which hold {entropy_heard / entropy:.1%} of the entropy; "
          f"the largest error of a probability is {worst_own:.4f} of the next token, {worst_other:.4f} of "
          "others")


if __name__ == "__main__":
    main()
