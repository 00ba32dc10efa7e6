"""Checkpoints: config mapping, decoder layers, weight loading, tokenizer and chat template."""
