"""The door: `sov-data COMMAND ...`."""

from __future__ import annotations

import sys

from megatron_sov.base.command_line import Command, Parser, parser_of, run_program

COMMANDS = {
    "run": Command("data_prep.curate.run",
                   "run a pipeline from raw documents to the sources of a curriculum"),
    "synth": Command("data_prep.synth.command",
                     "make data with models: checked, with provenance, restartable"),
    "encode-media": Command("data_prep.media.running",
                            "turn records that name pictures, sounds and videos into text and banks to pack"),
    "pack": Command("data_prep.shards.pack", "turn text, chats, preferences or prompts into token shards"),
    "adopt": Command("data_prep.shards.adopt",
                     "take over token shards that Megatron-LM's preprocess_data wrote"),
    "mix": Command("data_prep.shards.mix", "join token shards of several folders into one, with weights"),
    "inspect": Command("data_prep.curate.journey.inspect_command",
                       "show what token shards hold; a document's way through a "
                       "pipeline, and why it was dropped"),
    "report": Command("data_prep.curate.journey.report_command",
                      "write the HTML report of what `sov-data run` or `sov-data synth` did"),
    "card": Command("data_prep.curate.journey.card.card_command",
                    "write the public summary of data: sources, licences, "
                    "languages, filters, hashes, counts"),
    "stats": Command("data_prep.shards.stats",
                     "show lengths of documents, token types and special tokens, per source"),
    "sample": Command("data_prep.shards.sample", "print documents, decoded, with their loss mask"),
    "verify": Command("data_prep.shards.verify",
                      "check token shards: hashes, indices, ids, splits, duplicates, epochs"),
    "trajectories": Command("data_prep.responses.trajectories",
                            "join each query with its diverse solutions to one document"),
    "groups": Command("data_prep.responses.groups", "give each of a prompt's judged responses its advantage"),
    "pairs": Command("data_prep.responses.pairs",
                     "pair the best and the worst of each prompt's judged responses"),
    "unpaired": Command("data_prep.responses.unpaired",
                        "put each judged response beside one to another prompt, for KTO"),
    "scorer": Command("data_prep.curate.scorer",
                      "train a quality classifier or an educational regressor on your labels, or judge one"),
    "difficulty": Command("data_prep.synth.difficulty.command",
                          "put measured pass rates together, fit an estimator of "
                          "difficulty, write difficulty into rows"),
    "probing-sets": Command("data_prep.synth.generators.probes",
                            "freeze problems of `synth probes` into sets that are not in the training input"),
    "decontaminate": Command("data_prep.curate.decontaminate",
                             "leave out records that hold text of benchmarks"),
    "demo-corpus": Command("data_prep.demo_corpus",
                           "gather a small corpus from what this machine has, or from your own files"),
}


def build_parser() -> Parser:
    return parser_of("sov-data", "Prepare text for training.", COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run `sov-data`; a `UserError` becomes one message and exit code 2."""
    return run_program(build_parser(), COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
