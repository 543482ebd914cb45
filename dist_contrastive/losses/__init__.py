"""Losses and statistics: pure functions of embeddings."""
