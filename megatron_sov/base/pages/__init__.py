"""Pages for people: one HTML file that opens without a network, with tables and charts in light and dark;
and text of strangers for Markdown."""
