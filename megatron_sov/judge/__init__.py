"""What says how good an answer is: rewards, tool worlds, and the store of answers and rewards."""
