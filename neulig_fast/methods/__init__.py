"""Merge methods, and what they share."""
