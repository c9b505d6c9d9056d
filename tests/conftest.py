"""Shared set-up. `from truth import ...` works because pytest puts this directory on sys.path."""

import os

import pytest
from hypothesis import settings

from curvlib.arrays import products

settings.register_profile("default", deadline=None, derandomize=True, max_examples=200, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


ROOMS_OF_SMALL_NETWORKS = {"arrays", "contract", "factors", "failure", "precond", "solvers"}


@pytest.fixture(autouse=True)
def products_are_left_to_later(request, monkeypatch):
    """Small ones too in these rooms, as of large layers; elsewhere, where processes compare bits, as it is."""
    if request.path.parent.name in ROOMS_OF_SMALL_NETWORKS:
        monkeypatch.setattr(products, "_WORTH", 1)


def pytest_collection_modifyitems(config, items):
    """Leave out what takes minutes, unless ``-m`` asks for it."""
    if "nightly" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
