"""Everything needed to make the bundled checkpoints again: the corpus, the tokenizer and the training loop.

Run `python -m training.train`. Nothing here is installed with the package or imported by it.
"""
