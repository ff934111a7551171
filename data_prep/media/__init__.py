"""Turn records that name pictures, sounds and videos into text and banks for `sov-data pack`."""
