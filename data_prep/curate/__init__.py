"""From raw documents to the sources of a curriculum: read, judged, deduplicated, decontaminated, mixed."""
