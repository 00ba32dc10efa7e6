"""Penstock: push LLM generation jobs onto Redis, get token streams back, lose nothing."""
