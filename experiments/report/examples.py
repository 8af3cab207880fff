"""What a trained network is looked at with: examples of any kind, and how a report speaks of them.

`images` and `sequences` have the kinds that there are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, TypeVar

import jax
import numpy as np

from experiments.report.results import Solves

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class Words:
    """How a report speaks of examples.

    Attributes:
        one: one of them.
        many: several.
        good: an adjective for what went well, as `Examples.good` has it.
        bad: an adjective for the others.
        answers: what the adjectives are said of.
        against: what the residual is compared with.
        question: the paragraph that says how.
        tally: how many went well; has `{good}`, `{bad}` and `{total}` in it.
        few_good: what there are too few of where too little went well.
        few_bad: likewise where too little went wrong.
        loss: unit of the loss; empty where accuracy says enough.
        spectrum: what else to know about their spectra; may be empty.
    """

    one: str
    many: str
    good: str
    bad: str
    answers: str
    against: str
    question: str
    tally: str
    few_good: str
    few_bad: str
    loss: str = ""
    spectrum: str = ""


class Examples(Protocol):
    """Some of the examples that a run is evaluated on.

    Attributes:
        inputs: `[N, ...]`, as they are kept in memory.
        targets: `[N]` classes, or `[N, L]` where each position is to predict one.
        facts: what they are, by name.
        words: how to speak of them.
    """

    inputs: np.ndarray
    targets: np.ndarray
    facts: Mapping[str, str]
    words: Words

    def __len__(self) -> int:
        """N."""

    def prepare(self, inputs: jax.Array) -> jax.Array:
        """What the network takes, of some `inputs`."""

    def asked(self, positions: AnyArray) -> AnyArray:
        """The part that counts of targets or logits, `[B]` or `[B, L]` and any further axes."""

    def good(self, solves: Solves) -> np.ndarray:
        """`[N]` boolean: which went well, for comparing it with the residual."""

    def score(self, solves: Solves) -> str:
        """How well the network does, in a sentence."""

    def gallery(self, solves: Solves, indices: np.ndarray) -> str:
        """HTML that shows some of them with their answers and solves."""
