"""Claims of published roads as orderings of small runs: written before a run, tested over seeds, told on a
page."""
