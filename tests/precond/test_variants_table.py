"""The committed table of variants is what the recipes say."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_committed_table_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_variants", DOCS / "generate_variants.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / "variants.md").read_text(encoding="utf-8") == script.text(), "run python docs/generate_variants.py"
