"""Shared set-up. `from truth import ...` works because pytest puts this directory on sys.path."""

import os

from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=200, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
