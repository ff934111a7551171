"""How well a model gets from one modality to another: what it makes is judged by what others recognise in it."""
