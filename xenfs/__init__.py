"""xenfs: the host. Every descriptor and every trio task is here or in an edge file below."""

__version__ = "0.1.0"
