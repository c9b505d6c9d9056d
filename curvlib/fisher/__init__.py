"""Likelihoods of the network's outputs, and which output cotangents define the curvature."""

from curvlib.fisher.kinds import Empirical, Exact, Fisher, Sampled
from curvlib.fisher.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

__all__ = ["Bernoulli", "Categorical", "Empirical", "Exact", "Fisher", "Gaussian", "Likelihood", "Sampled"]
