"""TRL's packing beside ours: how full its rows are, what it gains, and whether it changes a sample.

Usage: python benchmarks/packing_trl.py --trl FOLDER [--documents 48] [--turns 3]

FOLDER is where trl 1.16.0 was installed (`pip install --target FOLDER trl==1.16.0`).  The samples are those
of `packing.py`, whose table of our ways comes first; the model of TRL's SFTTrainer is the same one, exported
to Hugging Face.  TRL's ways are
  bfd      packing_strategy "bfd": whole samples by best fit decreasing, one flat row without padding
  wrapped  packing_strategy "wrapped": samples end to end, cut at SEQ_LEN, which see one another
  flat     padding_free: BATCH samples at a time as one row
  batch    BATCH samples at a time, each padded to the longest of them: no packing
each a forward and a backward pass of `SFTTrainer.training_step` on rows of its own data set and collator.
On a GPU TRL asks for flash attention; on a CPU transformers' scaled dot product is handed a mask from the
positions, which is as exact and pays for the whole square of a row.  Tokens per second count the samples' own
tokens by CPU time: of two engines compare the columns of ratios, not the speeds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import packing
from packing import BATCH, RECIPE, SEQ_LEN, Documents

from megatron_sov import recipes
from megatron_sov.engine.parallel import launcher, world

WAYS: dict[str, dict[str, Any]] = {
    "bfd": {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 1},
    "flat": {"padding_free": True, "max_length": None, "per_device_train_batch_size": BATCH},
    "batch": {"per_device_train_batch_size": BATCH},
}


def measure_ours(held: Documents, turns: int, out: Path) -> None:
    """Print our table and leave the model as a checkpoint; runs inside a rank."""
    from megatron_sov.checkpoint import load
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig())
    packing.measure_speed(held, turns)
    load.save(out, packing.built("fp32"), None, {"step": 0, "tokens": 0}, recipes.get(RECIPE).to_dict(), None)
    world.leave()


def tokenizer_of(vocab_size: int) -> Any:
    """Return a tokenizer of so many ids, of which the trainer wants the one that pads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(vocab_size)}, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<0>")


def trainer_of(hf: Path, held: Documents, way: str, out: Path) -> Any:
    """Return TRL's trainer for one of its ways, with rows and model."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**{"max_length": SEQ_LEN, **WAYS[way]}, output_dir=str(out), use_cpu=True, bf16=False,
                       gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_dict({"input_ids": list(held)}),
                         processing_class=tokenizer_of(model.config.vocab_size))
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def batches_of(trainer: Any) -> list[dict[str, Any]]:
    """Return its rows, collated in the order of its data set."""
    rows, size = list(trainer.train_dataset), trainer.args.per_device_train_batch_size
    return [trainer.data_collator(rows[i:i + size]) for i in range(0, len(rows), size)]


def measure_speed(trainers: dict[str, Any], held: Documents, turns: int) -> None:
    """Print a line for each of TRL's ways."""
    batches = {way: batches_of(trainer) for way, trainer in trainers.items()}
    seconds = packing.timed(
        batches, turns, lambda way, batch: trainers[way].training_step(trainers[way].model, dict(batch)),
        lambda way: trainers[way].model.zero_grad())
    print(f"\nTRL {version('trl')}, transformers {version('transformers')}, the same model and samples\n")
    packing.tell_speed({way: sum(batch["input_ids"].numel() for batch in found)
                        for way, found in batches.items()}, seconds, sum(map(len, held)), "bfd")


def measure_difference(trainer: Any, held: Documents, way: str) -> None:
    """Print the largest difference of a packed sample's logits from its own alone."""
    import torch

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        return found

    model, worst, largest = trainer.model.eval(), 0.0, 0.0
    alone = {tuple(d): logits(torch.tensor([d]), torch.arange(len(d))[None]) for d in held}
    rows = batches_of(trainer)
    ids = torch.cat([row["input_ids"][0] for row in rows])
    together = torch.cat([logits(row["input_ids"], row["position_ids"] if "position_ids" in row else
                                 torch.arange(row["input_ids"].numel())[None]) for row in rows])
    # wrapped rows hold the samples in their order; of the others each says how long its own are
    lengths = ([n for row in trainer.train_dataset for n in row["seq_lengths"]] if way == "bfd"
               else [len(d) for d in held])
    for document, part in zip(ids.split(lengths), together.split(lengths), strict=True):
        own = alone[tuple(document.tolist())]
        worst, largest = max(worst, float((part - own).abs().max())), max(largest, float(own.abs().max()))
    print(f"max |packed - alone| logit, {way}: {worst:.1e} (largest logit {largest:.2f})", flush=True)


def version(package: str) -> str:
    """Return a package's version."""
    from importlib.metadata import version as installed

    return installed(package)


def main() -> None:
    """Measure ours on one rank, then TRL's here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trl", type=Path, required=True, help="where trl was installed")
    args = packing.begun(parser)
    held = packing.documents(args.documents, recipes.get(RECIPE).model.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        code = launcher.launch(lambda: measure_ours(held, args.turns, work / "checkpoint"), 1, num_threads=1)
        if code:
            sys.exit(code)
        import torch

        from megatron_sov.convert import to_hf

        torch.set_num_threads(1)
        to_hf(work / "checkpoint", work / "hf")
        sys.path.append(str(args.trl))
        trainers = {way: trainer_of(work / "hf", held, way, work / way) for way in WAYS}
        measure_speed(trainers, held, args.turns)
        print()
        with torch.no_grad():
            for way in ("bfd", "wrapped"):
                measure_difference(trainers[way], held, way)


if __name__ == "__main__":
    main()
