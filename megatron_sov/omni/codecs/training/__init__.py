"""Training codecs: one loop, a task for each kind of codec, media as they are met in training."""
