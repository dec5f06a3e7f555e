"""Many adapters over one model: the pool, the engine that batches requests, and HTTP in OpenAI's format."""

from .pool import AdapterPool

__all__ = ["AdapterPool"]
