# What: a data step that changes documents, or leaves them out for a reason that is counted.
# Run:  sov-data pack --tokenizer tokenizer --input corpus.jsonl --output cleaned --step examples/own_data_step.py:without_menus
# See:  the tokens that are left, and how many documents went for which reason.

from dataclasses import replace

from megatron_sov import LeftOut

FEWEST_WORDS = 5


def without_menus(document):
    lines = [line for line in document.text.splitlines() if "|" not in line]
    text = "\n".join(lines)
    return replace(document, text=text) if len(text.split()) >= FEWEST_WORDS else LeftOut("too short")
