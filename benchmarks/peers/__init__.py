"""The same job on other queues: 128 integers in, 32 out, nothing done in between.

One file per peer. Each is both its worker's application and, run as a script, its producer; each runs in a virtual
environment of its own (`make bench-peers`), so these files import their queue and the standard library only.
"""
