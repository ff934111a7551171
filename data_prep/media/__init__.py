"""From records that name pictures, sounds and videos to text and banks that `sov-data pack` reads."""
