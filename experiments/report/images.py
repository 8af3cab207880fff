"""Images as the examples of a diagnosis."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.image import imsave

from experiments.data.sources import Images
from experiments.data.splits import fixed_split
from experiments.report.examples import AnyArray, Words
from experiments.report.markup import escape, image, solved
from experiments.report.results import Solves
from experiments.train.experiment import Experiment
from experiments.train.image_experiment import to_float

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
_CLASSES = {"cifar10": (*_CIFAR10, "truck")}
"""Names of classes, where they are not numbers."""

WORDS = Words(
    one="image",
    many="images",
    good="correct",
    bad="wrong",
    answers="answers",
    against="correctness",
    question=(
        "Does a small residual, or a short solve, mean that the answer is right? AUROC is the "
        "chance that a right answer has the better score of two, one right and one wrong: 1 is "
        "perfect, 0.5 says nothing."
    ),
    tally="{good} of {total} answers are right, {bad} wrong.",
    few_good="right answers",
    few_bad="mistakes",
)


@dataclasses.dataclass(frozen=True)
class ImageExamples:
    """Images that a network classifies; see `Examples`.

    Attributes:
        images: the images.
        white: pixel value that becomes 1.
        numbers: `[N]`, their places in the split that they are from; None for all in order.
        classes: names of the classes; None for their numbers.
        facts: what they are, by name.
    """

    images: Images
    white: int
    numbers: np.ndarray | None = None
    classes: Sequence[Any] | None = None
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    words = WORDS

    @property
    def inputs(self) -> np.ndarray:
        """`[N, H, W, C]` uint8."""
        return self.images.images

    @property
    def targets(self) -> np.ndarray:
        """`[N]` int32."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def prepare(self, inputs: jax.Array) -> jax.Array:
        """As float32 with `white` scaled to 1."""
        return to_float(inputs, self.white)

    def asked(self, positions: AnyArray) -> AnyArray:
        """All of it."""
        return positions

    def good(self, solves: Solves) -> np.ndarray:
        """Whether the answer is right."""
        return solves.correct

    def score(self, solves: Solves) -> str:
        """The accuracy."""
        return f"Accuracy {solves.correct.mean():.1%}."

    def gallery(self, solves: Solves, indices: np.ndarray) -> str:
        """Thumbnails with true and predicted class."""
        cards = []
        for index in indices:
            name = f"image {index if self.numbers is None else self.numbers[index]}"
            true, guess = (self._class(one[index]) for one in (solves.labels, solves.predicted))
            mark = "right" if solves.correct[index] else "wrong"
            lines = (
                name,
                f"true {escape(true)}",
                f'<span class="{mark}">predicted {escape(guess)}</span>',
                *solved(solves, index),
            )
            picture = image(thumbnail(self.inputs[index], self.white), name, "thumbnail")
            cards.append(f"<figure>{picture}<figcaption>{'<br>'.join(lines)}</figcaption></figure>")
        return f'<div class="gallery">{"".join(cards)}</div>'

    def _class(self, number: int) -> Any:
        return number if self.classes is None else self.classes[number]


def choose(experiment: Experiment, count: int) -> ImageExamples:
    """A stratified subset of the images that a run is evaluated on, the same one for each run.

    All of them if there are no more than `count`.
    """
    dataset = experiment.dataset
    labels, total = dataset.evaluation.labels, len(dataset.evaluation)
    numbers = np.arange(total) if count >= total else fixed_split(labels, count)[0]
    split = dataset.evaluation_name
    part = f"{len(numbers):,} of the {total:,} {split} images"
    if len(numbers) < total:
        part += ", a stratified subset"
    if split == "validation":
        part += " (--validation-fraction: the test set is not looked at)"
    return ImageExamples(
        images=dataset.evaluation.take(numbers),
        white=dataset.white,
        numbers=numbers,
        classes=_CLASSES.get(dataset.name),
        facts={
            "data": f"{dataset.name}, trained on {len(dataset.train):,} images",
            "looked at": part,
        },
    )


def thumbnail(image: np.ndarray, white: int) -> bytes:
    """A PNG of an image `[H, W, C]`, C 1 or 3, of values up to `white`."""
    shade = np.clip(image / white, 0, 1)
    buffer = io.BytesIO()
    flat = shade.repeat(3, axis=2) if shade.shape[2] == 1 else shade
    imsave(buffer, flat, format="png")
    return buffer.getvalue()
