"""Videos as frames: which are taken, and from what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_sov.documents import BadRecord
from megatron_sov.media.reading.limits import MediaLimits
from megatron_sov.media.reading.videos import VideoFrames, read_video

LIMITS = MediaLimits(duration_s=60.0)


def shades(array: np.ndarray) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in array]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_is_cut_at_the_middle_of_equal_parts(tmp_path: Path, suffix: str) -> None:
    """Frames of 1, 1, 1 and 3 seconds: of 6 seconds three frames stand at 1, 3 and 5 s."""
    frames = [Image.new("RGB", (8, 8), (40 * i,) * 3) for i in range(4)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:],
                   duration=[1000, 1000, 1000, 3000], lossless=True)
    (found,), facts = read_video(tmp_path / f"a{suffix}", VideoFrames(4, most_frames=3), LIMITS)
    assert found.shape == (3, 3, 4, 4) and shades(found) == [40, 120, 120]
    assert facts["duration_s"] == pytest.approx(6.0)


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i,) * 3).save(tmp_path / f"frame-{i}.png")
    (found,), facts = read_video(tmp_path, VideoFrames(4, folder_frames_per_s=2.0), LIMITS)
    assert facts["duration_s"] == 6.0 and shades(found) == [20 * i for i in (1, 3, 5, 7, 9, 11)]


def test_what_is_no_video_is_told(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "many").mkdir()
    for i in range(61):
        (tmp_path / f"many/{i}.png").touch()
    for name, code in {"none": "no_video", "links": "outside", "many": "long"}.items():
        with pytest.raises(BadRecord) as found:
            read_video(tmp_path / name, VideoFrames(4), LIMITS)
        assert found.value.code == code
