"""Small images of shapes with descriptions, and an image codec for them: `pictures.py:Pictures`,
`:PictureChat`, `:TrainedCodec`."""

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawing import RandomRows

SIDE_PIXELS = 16
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "white": (240, 240, 240)}
PLACES = {"left": (0, 4), "right": (8, 4), "top": (4, 0), "bottom": (4, 8)}
SHAPES = ("square", "disc", "cross")


@dataclass(frozen=True)
class Pictures(RandomRows):
    """Documents of a picture and a sentence about it."""

    folder: str
    """Folder for the picture files."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        from PIL import Image, ImageDraw

        rng, documents = random.Random(self.seed), []
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        for number in range(self.count):
            shape, colour, place = rng.choice(SHAPES), rng.choice([*COLOURS]), rng.choice([*PLACES])
            background = tuple(value // 3 for value in rng.choice([*COLOURS.values()]))
            picture = Image.new("RGB", (SIDE_PIXELS, SIDE_PIXELS), background)
            draw, (x, y) = ImageDraw.Draw(picture), PLACES[place]
            box, paint = (x, y, x + 7, y + 7), COLOURS[colour]
            if shape == "square":
                draw.rectangle(box, fill=paint)
            elif shape == "disc":
                draw.ellipse(box, fill=paint)
            else:
                draw.line((x, y, x + 7, y + 7), fill=paint, width=2)
                draw.line((x, y + 7, x + 7, y), fill=paint, width=2)
            picture.save(Path(self.folder) / f"{number:05d}.png")
            documents.append({"content": [{"type": "image", "path": f"{number:05d}.png"},
                                          {"type": "text", "text": f"A {colour} {shape} at the {place}."}]})
        return documents


@dataclass(frozen=True)
class PictureChat:
    """A question about a picture, and its sentence as the answer."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        picture, description = row["content"]
        question = {"type": "text", "text": "What is shown?"}
        return {"messages": [{"role": "user", "content": [picture, question]},
                             {"role": "assistant", "content": description["text"]}]}


@dataclass(frozen=True)
class TrainedCodec:
    """Trains a VQModel with benchmarks/omni/train_codec.py, and writes its folder."""

    source: str
    """Folder of pictures."""
    output: str
    steps: int
    codes: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        sys.path.append(str(Path(__file__).resolve().parents[1] / "omni"))
        from train_codec import train_codec

        train_codec("pictures", Path(self.source), Path(self.output), self.steps, self.codes)
        return [{"text": self.output}]
