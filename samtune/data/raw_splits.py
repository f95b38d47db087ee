"""Splits as a data set has them: encoded images and stored labels, before classes are numbered and roles given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from samtune.data.columns import Columns
from samtune.data.encoded import EncodedImages, FileImages
from samtune.data.labels import Labels

RawSplits = dict[str, tuple[EncodedImages, Labels]]  # name of the split in the data set -> images and labels


@dataclass
class PathSplits:
    """Pictures by split: name -> (paths, labels), picture by picture; notes for the user.

    columns: those of the list that names the pictures; None where their folders are the labels.
    """

    splits: dict[str, tuple[list[str], list[Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    columns: Columns | None = None

    def add(self, split: str, label: Any, paths: Sequence[str]) -> None:
        """Add pictures with one label to a split."""
        all_paths, labels = self.splits.setdefault(split, ([], []))
        all_paths += paths
        labels += [label] * len(paths)

    def raw(self) -> RawSplits:
        """The same with each picture as a file."""
        are_names = self.columns is None
        return {
            split: (FileImages(paths), Labels(None, labels, are_names))
            for split, (paths, labels) in self.splits.items()
        }
