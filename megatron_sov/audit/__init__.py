"""What a run publishes so that others can check it, and how they do: by repeating stretches drawn by lot."""
