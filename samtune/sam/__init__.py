"""Sharpness-Aware Minimization: the perturbation, the gradient of Algorithm 1, one update."""
