"""One file for each kind of data: what is asked, how the answer is read, and what has to hold of it."""
