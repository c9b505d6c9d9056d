"""Step times of curvlib and its peers on four workloads, interleaved with SGD in the same process."""
