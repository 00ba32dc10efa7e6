"""The engine that runs one model over one or several ranks."""
