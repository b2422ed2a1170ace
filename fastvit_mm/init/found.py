"""What `fastvit init` has found, for any task."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Found:
    """A data set whose images have been divided for training and validation.

    Attributes:
        layout: what it is, in words.
        root: the folder to which its files are relative.
        classes: their names, in the order of the labels.
        splits: the samples of train, val and, if there is one, test: (image, label), (image, mask),
            or images in COCO's form with their ``annotations``.
        how: where the splits are from.
        lines: what else the user should know.
        details: of one task: see its module.
    """

    layout: str
    root: Path
    classes: tuple[str, ...]
    splits: dict[str, list]
    how: str
    lines: list[str] = field(default_factory=list)
    details: dict = field(default_factory=dict)

    def say(self, line: str) -> None:
        self.lines.append(line)
