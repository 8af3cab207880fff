"""Sequences of tokens as the examples of a diagnosis: windows of a text, and copy memory."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from experiments.report.examples import AnyArray, Words
from experiments.report.markup import escape, solved
from experiments.report.results import Solves
from experiments.train.experiment import Experiment

Show = Callable[[np.ndarray, np.ndarray, np.ndarray], str]
"""From inputs, labels and predictions of a sequence to what is shown of it."""

WORDS = Words(
    one="sequence",
    many="sequences",
    good="low-loss",
    bad="high-loss",
    answers="sequences",
    against="loss",
    question=(
        "Does a small residual, or a short solve, mean that a sequence is predicted well? The mean "
        "loss of a sequence is called low if it is at most the median of all. AUROC is the chance "
        "that a sequence of low loss has the better score of two, one of low and one of high loss: "
        "1 is perfect, 0.5 says nothing. The softmax maximum of a sequence is the mean over its "
        "positions. Some sequences are harder to predict than others however exact the solve."
    ),
    tally="{good} of {total} sequences have a low loss, {bad} a high one.",
    few_good="sequences of low loss",
    few_bad="sequences of high loss",
    loss="nats a token",
    spectrum=(
        "No position depends on a later one, so these are the eigenvalues of single positions: "
        "what has to pass from position to position takes evaluations that no radius tells of."
    ),
)


@dataclasses.dataclass(frozen=True)
class SequenceExamples:
    """Sequences of which a network predicts each next token; see `Examples`.

    Attributes:
        inputs: `[N, L]` int32.
        targets: `[N, L]` int32.
        show: what is shown of one.
        numbers: `[N]`, their places among all; None for all in order.
        first: position from which on answers count.
        facts: what they are, by name.
    """

    inputs: np.ndarray
    targets: np.ndarray
    show: Show
    numbers: np.ndarray | None = None
    first: int = 0
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    words = WORDS

    def __len__(self) -> int:
        return len(self.inputs)

    def prepare(self, inputs: jax.Array) -> jax.Array:
        """The tokens as they are."""
        return inputs

    def asked(self, positions: AnyArray) -> AnyArray:
        """Those from `first` on."""
        return positions[:, self.first :]

    def good(self, solves: Solves) -> np.ndarray:
        """Whether the mean loss is at most the median; never where it is not finite."""
        loss = np.where(np.isfinite(solves.loss), solves.loss, np.inf)
        return (loss <= np.median(loss)) & np.isfinite(loss)

    def score(self, solves: Solves) -> str:
        """The share of right tokens, and the loss."""
        return (
            f"Right tokens {solves.correct.mean():.1%}, loss {solves.loss.mean():.4f} "
            f"{self.words.loss}."
        )

    def gallery(self, solves: Solves, indices: np.ndarray) -> str:
        """The sequences as text."""
        cards = []
        for index in indices:
            shown = self.show(self.inputs[index], solves.labels[index], solves.predicted[index])
            lines = (
                f"sequence {index if self.numbers is None else self.numbers[index]}",
                f"right {solves.correct[index].mean():.0%}, loss {solves.loss[index]:.3f}",
                *solved(solves, index),
            )
            text = f'<pre class="sequence">{escape(shown)}</pre>'
            cards.append(f"<figure>{text}<figcaption>{'<br>'.join(lines)}</figcaption></figure>")
        return f'<div class="gallery texts">{"".join(cards)}</div>'


def choose_text(experiment: Experiment, count: int) -> SequenceExamples:
    """Windows of the text that a run is evaluated on, spread evenly over it; all if there are few.

    They are as long as those of the training, or all of a text that is shorter. A window starts
    without the memory of the one before, also where the run carries one.
    """
    config, dataset = experiment.config, experiment.dataset
    tokens, vocabulary = dataset.evaluation, dataset.vocabulary
    length = min(config.length, len(tokens) - 1)
    total = (len(tokens) - 1) // length
    numbers = _spread(total, count)
    found = tokens[(numbers * length)[:, np.newaxis] + np.arange(length + 1)]
    part = (
        f"{len(numbers):,} of the {total:,} windows of {length} {vocabulary.level} in the "
        f"{dataset.evaluation_name} text"
    )
    if len(numbers) < total:
        part += ", spread evenly over it"
    if config.segment_memory:
        part += "; each without the memory that --segment-memory keeps of the one before"
    return SequenceExamples(
        inputs=found[:, :-1],
        targets=found[:, 1:],
        show=lambda inputs, labels, predicted: vocabulary.decode(inputs),
        numbers=numbers,
        facts={
            "data": f"{dataset.name}, trained on {len(dataset.train):,} {vocabulary.level}",
            "looked at": part,
        },
    )


def choose_copies(experiment: Experiment, count: int) -> SequenceExamples:
    """The first sequences of those that copy memory is evaluated on.

    Only the symbols asked for at their ends count as answers: all else is zeros, which are right
    soon and would hide them.
    """
    config, dataset = experiment.config, experiment.dataset
    chosen = dataset.evaluation.take(np.arange(min(count, len(dataset.evaluation))))

    def show(inputs: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> str:
        return (
            f"given     {_digits(inputs)}\nasked for {_digits(labels)}\nanswered  "
            f"{_digits(predicted)}"
        )

    return SequenceExamples(
        inputs=chosen.inputs,
        targets=chosen.targets,
        show=show,
        first=config.delay + config.shown,
        facts={
            "data": f"{dataset.name}, trained on {len(dataset.train):,} sequences of "
            f"{chosen.inputs.shape[1]} tokens",
            "looked at": f"{len(chosen):,} of the {len(dataset.evaluation):,} "
            f"{dataset.evaluation_name} sequences; of each the {config.shown} symbols at its end, "
            "for accuracy and loss",
        },
    )


def _spread(total: int, count: int) -> np.ndarray:
    """Indices of `count` of so many things, evenly spread; all if there are no more."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def _digits(tokens: np.ndarray) -> str:
    """Numbers one after another, with spaces where one of them has two digits."""
    return ("" if tokens.max() < 10 else " ").join(map(str, tokens))
