"""Trains a deep equilibrium language model, or one of its controls, on a text.

    python -m experiments.language_model --help
    python -m experiments.language_model --data-dir DIR
    python -m experiments.language_model --text FILE.txt --level words --vocabulary-size 10000

Leaves in the run's folder: `config.json`, `vocabulary.json`, `metrics.jsonl` (a line an epoch),
`checkpoints/`, `curves.png`, `residuals.png`, and when it is finished `result.json`.
`experiments.generate` writes text with what was trained.
"""

import sys
from collections.abc import Sequence

import jax.numpy as jnp

from experiments.data.text import load_text, windows
from experiments.train.experiment import Experiment
from experiments.train.language_config import Config, parse
from experiments.train.language_experiment import prepare
from experiments.train.runs import RunDirectory
from experiments.train.script import Script, exit_code
from experiments.train.totals import Record
from experiments.train.training import Batch

_TRACED_SEQUENCES = 32


def run(config: Config) -> int:
    """Trains, or goes on with training, until the end or a signal; see `Script.run`."""
    return Script("language_model", load, _describe, _traced, _summary).run(config)


def load(config: Config, directory: RunDirectory) -> Experiment:
    """The text, with the run's vocabulary, and all that is trained on it."""
    dataset = load_text(
        config.text,
        data_dir=config.data_dir,
        level=config.level,
        vocabulary_size=config.vocabulary_size,
        evaluation_fraction=config.evaluation_fraction,
        validation_fraction=config.validation_fraction,
        train_tokens=config.train_tokens,
        eval_tokens=config.eval_tokens,
        vocabulary_path=directory.vocabulary,
    )
    return prepare(config, dataset)


def _describe(experiment: Experiment) -> str:
    dataset = experiment.dataset
    return (
        f"{dataset.name}, {len(dataset.train):,} training and {len(dataset.evaluation):,} "
        f"{dataset.evaluation_name} {dataset.vocabulary.level}, {len(dataset.vocabulary):,} "
        "different ones"
    )


def _traced(experiment: Experiment) -> Batch:
    length = experiment.config.length
    inputs, targets, counts = next(
        windows(experiment.dataset.evaluation, length=length, count=_TRACED_SEQUENCES)
    )
    whole = counts.all(1)
    chosen = whole if whole.any() else counts.any(1)
    return Batch(jnp.asarray(inputs[chosen]), targets[chosen])


def _summary(result: Record) -> str:
    name = result["evaluation"]
    return (
        f"{name} loss {result[f'{name}_loss']:.4f} nats a token, "
        f"perplexity {result[f'{name}_perplexity']:.2f}, "
        f"{result[f'{name}_bits_per_character']:.3f} bits a character"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` and returns the exit code, see `script.exit_code`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    return exit_code(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
