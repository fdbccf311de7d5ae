"""Embeddings become figures: retrieval and zero-shot classification, ties counted against the model."""
