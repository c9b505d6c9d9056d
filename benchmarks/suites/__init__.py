"""asv benchmarks. Each class is one question; what does not exist on a machine or a commit is skipped."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

# asv knows this folder alone. Behind everything else, so that the curvlib that it has installed comes first.
sys.path.append(str(Path(__file__).parents[2]))
