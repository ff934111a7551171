"""How well a model gets from one modality to another, judged by what others recognise in what it makes."""
