"""Where a step of SAM pays: AE-SAM's rule (Jiang et al. 2023, arXiv 2304.14647, section 4)."""

import math

import torch

_DECAY = 0.9  # of the moving mean and variance, as in the paper
_FIRST = (0.0, math.exp(-10))


class GradientRule:
    """SAM only where ||g1||^2, the squared norm of the gradient at w, is large for this part of the run.

    With x = ||g1||^2, mean = 0.9 mean + 0.1 x and variance = 0.9 variance + 0.1 (x - mean)^2, a step is one of SAM if
    x >= mean + c sqrt(variance); else the optimizer steps with g1, which is there already.

    c: in standard deviations; the paper lowers it from 1 to -1 over a run. state: (mean, variance), which belongs to
    the state of a run.
    """

    def __init__(self, c: float) -> None:
        self.c = c
        self.state = _FIRST

    def __call__(self, g1: list[torch.Tensor]) -> bool:
        """Whether to perturb. It waits for the device. A norm that is not finite changes nothing, and perturbs."""
        x = float(torch.nn.utils.get_total_norm(g1)) ** 2
        if not math.isfinite(x):
            return True
        mean, variance = self.state
        mean = _DECAY * mean + (1 - _DECAY) * x
        variance = _DECAY * variance + (1 - _DECAY) * (x - mean) ** 2
        self.state = mean, variance
        return x >= mean + self.c * math.sqrt(variance)
