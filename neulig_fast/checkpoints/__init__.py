"""Whole checkpoints: what they hold, checked before a byte of weights is read."""
