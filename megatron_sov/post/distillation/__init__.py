"""Distillation: teacher outputs on disk, and losses between student and teacher."""
