"""For all tests: an example of hypothesis may take as long as it needs. What measures time says so itself."""

from __future__ import annotations

from hypothesis import settings

# By default more than 200 ms are a failure, which on a busy machine any example can be. Else it stays as it is, for CI too.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")
