"""`megatron-sov codec train | import | reconstruct | inspect`: tokenizers, and decoders, of media."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import to_json
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.settings import change

TOKENIZERS, DECODERS = ("image-tokenizer", "audio-tokenizer"), ("image-decoder", "vocoder")
"""What `codec train` makes."""
IMPORTED = ("ta-tok", "cosyvoice2", "nemo-audio")
"""Published tokenizers that `codec import` takes over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text)

    train = action("train", "train a codec from media of your own, or go on where it was killed")
    kinds = (*TOKENIZERS, *DECODERS)
    train.add_argument("kind", choices=kinds, metavar="KIND", help=", ".join(kinds))
    train.add_argument("--input", type=Path, required=True, metavar="DIR_OR_LIST",
                       help="folder of media, searched below it too, or a text file with a path in each line")
    train.add_argument("--output", type=Path, required=True, metavar="DIR",
                       help="codec to write; what is under way lies in DIR.training beside it")
    train.add_argument("--tokenizer", type=Path, metavar="CODEC",
                       help="whose ids a decoder decodes; needed for " + " and ".join(DECODERS))
    train.add_argument("--vae", type=Path, metavar="DIR",
                       help="diffusers' AutoencoderKL in whose latents image-decoder draws; none: in pixels")
    train.add_argument("--encoder", type=Path, metavar="HF_DIR",
                       help="folder of a SigLIP that sees, frozen, in place of an encoder that is learned")
    train.add_argument("--steps", type=int, metavar="N", help="optimizer steps (learning.steps)")
    train.add_argument("--seed", type=int, metavar="N", help="of weights and order (learning.seed)")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                       help="another setting, e.g. model.grid=4 or learning.batch_size=16; may be repeated")
    train.add_argument("--device", choices=("cpu", "cuda"), help="where (default: a GPU where there is one)")
    train.add_argument("--checkpoint-every", type=float, default=60.0, metavar="S",
                       help="seconds between two states that are kept to go on from (default: %(default)s)")
    train.add_argument("--look-every", type=int, default=0, metavar="N",
                       help="steps between two looks at held-out media (default: at the end alone)")
    train.add_argument("--overwrite", action="store_true", help="replace a codec that is already there")

    take = action("import", "write a published tokenizer's files as a codec; nothing in them is run")
    take.add_argument("kind", choices=IMPORTED, metavar="KIND", help=", ".join(IMPORTED))
    take.add_argument("source", type=Path, metavar="FILE_OR_DIR", help="what was downloaded")
    take.add_argument("output", type=Path, metavar="DIR", help="codec to write")
    take.add_argument("--overwrite", action="store_true", help="replace a codec that is already there")

    again = action("reconstruct", "write what a decoder makes of media's tokens")
    again.add_argument("codec", type=Path, metavar="CODEC", help="folder of a tokenizer")
    again.add_argument("files", type=Path, nargs="+", metavar="FILE", help="pictures or sounds")
    again.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write files into")
    again.add_argument("--decoder", type=Path, metavar="CODEC",
                       help="an image decoder or a vocoder (default: the tokenizer's own plain decoder)")
    again.add_argument("--speaker", metavar="NAME", help="voice of the vocoder (default: its first)")
    again.add_argument("--decoder-steps", type=int, metavar="N", help="of the image decoder's sampler")
    again.add_argument("--seed", type=int, default=0, metavar="N",
                       help="of the image decoder's noise (default: %(default)s)")

    inspect = action("inspect", "show a codec's kind, settings, size and figures")
    inspect.add_argument("codec", type=Path, metavar="CODEC", help="folder of a codec")
    inspect.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "train": _train, "import": _import, "reconstruct": _reconstruct, "inspect": _inspect}
    actions[args.action](args)
    return ExitCode.OK


def _train(args: argparse.Namespace) -> None:
    if not args.checkpoint_every > 0 or args.look_every < 0:
        raise UserError(f"--checkpoint-every {args.checkpoint_every:g}, --look-every {args.look_every}: the "
                        "first must be above 0, the second at least 0")
    changes = [f"learning.{name}={value}" for name, value in (("steps", args.steps), ("seed", args.seed))
               if value is not None]
    figures = (_train_decoder if args.kind in DECODERS else _train_tokenizer)(args, [*changes, *args.changes])
    print(f"wrote codec {args.output}" + (f": held out, {_told(figures)}" if figures else ""))


def _train_tokenizer(args: argparse.Namespace, changes: list[str]) -> dict[str, float]:
    for option, value in (("--tokenizer", args.tokenizer), ("--vae", args.vae)):
        if value is not None:
            raise UserError(f"{option} {value}: is for {', '.join(DECODERS)}; leave it out for {args.kind}")
    from megatron_sov.codecs.training.start import settings_of, train_tokenizer

    settings = change(settings_of(args.kind, args.encoder), changes)
    return train_tokenizer(args.input, args.output, settings, encoder=args.encoder,
                           device=_device(args.device),
                           checkpoint_every_s=args.checkpoint_every, look_every=args.look_every,
                           overwrite=args.overwrite)


def _train_decoder(args: argparse.Namespace, changes: list[str]) -> dict[str, float]:
    if args.tokenizer is None:
        raise UserError(f"codec train {args.kind}: needs --tokenizer CODEC, whose ids are decoded")
    for option, value, kind in (("--vae", args.vae, "image-decoder"),
                                ("--encoder", args.encoder, "image-tokenizer")):
        if value is not None and args.kind != kind:
            raise UserError(f"{option} {value}: is for {kind}; leave it out for {args.kind}")
    from megatron_sov.codecs.training.decoders import SETTINGS, train_decoder

    return train_decoder(args.input, args.output, change(SETTINGS[args.kind], changes), args.tokenizer,
                         vae=args.vae, device=_device(args.device), checkpoint_every_s=args.checkpoint_every,
                         look_every=args.look_every, overwrite=args.overwrite)


def _device(asked: str | None) -> str:
    """Return where to compute."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave it out, or ask `megatron-sov doctor`")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _told(figures: dict[str, Any]) -> str:
    """Return figures as one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _import(args: argparse.Namespace) -> None:
    from megatron_sov.codecs.importing import import_codec

    import_codec(args.kind, args.source, args.output, overwrite=args.overwrite)
    print(f"wrote codec {args.output}")


def _reconstruct(args: argparse.Namespace) -> None:
    from megatron_sov.codecs.reconstruction import Through, reconstruct

    through = Through(args.decoder, args.speaker, args.decoder_steps, args.seed)
    for file in reconstruct(args.codec, args.files, args.output, through):
        print(f"wrote {file}")


def _inspect(args: argparse.Namespace) -> None:
    from megatron_sov.codecs.inspection import inspected

    facts = inspected(args.codec)
    if args.json:
        print(to_json(facts), end="")
        return
    print(f"kind        {facts['codec']}\nparameters  {facts['num_parameters']:,}")
    for title, group in (("settings", facts["config"]), ("held out", facts["heldout"])):
        for name, value in group.items():
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            print(f"{title:<11} {name} = {text}")
