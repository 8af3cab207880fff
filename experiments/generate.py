"""Writes text with a network trained by `experiments.language_model`.

    python -m experiments.generate --run runs/language_model --prompt "ROMEO:" --temperature 0.8

The text goes to the standard output; what it took goes to the standard error.
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from deq_jax import SolveStats, Status
from deq_jax.models.generation import Generated, generate
from experiments.data.vocabulary import Vocabulary
from experiments.language_model import Config
from experiments.report.trained import read_run
from experiments.train.errors import UsageError
from experiments.train.reporter import reports_errors
from experiments.train.sequences import SequenceConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Go on with a text, token by token, each of them an equilibrium of its own.

    Attributes:
        run: folder of a run of experiments.language_model.
        prompt: the text to go on with.
        count: tokens to write.
        temperature: below 1 more of what is probable, above 1 more of the rest; 0 takes the most
            probable token each time.
        top_k: draw from the so many most probable tokens. None: from all.
        seed: seed of the draws.
        cache: positions that a token sees behind it; of a longer prompt only the end is read, as
            much as the first new token sees. None: as many as in training, --data.length and
            --network.memory of the run together, less one for the token itself. More are distances
            that the network has never seen. With cell:trellis only the prompt is cut by it.
        samples: texts to write.
        data_dir: folder of prepared data sets. None: that of the run.
    """

    run: pathlib.Path
    prompt: str
    count: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0
    cache: int | None = None
    samples: int = 1
    data_dir: str | None = None

    def check(self) -> None:
        """Raises a UsageError where a flag has a value that it cannot have."""
        if not self.prompt:
            raise UsageError("--prompt is empty; there must be something to go on with")
        for name in ("count", "cache", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature must be at least 0 and finite, got {self.temperature}")
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class Texts:
    """What was written.

    Attributes:
        texts: each with its prompt.
        stats: of the solves of all new tokens but the last; None for a network without a solver.
        tokens: how many were written, those of all texts together.
        seconds: what that took, without the compilation.
    """

    texts: tuple[str, ...]
    stats: SolveStats | None
    tokens: int
    seconds: float

    def summary(self) -> str:
        """What it took, in a line."""
        facts = []
        if self.stats is not None and self.stats.iterations.size:
            converged = (self.stats.status == Status.CONVERGED).mean()
            facts.append(f"{self.stats.iterations.mean():.1f} evaluations a token")
            facts.append(f"{converged:.1%} of the solves converged")
        return ", ".join([*facts, f"{self.tokens / self.seconds:.1f} tokens a second"])


def write(arguments: Arguments) -> Texts:
    """Reads the run and writes the texts.

    Raises:
        ExperimentError: something the user can put right; the message says what.
    """
    arguments.check()
    run = read_run(arguments.run, arguments.data_dir, _unfit)
    config, vocabulary = run.config, run.dataset.text.vocabulary
    top_k = arguments.top_k
    if top_k is not None and not 1 <= top_k <= len(vocabulary):
        raise UsageError(
            f"--top-k must be from 1 to the {len(vocabulary)} of the vocabulary, got {top_k}"
        )
    cache = default_cache(config) if arguments.cache is None else arguments.cache
    prompt = _encoded(arguments.prompt, vocabulary)
    definition, state = nnx.split(run.model)

    @jax.jit
    def go_on(state: nnx.State, tokens: jax.Array, key: jax.Array) -> Generated:
        return generate(
            nnx.merge(definition, state),
            tokens,
            arguments.count,
            key=key,
            temperature=arguments.temperature,
            top_k=top_k,
            cache_size=cache,
        )

    # The first new token is drawn at the prompt's last position, which sees so many before it.
    read = jnp.asarray(np.tile(prompt[-(cache + 1) :], (arguments.samples, 1)))
    given = state, read, jax.random.key(arguments.seed)
    compiled = go_on.lower(*given).compile()
    started = time.monotonic()
    generated = jax.device_get(compiled(*given))
    seconds = time.monotonic() - started
    texts = (vocabulary.decode(np.append(prompt, tokens)) for tokens in generated.tokens)
    return Texts(tuple(texts), generated.stats, generated.tokens.size, seconds)


def default_cache(config: Config) -> int:
    """Positions behind the last one of a training sequence, those in the segment memory too."""
    return max(1, config.data.length + config.network.memory - 1)


def _encoded(prompt: str, vocabulary: Vocabulary) -> np.ndarray:
    try:
        tokens = vocabulary.encode(prompt)
    except ValueError as error:
        raise UsageError(f"--prompt has characters that are {error}") from error
    if not tokens.size:
        raise UsageError(f"--prompt {prompt!r} has no words; there must be something to go on with")
    return tokens


def _unfit(script: str, config: SequenceConfig) -> str:
    """Why a run cannot write text; empty if it can."""
    if script != "language_model":
        return f"a run of experiments.{script}; only those of experiments.language_model write text"
    if config.is_recurrent:
        return (
            f"a recurrent control, --model {config.model}, which cannot be asked for single "
            "tokens; choose a run with --model deq, weight_tied or explicit"
        )
    return ""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, see `reports_errors`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    parsed = tyro.cli(Arguments, prog="python -m experiments.generate", args=arguments)
    written = write(parsed)
    for number, text in enumerate(written.texts, 1):
        if len(written.texts) > 1:
            print(f"--- {number} of {len(written.texts)} ---")
        print(text, flush=True)
    print(written.summary(), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
