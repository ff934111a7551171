"""Claims of the seeds, a file for each, and the questions that their commands ask."""
