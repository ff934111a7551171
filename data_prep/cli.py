"""The program `sov-data COMMAND ...`."""

import sys

from megatron_sov.base.command_line import Command, Parser, build_program_parser, run_program

DOCUMENTS, RESPONSES, SHARDS, LOOK = (
    "from raw documents", "prompts and responses", "token shards", "look and check")
"""Headings in `--help`."""
COMMANDS = {
    "demo-corpus": Command(
        "data_prep.demo_corpus:DEMO_CORPUS", "gather a small corpus from this machine or from your own files",
        DOCUMENTS, "data.md",
        ("demo-corpus --output corpus", "demo-corpus --input my-texts --output corpus")),
    "run": Command(
        "data_prep.curate.pipeline.command:RUN",
        "run a pipeline from raw documents to curriculum sources", DOCUMENTS, "data_pipeline.md",
        ("run notes.yaml --output corpus --dry-run", "run notes.yaml --output corpus --workers 8")),
    "scorer": Command(
        "data_prep.curate.scorer:SCORER",
        "train a quality classifier or an educational regressor on your labels, or judge one",
        DOCUMENTS, "data_quality.md",
        ("scorer train --labels quality.jsonl --kind classifier --output quality-model",
         "scorer check quality-model --labels others.jsonl")),
    "decontaminate": Command(
        "data_prep.curate.decontaminate:DECONTAMINATE", "leave out records that hold benchmark text",
        DOCUMENTS, "data_quality.md",
        ("decontaminate --input traces.jsonl --benchmarks aime25.jsonl --output clean",
         "decontaminate --input chats.jsonl --format chat --benchmarks bench.jsonl --output clean")),
    "encode-media": Command(
        "data_prep.media.encode_media:ENCODE_MEDIA",
        "turn records that name pictures, sounds and videos into text and banks to pack",
        DOCUMENTS, "omni.md",
        ("encode-media --input records.jsonl --media-root media --image-tokenizer images --output made",
         "encode-media --input records.jsonl --media-root media --audio-tokenizer sounds --output made")),
    "synth": Command(
        "data_prep.synth.synth:SYNTH", "make data with models: checked, with provenance, restartable",
        RESPONSES, "synth.md",
        ("synth --list", "synth rewrite --input documents.jsonl --engine my-model --output rewritten")),
    "difficulty": Command(
        "data_prep.synth.difficulty:DIFFICULTY",
        "label problems by the models that solved them, and write difficulty into rows",
        RESPONSES, "synth_generators.md",
        ("difficulty label --answers small large --output labels",
         "difficulty grade --input problems.jsonl --model estimator --output graded")),
    "trajectories": Command(
        "data_prep.responses.trajectories:TRAJECTORIES",
        "join each query with its diverse solutions to one document", RESPONSES, "data.md",
        ("trajectories --input solutions.jsonl --output trajectories",
         "trajectories --input solutions.jsonl --output trajectories --overwrite")),
    "groups": Command(
        "data_prep.responses.groups:GROUPS", "compute advantages for each prompt's judged responses",
        RESPONSES, "prefer.md",
        ("groups --input judged.jsonl --output groups",
         "groups --input judged.jsonl --output groups --overwrite")),
    "pairs": Command(
        "data_prep.responses.pairs:PAIRS", "pair the best and worst judged response for each prompt",
        RESPONSES, "prefer.md",
        ("pairs --input scored.jsonl --output pairs",
         "pairs --input scored.jsonl --output pairs --overwrite")),
    "pack": Command(
        "data_prep.shards.pack:PACK", "turn text, chats, preferences or prompts into token shards",
        SHARDS, "data.md",
        ("pack --tokenizer tokenizer --input corpus/english.jsonl --output tokens",
         "pack --tokenizer tokenizer --input chats.jsonl --format chat --output chats")),
    "adopt": Command(
        "data_prep.shards.adopt:ADOPT", "take over token shards that Megatron-LM's preprocess_data wrote",
        SHARDS, "convert.md",
        ("adopt /their/code_text_document --tokenizer tokenizer --output tokens",
         "adopt web=/their/web_text_document --tokenizer tokenizer --output tokens")),
    "mix": Command(
        "data_prep.shards.mix:MIX", "join token shards from several folders into one, with weights",
        SHARDS, "curriculum.md",
        ("mix tokens:0.8 chats:0.2 --output mixed",
         "mix tokens --blend solar-open --output mixed --dry-run")),
    "inspect": Command(
        "data_prep.curate.inspect:INSPECT",
        "show the documents in token shards, or the kept and dropped records per pipeline step",
        LOOK, "watching.md", ("inspect tokens", "inspect corpus")),
    "stats": Command(
        "data_prep.shards.stats:STATS", "show document lengths, token types and special tokens, per source",
        LOOK, "data.md", ("stats tokens", "stats chats")),
    "sample": Command(
        "data_prep.shards.sample:SAMPLE", "print documents, decoded, with their loss mask",
        LOOK, "data.md", ("sample chats --count 2", "sample tokens --count 1")),
    "verify": Command(
        "data_prep.shards.verify:VERIFY", "check token shards: hashes, indices, ids, splits, duplicates",
        LOOK, "data.md", ("verify tokens", "verify mixed"))}


def build_parser() -> Parser:
    return build_program_parser("sov-data", "Prepare text for training.", COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run `sov-data`; a `UserError` becomes one message and exit code 2."""
    return run_program(build_parser(), COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
