"""Personal data in text: what is found, how it is proven, and what stands in its place."""
