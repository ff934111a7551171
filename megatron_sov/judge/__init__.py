"""What says how good a response is: rewards and tool worlds."""
