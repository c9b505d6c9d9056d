"""asv benchmarks. Each class is one question; what does not exist on a machine or a commit is skipped."""

import os
import sys
from pathlib import Path

# Read when torch and NumPy are imported: as many threads as `blocks.pin` gives torch, none of which spins on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("CURVLIB_BENCHMARK_THREADS", "2"))
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

# asv knows this folder alone. Behind everything else, so that the curvlib that it has installed comes first.
sys.path.append(str(Path(__file__).parents[2]))
