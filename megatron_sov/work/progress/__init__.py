"""Work that is kept: jobs, journals, parts, locks, claims, and the bars that show how far it is."""
