"""How the images of a step are divided among devices, and which of them share a perturbation."""

from dataclasses import dataclass

from samtune.config.run_config import RunConfig
from samtune.data.splits import Indices
from samtune.errors import UsageError, plural


@dataclass(frozen=True)
class BatchPlan:
    """Images of a step: `part` at once on each device, `parts` times, `total` on all devices together.

    total is smaller if the data set has fewer images.
    """

    part: int
    devices: int
    parts: int
    total: int

    @classmethod
    def of(cls, config: RunConfig, devices: int, train_images: int) -> "BatchPlan":
        """The plan of a config. Raises UsageError if the batch cannot be divided evenly."""
        total = config.global_batch_size
        if total is None:
            return cls(config.device_batch, devices, 1, min(config.device_batch * devices, train_images))
        part = config.device_batch if config.origins.get("batch_size", "default") != "default" else total // devices
        if part == 0 or total % (part * devices):
            raise UsageError(
                f"--global-batch-size {total} cannot be divided evenly",
                f"by {plural(devices, 'device')}" + (f" and --batch-size {part}" if part else ""),
                f"give a multiple of {max(1, part) * devices}, or leave --batch-size out",
            )
        return cls(part, devices, total // (part * devices), min(total, train_images))

    @property
    def per_device(self) -> int:
        """Images of a step on a device, where the data set has enough."""
        return self.part * self.parts

    @property
    def nominal(self) -> int:
        """Images of a step on all devices, where the data set has enough."""
        return self.per_device * self.devices

    def words(self) -> str:
        """As in "256 images (32 per device x 4 devices x 2 micro-batches = 256)"."""
        if self.devices == 1 and self.parts == 1:
            return plural(self.total, "image")
        factors = [f"{self.part} per device", plural(self.devices, "device")]
        factors += [plural(self.parts, "micro-batch")] if self.parts > 1 else []
        return f"{plural(self.total, 'image')} ({' x '.join(factors)} = {self.nominal})"

    def share(self, rows: Indices, rank: int) -> Indices:
        """The rows of one rank in a step: consecutive, as one device would divide them.

        A rank that has none left gets one row, which its weight of 0 leaves out.
        """
        even, more = divmod(len(rows), self.devices)
        end = (rank + 1) * even + min(rank + 1, more)
        own = rows[end - even - (rank < more) : end]
        return own if len(own) else rows[:1]

    def weight(self, rank: int) -> float:
        """Images of a rank over their mean over the ranks."""
        even, more = divmod(self.total, self.devices)
        return (even + (rank < more)) * self.devices / self.total

    def sharing(self, m: int | str) -> int:
        """How many images share a perturbation, where --m is this. Raises UsageError for more than there are."""
        if isinstance(m, int):
            if m > self.per_device:
                raise UsageError(
                    f"--m {m} is more than the {plural(self.per_device, 'image')} of a device", hint="give less"
                )
            return m
        if m.startswith("group:"):
            size = group_size(m)
            if self.devices % size:
                raise UsageError(
                    f"--m {m} with {plural(self.devices, 'device')}",
                    "groups of devices are of one size",
                    f"give a divisor of {self.devices}",
                )
            return size * self.per_device
        return self.nominal if m == "global" else self.part


def group_size(m: str) -> int:
    """group:4 -> 4."""
    return int(m.removeprefix("group:"))
