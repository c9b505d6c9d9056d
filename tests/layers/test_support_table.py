"""The committed table of supported layers is what the registry says."""

import importlib.util
from pathlib import Path

import pytest
from torch import nn

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch lacks a class of the committed table")
def test_the_committed_table_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_support", DOCS / "generate_support.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    committed = (DOCS / "support.md").read_text(encoding="utf-8")
    assert committed == script.support_table(), "run python docs/generate_support.py"
