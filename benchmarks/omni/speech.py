"""Speech with known words, and an independent recognizer to score generated speech.

espeak-ng speaks (any of its voices; `en-us` and `ko` are used), PocketSphinx hears: one of a list of words,
by a grammar, with its American English model.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import Any

import numpy as np
from scipy.signal import resample_poly

SAMPLE_RATE_HZ = 16_000
ENGLISH, KOREAN = "en-us", "ko"
"""Names of espeak-ng's voices."""
WORDS = ("zero", "one", "two", "three", "four", "five", "hello", "summer", "window", "yellow",
         "lemon")
"""Words that are told from each other in this speech; six to nine, for instance, are not."""
SILENCE_S = 0.25
"""Before and behind a word; the recogniser's noise estimate needs it."""
_SYNCHRONOUS, _UTF8, _CHARACTERS, _RATE, _PITCH = 2, 1, 1, 1, 3  # of speak_lib.h


def say(text: str, voice: str = ENGLISH, pitch: int = 50,
        speed_wpm: int = 140) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return speech at `SAMPLE_RATE_HZ`, float32 in -1..1, one channel: a function of the arguments.

    Raises:
        ValueError: espeak-ng has no such voice.
    """
    import espeakng_loader

    parts: list[np.ndarray[Any, Any]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def take(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    # the library keeps the place in its wave tables between sentences, even over espeak_Terminate; only when
    # it is loaded afresh (10 ms) does the same call give the same samples
    system, espeak = ctypes.CDLL(None), ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate_hz = espeak.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"voice {voice!r}: espeak-ng has none of this name")
        espeak.espeak_SetSynthCallback(take)
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
        espeak.espeak_SetParameter(_RATE, speed_wpm, 0)
        espeak.espeak_SetParameter(_PITCH, pitch, 0)
        raw = text.encode()
        espeak.espeak_Synth(raw, ctypes.c_size_t(len(raw) + 1), 0, _CHARACTERS, 0, _UTF8, None, None)
        espeak.espeak_Synchronize()
        espeak.espeak_Terminate()
    finally:
        system.dlclose(ctypes.c_void_p(espeak._handle))
    sound = np.concatenate(parts).astype(np.float64) / 32768
    by = gcd(rate_hz, SAMPLE_RATE_HZ)
    return np.clip(resample_poly(sound, SAMPLE_RATE_HZ // by, rate_hz // by), -1, 1).astype(np.float32)


def with_silence(sound: np.ndarray[Any, Any], silence_s: float = SILENCE_S) -> np.ndarray[Any, Any]:
    """Return a sound with silence before and after it."""
    return np.pad(sound, round(silence_s * SAMPLE_RATE_HZ))


@cache
def _decoder(words: tuple[str, ...]) -> Any:
    from pocketsphinx import Decoder

    decoder = Decoder(lm=None, samprate=SAMPLE_RATE_HZ, loglevel="FATAL")
    grammar = f"#JSGF V1.0;\ngrammar words;\npublic <word> = {' | '.join(words)};\n"
    decoder.add_jsgf_string("words", grammar)
    decoder.activate_search("words")
    return decoder


def recognise(sound: np.ndarray[Any, Any], words: Sequence[str] = WORDS) -> str:
    """Return which of the words is heard in a sound at `SAMPLE_RATE_HZ`; "" where it is none.

    Silence is put around it.  A sound's verdict does not depend on what was heard before.
    """
    decoder = _decoder(tuple(words))
    decoder.reinit_feat()
    samples = (np.clip(with_silence(np.asarray(sound)), -1, 1) * 32767).astype("<i2")
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    result = decoder.hyp()
    return result.hypstr if result is not None else ""
