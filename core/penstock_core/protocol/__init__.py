"""What travels through Redis: requests, jobs, events, their codec, the keys, and the Lua transitions.

Producers and workers share this package and nothing else. It imports no torch and nothing of the engine."""
