"""Media files, media items in text, and banks of media records."""
