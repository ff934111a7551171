"""Upper bounds of settings that work and memory grow with: far above any model or run there has been, so that
a slip of some zeros is refused at once, not noticed when nothing moves."""

from __future__ import annotations

MAX_STEPS = 100_000_000
MAX_TOKENS = 10**16
MAX_BATCH_SIZE = 1_000_000
MAX_SEQ_LEN = 1_000_000_000
MAX_LAYERS = 10_000


def above(where: str, settings: object, **limits: int) -> list[str]:
    """Return one sentence for every field of `settings` that lies above its limit.

    Args:
        where: name of the settings, as in train.
        settings: holds the fields.
        limits: field -> its largest value.
    """
    return [f"{where}.{name} = {getattr(settings, name)} must be at most {limit:,}; count its zeros"
            for name, limit in limits.items() if getattr(settings, name) > limit]
