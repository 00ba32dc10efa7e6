"""Paged attention: one interface, a CPU and a CUDA implementation."""
