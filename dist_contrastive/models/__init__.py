"""Encoders, heads and teachers."""
