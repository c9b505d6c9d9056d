"""Shared set-up. `from truth import ...` works because pytest puts this directory on sys.path."""

import os

from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=200, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config, items):
    """Leave out what takes minutes, unless ``-m`` asks for it."""
    if "nightly" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
