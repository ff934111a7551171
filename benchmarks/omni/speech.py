"""Synthesize words with espeak-ng, and recognize them with PocketSphinx, to score generated speech.

PocketSphinx has a model of American English; its grammar allows one word of a list.
"""

import ctypes
from functools import cache
from math import gcd
from typing import Any

import numpy as np
from scipy.signal import resample_poly

SAMPLE_RATE_HZ = 16_000
ENGLISH, KOREAN = "en-us", "ko"
"""Names of espeak-ng's voices."""
SILENCE_S = 0.25
"""Silence before and after a word, from which PocketSphinx estimates noise."""
_SYNCHRONOUS, _UTF8, _CHARACTERS, _RATE, _PITCH = 2, 1, 1, 1, 3  # of speak_lib.h


def synthesize_speech(text: str, voice: str, pitch: int, speed_wpm: int
                      ) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return speech at `SAMPLE_RATE_HZ`, float32 in -1..1, one channel; equal arguments give equal samples.

    Raises:
        ValueError: espeak-ng has no such voice.
    """
    import espeakng_loader

    chunks: list[np.ndarray[Any, Any]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def append_samples(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    # the library keeps its position in wave tables between sentences, even after espeak_Terminate; only a
    # newly loaded library (10 ms) gives the same samples for the same call
    system, espeak = ctypes.CDLL(None), ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate_hz = espeak.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"voice {voice!r}: espeak-ng has no voice of this name")
        espeak.espeak_SetSynthCallback(append_samples)
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
        espeak.espeak_SetParameter(_RATE, speed_wpm, 0)
        espeak.espeak_SetParameter(_PITCH, pitch, 0)
        raw = text.encode()
        espeak.espeak_Synth(raw, ctypes.c_size_t(len(raw) + 1), 0, _CHARACTERS, 0, _UTF8, None, None)
        espeak.espeak_Synchronize()
        espeak.espeak_Terminate()
    finally:
        system.dlclose(ctypes.c_void_p(espeak._handle))
    sound = np.concatenate(chunks).astype(np.float64) / 32768
    divisor = gcd(rate_hz, SAMPLE_RATE_HZ)
    resampled = resample_poly(sound, SAMPLE_RATE_HZ // divisor, rate_hz // divisor)
    return np.clip(resampled, -1, 1).astype(np.float32)


@cache
def _build_decoder(words: tuple[str, ...]) -> Any:
    from pocketsphinx import Decoder

    decoder = Decoder(lm=None, samprate=SAMPLE_RATE_HZ, loglevel="FATAL")
    grammar = f"#JSGF V1.0;\ngrammar words;\npublic <word> = {' | '.join(words)};\n"
    decoder.add_jsgf_string("words", grammar)
    decoder.activate_search("words")
    return decoder


def recognize_english(sound: np.ndarray[Any, Any], words: tuple[str, ...]) -> str:
    """Return the word of `words` in a sound at `SAMPLE_RATE_HZ`, or "" if PocketSphinx recognizes none.

    The result does not depend on earlier sounds.
    """
    decoder = _build_decoder(words)
    decoder.reinit_feat()
    padded = np.pad(np.asarray(sound), round(SILENCE_S * SAMPLE_RATE_HZ))
    samples = (np.clip(padded, -1, 1) * 32767).astype("<i2")
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    result = decoder.hyp()
    return result.hypstr if result is not None else ""
