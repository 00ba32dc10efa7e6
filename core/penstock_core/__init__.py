"""The core of Penstock: the wire protocol and the inference engine.

`penstock_core.protocol` is all a producer needs and imports no torch. Everything else here is the engine that
workers run: models, paged attention, caches, batching, sampling, speculation, distribution and the pipeline that
joins them. Core opens no HTTP port and imports neither the producer nor the worker.
"""

__version__ = "0.1.0"
