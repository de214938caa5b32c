"""The Transformer modules of both dialects."""
