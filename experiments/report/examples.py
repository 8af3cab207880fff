"""The examples that a trained network is looked at with: images, or sequences of tokens."""

import dataclasses
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.image import imsave

from experiments.data.images import ImageDataset, fixed_split
from experiments.report.measure import Solves

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
_CLASSES = {"cifar10": (*_CIFAR10, "truck")}
"""Names of classes, where they are not numbers."""


class Words(NamedTuple):
    """How a report speaks of examples.

    Attributes:
        one: singular of the examples.
        many: plural of the examples.
        good: adjective for what went well, which is what `Examples.good` says.
        bad: adjective for the others.
        answers: noun that these adjectives belong to.
        loss: unit of the loss; empty where accuracy says enough.
    """

    one: str
    many: str
    good: str
    bad: str
    answers: str
    loss: str = ""


@dataclasses.dataclass(frozen=True)
class Examples(ABC):
    """Some of the examples that a run is evaluated on.

    Attributes:
        inputs: `[N, ...]`, as they are kept in memory.
        targets: `[N]` classes, or `[N, L]` with one for each position.
        numbers: `[N]`, their places in the split that they are from; None for 0, 1, 2, ...
        facts: what the report tells about them, by name.
    """

    inputs: np.ndarray
    targets: np.ndarray
    numbers: np.ndarray | None = dataclasses.field(default=None, kw_only=True)
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict, kw_only=True)

    words: ClassVar[Words]

    def __len__(self) -> int:
        return len(self.inputs)

    def prepare(self, inputs: jax.Array) -> jax.Array:
        """Turns some `inputs` into what the network takes."""
        return inputs

    def asked(self, positions: AnyArray) -> AnyArray:
        """The part of targets or logits that counts; they are `[B, ...]` or `[B, L, ...]`."""
        return positions

    @abstractmethod
    def good(self, solves: Solves) -> np.ndarray:
        """`[N]` boolean: which examples went well, for comparing that with the residual."""

    def name(self, index: int) -> str:
        """The name of one example."""
        return f"{self.words.one} {index if self.numbers is None else self.numbers[index]}"


@dataclasses.dataclass(frozen=True)
class ImageExamples(Examples):
    """Images `[N, H, W, C]` uint8 that a network classifies.

    Attributes:
        white: pixel value that becomes 1.
        classes: names of the classes; None for their numbers.
    """

    white: int = 255
    classes: Sequence[Any] | None = None

    words = Words("image", "images", "correct", "wrong", "answers")

    def prepare(self, inputs: jax.Array) -> jax.Array:
        """Scales the pixels to float32 with `white` at 1."""
        return inputs.astype(jnp.float32) / self.white

    def good(self, solves: Solves) -> np.ndarray:
        """Whether the answer is right."""
        return solves.correct

    def class_name(self, number: int) -> Any:
        """The name of a class."""
        return number if self.classes is None else self.classes[number]

    def thumbnail(self, index: int) -> bytes:
        """A PNG of an image with 1 or 3 channels."""
        shade = np.clip(self.inputs[index] / self.white, 0, 1)
        buffer = io.BytesIO()
        imsave(buffer, shade.repeat(3, axis=2) if shade.shape[2] == 1 else shade, format="png")
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class SequenceExamples(Examples):
    """Sequences `[N, L]` int32 of tokens, of which a network predicts each next token.

    Attributes:
        show: from inputs, labels and predictions of a sequence to the text that shows it.
        first: position from which on answers count.
    """

    show: Callable[[np.ndarray, np.ndarray, np.ndarray], str]
    first: int = 0

    words = Words("sequence", "sequences", "low-loss", "high-loss", "sequences", "nats a token")

    def asked(self, positions: AnyArray) -> AnyArray:
        """The positions from `first` on."""
        return positions[:, self.first :]

    def good(self, solves: Solves) -> np.ndarray:
        """Whether the mean loss is finite and at most the median."""
        loss = np.where(np.isfinite(solves.loss), solves.loss, np.inf)
        return (loss <= np.median(loss)) & np.isfinite(loss)


def choose_images(dataset: ImageDataset, count: int) -> ImageExamples:
    """A stratified subset of the images that a run is evaluated on, the same one for each run.

    Args:
        dataset: the images.
        count: number of images; all of them if there are no more.
    """
    total = dataset.evaluation_size
    numbers = np.arange(total)
    if count < total:
        numbers = fixed_split(dataset.evaluation_labels(), count)[0]
    split = dataset.evaluation_name
    part = f"{len(numbers):,} of the {total:,} {split} images"
    if len(numbers) < total:
        part += ", a stratified subset"
    if split == "validation":
        part += " (--data.validation: the test set is not looked at)"
    return ImageExamples(
        *dataset.evaluation_examples(numbers),
        white=dataset.white,
        numbers=numbers,
        classes=_CLASSES.get(dataset.name),
        facts={
            "data": f"{dataset.name}, trained on {dataset.train_size:,} images",
            "looked at": part,
        },
    )


def choose_windows(dataset: Any, length: int, count: int) -> SequenceExamples:
    """Windows of the text that a run is evaluated on, spread evenly over it.

    Args:
        dataset: a `TextDataset`.
        length: tokens in a window. A text that is shorter is one window.
        count: number of windows; all of them if there are no more.
    """
    tokens, vocabulary = dataset.evaluation, dataset.vocabulary
    length = min(length, len(tokens) - 1)
    total = (len(tokens) - 1) // length
    numbers = np.linspace(0, total - 1, min(count, total)).round().astype(int)
    found = tokens[(numbers * length)[:, np.newaxis] + np.arange(length + 1)]
    part = (
        f"{len(numbers):,} of the {total:,} windows of {length} {vocabulary.level} in the "
        f"{dataset.evaluation_name} text"
    )
    if len(numbers) < total:
        part += ", spread evenly over it"
    return SequenceExamples(
        found[:, :-1],
        found[:, 1:],
        show=lambda inputs, labels, predicted: vocabulary.decode(inputs),
        numbers=numbers,
        facts={
            "data": f"{dataset.name}, trained on {len(dataset.train):,} {vocabulary.level}",
            "looked at": part,
        },
    )


def choose_copies(dataset: Any, shown: int, count: int) -> SequenceExamples:
    """The first sequences of those that copy memory is evaluated on.

    Only the symbols asked for at the end of a sequence count as answers. The other answers are
    zeros, which a network soon learns and which would hide the symbols.

    Args:
        dataset: a `CopyTask`.
        shown: number of symbols at the end of a sequence.
        count: number of sequences; all of them if there are no more.
    """
    total = len(dataset.test)
    chosen = dataset.test[:count]
    length = chosen.shape[1]

    def show(inputs: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> str:
        rows = {"given": inputs, "asked for": labels, "answered": predicted}
        return "\n".join(f"{name:<9} {digits(tokens)}" for name, tokens in rows.items())

    return SequenceExamples(
        chosen,
        dataset.targets(chosen),
        show=show,
        first=length - shown,
        facts={
            "data": f"copy memory, trained on {len(dataset.train):,} sequences of {length} tokens",
            "looked at": f"{len(chosen):,} of the {total:,} {dataset.evaluation_name} sequences; "
            f"for accuracy and loss, the {shown} symbols at the end of each",
        },
    )


def digits(tokens: np.ndarray) -> str:
    """Numbers one after another, with spaces where one of them has two digits."""
    return ("" if tokens.max() < 10 else " ").join(map(str, tokens))
