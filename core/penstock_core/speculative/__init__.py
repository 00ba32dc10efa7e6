"""Drafting several tokens a step without ever changing the output."""
