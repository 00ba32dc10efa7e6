"""The worker: claims jobs when it has room, runs the engine, publishes tokens and results."""
