"""Losses and statistics of embeddings: functions without state or parameters. Those over the global batch communicate."""
