"""`sov-data scorer train|check`: a model that gives texts a score, from labels of one's own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data_prep.scoring.encoder import EncoderSettings
from data_prep.scoring.judgement import told
from data_prep.scoring.labels import KINDS
from data_prep.scoring.ngram_settings import NgramSettings
from megatron_sov.errors import UserError

_LABELS = ("JSONL file of {\"text\": ..., \"label\": 0 or 1, or 0 to 5, \"language\": \"ko\"}; the language "
           "may be left out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = "Train a model that gives texts a score, or judge one on other labels."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fitted = actions.add_parser("train", help="train on labels; a tenth of them judges the model")
    fitted.description = ("Train a linear model over hashed n-grams, or over the embeddings of a local "
                          "Hugging Face encoder. What it is worth on labels that were held out is printed.")
    fitted.add_argument("--labels", required=True, type=Path, metavar="FILE", help=_LABELS)
    fitted.add_argument("--kind", required=True, choices=KINDS,
                        help="classifier: labels 0 and 1, scores are probabilities; regressor: 0 to 5")
    fitted.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the scorer")
    fitted.add_argument("--encoder", type=Path, metavar="HF_DIR",
                        help="Hugging Face folder of an encoder, in place of n-grams")
    fitted.add_argument("--max-chars", type=int, metavar="N",
                        help=f"characters of a text that are read (default {NgramSettings.max_chars})")
    fitted.add_argument("--max-ngram", type=int, metavar="N",
                        help=f"units of the longest n-gram (default {NgramSettings.max_ngram})")
    fitted.add_argument("--buckets", type=int, metavar="N",
                        help=f"buckets of n-grams, a power of two (default {NgramSettings.num_buckets})")
    fitted.add_argument("--max-tokens", type=int, metavar="N", help="tokens of a text that an encoder reads "
                        f"(default {EncoderSettings.max_tokens})")
    fitted.add_argument("--overwrite", action="store_true", help="replace a scorer that is already there")
    judged = actions.add_parser("check", help="judge a scorer on other labels")
    judged.description = "Print what a scorer is worth on labels that it was not trained on."
    judged.add_argument("model", type=Path, metavar="DIR", help="folder that `sov-data scorer train` wrote")
    judged.add_argument("--labels", required=True, type=Path, metavar="FILE", help=_LABELS)
    judged.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Run `sov-data scorer`; returns 0."""
    from data_prep.scoring.training import TrainSettings, check, train

    if args.action == "check":
        kind, figures = check(args.model, args.labels)
        lines = [json.dumps(figures)] if args.json else [f"{args.model}, a {kind}", *told(kind, figures)]
        print("\n".join(lines))
        return 0
    content = train(TrainSettings(args.labels, args.kind, _features(args), args.encoder), args.output,
                    overwrite=args.overwrite)
    again = content["num_repeated"]
    print(f"{args.labels}: {content['num_labels']:,} texts"
          + (f" ({again:,} lines left out, whose text stood there before)" if again else ""))
    print("\n".join(["held out:", *told(args.kind, content["heldout"])]))
    print(f"wrote {args.output}")
    return 0


def _features(args: argparse.Namespace) -> NgramSettings | EncoderSettings:
    """Return how texts are read.

    Raises:
        UserError: an option belongs to the other way.
    """
    ngrams = {"max_ngram": args.max_ngram, "num_buckets": args.buckets}
    encoder = {"max_tokens": args.max_tokens}
    if args.encoder is not None and any(value is not None for value in ngrams.values()):
        raise UserError("--max-ngram and --buckets are about n-grams, which --encoder takes the place of; "
                        "leave them out")
    if args.encoder is None and args.max_tokens is not None:
        raise UserError("--max-tokens is for an encoder; name one with --encoder, or leave it out")
    given = {name: value for name, value in {**(ngrams if args.encoder is None else encoder),
                                             "max_chars": args.max_chars}.items() if value is not None}
    return NgramSettings(**given) if args.encoder is None else EncoderSettings(**given)
