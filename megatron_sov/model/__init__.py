"""What a model is, before anything computes: settings, families and their weight maps, recipes."""
