"""The numbers of `samtune sharpness` for one model: loss, m-sharpness, spectrum of the Hessian, slices."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from samtune.data.transforms import model_input
from samtune.distributed import collectives
from samtune.errors import Diverged
from samtune.sam.filters import select_parameters
from samtune.sam.perturbation import Perturbation
from samtune.sam.second_derivative import HESSIAN_PASSES
from samtune.sharpness import slices
from samtune.sharpness.directions import random_directions
from samtune.sharpness.hessian import Hessian
from samtune.sharpness.lanczos import Lanczos, Spectrum, continued_to_top, spectrum_of, take_steps
from samtune.sharpness.m_sharpness import group_sharpness, mean_over_groups

Progress = Callable[[str, int], None]  # what is measured, and images that went forward and backward since the last call


@dataclass(frozen=True)
class Measures:
    """What to measure, on the same images.

    m: group sizes of m-sharpness; () leaves it out. A size above the number of images is all of them. rho, p, adaptive,
    eta: its ball, as in a run. ascent_steps: passes of its search for the maximum, and of each of its random
    `restarts`. top: number of eigenvalues; 0 leaves them out. tolerance: of their residuals, in units of the largest
    eigenvalue. max_steps: the most Lanczos steps for them; None: 100, or 4 for each if that is more. probes,
    lanczos_steps: number of random vectors for the density, and Lanczos steps from each; 0 probes leave it out.
    slices: 1 for a line, 2 for a plane, 0 for none. points: along each direction. reach: the largest distance, in units
    of the weights' norm, filter by filter. params: pattern of the parameters that m-sharpness and the Hessian are taken
    over. seed: of all random vectors. micro_batch: images that pass through the model at once.
    """

    m: tuple[int, ...] = ()
    rho: float = 0.05
    p: float = 2.0
    adaptive: bool = False
    eta: float = 0.01
    ascent_steps: int = 20
    restarts: int = 1
    top: int = 0
    tolerance: float = 1e-3
    max_steps: int | None = None
    probes: int = 0
    lanczos_steps: int = 40
    slices: int = 0
    points: int = 21
    reach: float = 1.0
    params: str = "all"
    seed: int = 0
    micro_batch: int = 32

    def sizes(self, n: int) -> list[int]:
        """The group sizes for n images."""
        return list(dict.fromkeys(min(m, n) for m in self.m))

    @property
    def most_steps(self) -> int:
        """The most Lanczos steps for the largest eigenvalues."""
        return max(100, 4 * self.top) if self.max_steps is None else self.max_steps

    @property
    def vectors(self) -> int:
        """The most vectors of the Hessian's dimension that are held at once."""
        first = self.most_steps + self.top if self.top else self.lanczos_steps * (self.probes > 0)
        return first + max(0, self.probes - 1) * self.lanczos_steps

    def work(self, n: int) -> int:
        """Upper bound on the images that go forward and backward, for n images: the total of the progress display."""
        each = sum(1 + (1 + self.restarts) * self.ascent_steps for _ in self.sizes(n))
        each += HESSIAN_PASSES * (self.most_steps + self.top if self.top else 0)
        shared = 1 if self.top and self.most_steps >= self.lanczos_steps else 0
        each += HESSIAN_PASSES * max(0, self.probes - shared) * self.lanczos_steps
        points = self.points**self.slices if self.slices else 0
        return n * (1 + each) + n * points // 3

    def line_work(self, n: int) -> int:
        """Images that go forward and backward in `measure_line`, a forward pass counted as a third."""
        return n * len(self.line_positions()) // 3

    def line_positions(self) -> list[float]:
        """Where a line is measured: 0 and 1 are among them, and a quarter more on each side."""
        return _steps(-0.25, 1.25, 6 * max(1, self.points // 4) + 1)


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and the images that its loss is taken over, all on one device.

    images: (n, 3, h, w) uint8. labels: (n,). data_config: timm's, with the normalisation.
    """

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    data_config: Mapping[str, Any]
    channels_last: bool

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats, without label smoothing."""
        return F.cross_entropy(self.logits(images), labels)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(n, classes) in the precision of the weights."""
        inputs = model_input(images, self.data_config, self.channels_last)
        logits: torch.Tensor = self.model(inputs.to(next(self.model.parameters()).dtype))
        return logits

    def parts(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The images and labels of this rank, in parts of `size` images."""
        both = list(zip(self.images.split(size), self.labels.split(size), strict=True))
        return both[collectives.rank() :: collectives.world_size()]


def measure(
    subject: Subject,
    measures: Measures,
    progress: Progress = lambda what, images: None,
    check_stop: Callable[[], None] = lambda: None,
    memory: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield entries of the report one after the other, loss and error first.

    memory: as in `Hessian`, bytes for graphs that are kept between its products.
    check_stop: called on all ranks at the same points; what it raises ends the measurement. Losses are in nats, errors
    in percent, eigenvalues in nats per squared unit of weight.
    """
    n = len(subject.labels)
    loss, error = _score(subject, measures.micro_batch)
    if not math.isfinite(loss):
        raise Diverged(
            "the model's loss is not finite", f"it is {loss}", "measure a checkpoint from before it diverged"
        )
    progress("loss", n)
    yield {"loss": loss, "top1_error": error}
    by_m: list[dict[str, Any]] = []
    for m in measures.sizes(n):
        by_m.append(_m_sharpness(subject, measures, m, progress, check_stop))
        yield {"m_sharpness": by_m}
    params = list(select_parameters(subject.model, measures.params).values())
    hessian = Hessian(subject.loss, params, subject.parts(measures.micro_batch), memory=memory)

    def product(v: torch.Tensor) -> torch.Tensor:
        check_stop()
        progress("Hessian", HESSIAN_PASSES * n)
        return hessian @ v

    # Eigenvalues and density begin with the same probe, whose Lanczos steps serve both.
    first = Lanczos(product, hessian.draw(measures.seed + 1))
    if measures.top:
        yield {"hessian": {"parameters": hessian.dim, **_eigenvalues(first, measures)}}
    if measures.probes:
        others = [Lanczos(product, hessian.draw(measures.seed + 1 + i)) for i in range(1, measures.probes)]
        processes = [take_steps(process, measures.lanczos_steps) for process in (first, *others)]
        yield {"density": _density(spectrum_of(processes), hessian.dim, measures)}
    if measures.slices:
        directions = [
            slices.filter_normalised_direction(subject.model, measures.seed + i) for i in range(measures.slices)
        ]
        at = _steps(-measures.reach, measures.reach, measures.points)
        yield {"slices": _surface(subject, measures, directions, at, progress, check_stop)}


def measure_line(
    subject: Subject,
    other: Mapping[str, torch.Tensor],
    measures: Measures,
    progress: Progress = lambda what, images: None,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Loss and error along the line from a model, at 0, to another state_dict, at 1, and a quarter beyond both."""
    direction = slices.line_to(subject.model, other)
    return _surface(subject, measures, [direction], measures.line_positions(), progress, check_stop)


@torch.no_grad()
def _score(subject: Subject, size: int) -> tuple[float, float]:
    """Mean loss and top-1 error in percent over all images."""
    sums = torch.zeros(3, dtype=torch.float64)
    for images, labels in subject.parts(size):
        logits = subject.logits(images)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        wrong = (logits.argmax(1) != labels).sum()
        sums += torch.stack([loss.double(), wrong.double(), loss.new_tensor(len(labels)).double()]).cpu()
    total, wrong, n = collectives.all_reduce_sum(sums).tolist()
    return total / n, 100 * wrong / n


def _m_sharpness(
    subject: Subject, measures: Measures, m: int, progress: Progress, check_stop: Callable[[], None]
) -> dict[str, Any]:
    named = select_parameters(subject.model, measures.params)
    params = list(named.values())
    adaptive = [measures.adaptive and w.ndim > 1 for w in params]
    perturbation = Perturbation(params, p=measures.p, adaptive=adaptive, eta=measures.eta)
    starts = [random_directions(params, measures.seed + i) for i in range(measures.restarts)]
    groups = list(zip(subject.images.split(m), subject.labels.split(m), strict=True))
    rank, world = collectives.rank(), collectives.world_size()
    found = []

    def count(images: int) -> None:
        progress(f"m-sharpness, m {m}", world * images)
        if world == 1:  # ranks check together, between groups
            check_stop()

    for turn in range(math.ceil(len(groups) / world)):
        check_stop()
        if turn * world + rank < len(groups):
            group = groups[turn * world + rank]
            found.append(
                group_sharpness(
                    subject.loss,
                    perturbation,
                    group,
                    measures.rho,
                    steps=measures.ascent_steps,
                    starts=starts,
                    micro_batch=measures.micro_batch,
                    progress=partial(count, len(group[1])),
                )
            )
    of_all = [group for of_rank in collectives.all_gather_object(found) for group in of_rank]
    return asdict(mean_over_groups(m, of_all))


def _eigenvalues(process: Lanczos, measures: Measures) -> dict[str, Any]:
    found = continued_to_top(process, measures.top, tolerance=measures.tolerance, max_steps=measures.most_steps)
    fifth = found.values[4] if len(found.values) > 4 else None
    return {
        "eigenvalues": found.values,
        "residuals": found.residuals,
        "converged": found.converged,
        "products": found.steps + len(found.values),
        "ratio_1_to_5": found.values[0] / fifth if fifth else None,
    }


def _density(found: Spectrum, dim: int, measures: Measures) -> dict[str, Any]:
    """Nodes and weights of the quadrature for each probe, of which a page draws its curves, and two moments."""
    moments = {}
    for power in (1, 2):
        mean, error = found.moment(power)
        moments[f"moment_{power}"] = {"mean": mean, "standard_error": error if math.isfinite(error) else None}
    return {
        "parameters": dim,
        "probes": measures.probes,
        "lanczos_steps": measures.lanczos_steps,
        "nodes": [nodes.tolist() for nodes in found.nodes],
        "weights": [weights.tolist() for weights in found.weights],
        **moments,
    }


def _surface(
    subject: Subject,
    measures: Measures,
    directions: Sequence[Mapping[str, torch.Tensor]],
    at: Sequence[float],
    progress: Progress,
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    """Loss and error on a line (points,) or a plane (points, points), the first direction along rows."""
    n = len(subject.labels)

    def row(fixed: Sequence[float]) -> list[tuple[float, float]]:
        found = []
        for distance in at:
            check_stop()
            with slices.moved(subject.model, directions, [*fixed, distance]):
                found.append(_score(subject, measures.micro_batch))
            progress("slices", n // 3)
        return found

    rows = [row([])] if len(directions) == 1 else [row([distance]) for distance in at]
    losses, errors = ([[pair[i] for pair in one] for one in rows] for i in (0, 1))
    flat = len(directions) == 1
    return {
        "at": list(at),
        "loss": losses[0] if flat else losses,
        "top1_error": errors[0] if flat else errors,
    }


def _steps(low: float, high: float, points: int) -> list[float]:
    return [round(low + (high - low) * i / (points - 1), 12) for i in range(points)]
