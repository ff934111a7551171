"""Pictures and sounds: their files, tokens and networks."""
