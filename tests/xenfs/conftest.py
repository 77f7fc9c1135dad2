"""Fixtures of storepeers.py, for the tests of this folder that ask for them."""

from __future__ import annotations

from tests.xenfs.storepeers import ours, serve, store

__all__ = ["ours", "serve", "store"]
