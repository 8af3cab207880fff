"""Texts as tokens, whole in memory, and the batches that are cut out of them."""

import dataclasses
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from experiments.data import WHOLE, Part
from experiments.data.prepared import open_prepared
from experiments.data.vocabulary import Level, Vocabulary
from experiments.train.errors import DatasetNotFoundError, UsageError

_CROP_STREAM = 4
"""Last word of the seed of the crops' draws; `images` has others, so that no two draw the same."""


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """The tokens to train on and those that are reported on.

    Attributes:
        name: name of the data set, or path of the file.
        train: `[N]` int32, tokens to train on.
        evaluation: `[M]` int32, tokens to report on.
        evaluation_name: which part of the text `evaluation` is.
        vocabulary: what the tokens stand for.
        characters_per_token: characters of the part that is reported on, white space included,
            divided by its tokens. A loss in nats per token, divided by this and by ln 2, is in bits
            per character.
    """

    name: str
    train: np.ndarray
    evaluation: np.ndarray
    evaluation_name: Literal["validation"]
    vocabulary: Vocabulary
    characters_per_token: float

    def checksum(self) -> int:
        """CRC-32 of the tokens of both parts, where they meet, and the symbols."""
        described = [len(self.train), self.vocabulary.level, self.vocabulary.symbols]
        checksum = zlib.crc32(json.dumps(described).encode())
        for tokens in (self.train, self.evaluation):
            checksum = zlib.crc32(np.ascontiguousarray(tokens), checksum)
        return checksum


def load_text(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    level: Level = "characters",
    vocabulary_size: int | None = None,
    evaluation_fraction: float = 0.1,
    validation_fraction: float = 0.0,
    train_tokens: int | None = None,
    eval_tokens: int | None = None,
    vocabulary_path: str | os.PathLike[str] | None = None,
) -> TextDataset:
    """Reads a text, cuts it in two and turns both parts into tokens.

    A vocabulary of characters has all characters of the text. A vocabulary of words has the words
    of the part to train on, of all of that part whatever `train_tokens` is; every other word
    becomes `<unk>`.

    Args:
        name: a UTF-8 text file if the name ends in .txt or has a path separator, otherwise a
            prepared data set that holds texts and nothing else. The splits train, validation and
            test of a data set are joined in this order. If each of them is a single example, they
            are joined directly, otherwise a newline follows every example.
        data_dir: folder of prepared data sets, see `prepared.default_data_dir`.
        level: what a token is.
        vocabulary_size: the most words that the vocabulary may have, `<unk>` included; None for
            all.
        evaluation_fraction: the share of the text, at its end, that is reported on. At level
            `words`, a cut inside a word moves on to the end of that word.
        validation_fraction: if positive, this share of the training part, at its end, is held out
            and reported on in place of the end of the text, which then is not used at all.
        train_tokens: train on the first so many tokens; None for all.
        eval_tokens: report on the first so many tokens; None for all.
        vocabulary_path: file of the vocabulary. If there is such a file, its vocabulary is used;
            otherwise the file is written, into a folder that must exist.

    Raises:
        DatasetNotFoundError: the text is not there.
        UsageError: an argument is out of its range, or the text or the vocabulary does not fit.
    """
    if not 0 < evaluation_fraction < 1:
        raise UsageError(
            f"--data.evaluation must be above 0 and below 1, got {evaluation_fraction}"
        )
    if not 0 <= validation_fraction < 1:
        raise UsageError(
            f"--data.validation must be at least 0 and below 1, got {validation_fraction}"
        )
    if vocabulary_size is not None and (level == "characters" or vocabulary_size < 2):
        raise UsageError(
            f"--data.vocabulary must be at least 2 and is for words, got {vocabulary_size} for "
            f"{level}"
        )
    is_file = name.endswith(".txt") or "/" in name or os.sep in name
    text = _read_file(name) if is_file else _read_prepared(name, data_dir)
    train, evaluation = _split(text, evaluation_fraction, level)
    if validation_fraction > 0:
        train, evaluation = _split(train, validation_fraction, level)
    path = None if vocabulary_path is None else pathlib.Path(vocabulary_path)
    if path is not None and path.exists():
        vocabulary = _fitting_vocabulary(path, level, vocabulary_size)
    else:
        built_from = text if level == "characters" else train
        vocabulary = Vocabulary.build(built_from, level, vocabulary_size)
    try:
        train_numbers, numbers = vocabulary.encode(train), vocabulary.encode(evaluation)
    except ValueError as error:
        raise UsageError(f"{path} does not know all of {name}: {error}") from error
    _check_count("--data.train", train_tokens, len(train_numbers), "train on")
    _check_count("--data.eval", eval_tokens, len(numbers), "report on")
    characters = len(evaluation)
    if eval_tokens is not None and eval_tokens < len(numbers):
        characters = int(vocabulary.token_starts(evaluation)[eval_tokens])
        numbers = numbers[:eval_tokens]
    if path is not None and not path.exists():
        vocabulary.save(path)
    return TextDataset(
        name=name,
        train=train_numbers[:train_tokens],
        evaluation=numbers,
        evaluation_name="validation",
        vocabulary=vocabulary,
        characters_per_token=characters / len(numbers),
    )


def crops(
    tokens: np.ndarray, *, length: int, count: int, seed: int, step: int, part: Part = WHOLE
) -> tuple[np.ndarray, np.ndarray]:
    """Random windows of a text for one step of training, a function of the arguments alone.

    Args:
        tokens: `[N]`.
        length: tokens in a window.
        count: windows; each starts anywhere from 0 to N - length - 1, all of these equally likely.
        seed: seed of the run.
        step: number of the step.
        part: of the windows, those of one process.

    Returns:
        Inputs and targets, the token after each input; both `[count, length]` int32, or the rows
        of the part.

    Raises:
        UsageError: the text is shorter than a window and the token after it.
    """
    if len(tokens) <= length:
        raise UsageError(
            f"a text of {len(tokens)} tokens has no window of {length} with a token after it"
        )
    generator = np.random.default_rng([seed, step, _CROP_STREAM])
    starts = generator.integers(len(tokens) - length, size=count)
    return _with_targets(tokens, starts[part.rows(count)], length)


def stream_steps(size: int, length: int, count: int) -> int:
    """How many segments of `length` tokens each of the `count` streams of `streams` has.

    Raises:
        UsageError: there is none.
    """
    steps = (size // count - 1) // length
    if steps < 1:
        raise UsageError(
            f"{size} tokens in {count} streams have no segment of {length} with a token after it"
        )
    return steps


def streams(
    tokens: np.ndarray, *, length: int, count: int, step: int, part: Part = WHOLE
) -> tuple[np.ndarray, np.ndarray]:
    """A segment of each of several contiguous streams, for training that carries a memory.

    The text is cut into `count` streams of `N // count` tokens, the rest being dropped. Segment
    k + 1 of a stream follows its segment k.

    Args:
        tokens: `[N]`.
        length: tokens in a segment.
        count: streams.
        step: number of the segment, below `stream_steps(N, length, count)`.
        part: of the streams, those of one process.

    Returns:
        Inputs and targets, the token after each input; both `[count, length]` int32, or the rows
        of the part.

    Raises:
        UsageError: a stream is shorter than a segment and the token after it.
        ValueError: `step` is out of its range.
    """
    steps = stream_steps(len(tokens), length, count)
    if not 0 <= step < steps:
        raise ValueError(f"step must be from 0 to {steps - 1}, got {step}")
    starts = np.arange(count) * (len(tokens) // count) + step * length
    return _with_targets(tokens, starts[part.rows(count)], length)


def windows(
    tokens: np.ndarray,
    *,
    length: int,
    count: int,
    contiguous: bool = False,
    part: Part = WHOLE,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Goes through a text once; each token but the first is a target exactly once.

    Row after row of a batch is the text in its order, and the next batch follows the last row. Only
    the last window of the text may be filled up, and after it come rows that are all filling.

    If `contiguous`, the targets are cut into `count` runs, equally long but for one token, and row
    r goes through run r: its window in a batch follows its window in the batch before, so that it
    can carry a memory. Only in the last batch are windows filled up or all filling. The first
    target of a run follows the last target of the run before it in the text, so that here too only
    the first token of the text is nowhere a target.

    Args:
        tokens: `[N]`, at least two.
        length: tokens in a window.
        count: windows in a batch.
        contiguous: see above.
        part: of the rows of a batch, those of one process.

    Returns:
        Batches of inputs, targets, the token after each input, and where they are there; all
        `[count, length]`, or the rows of the part; int32, int32 and bool. Filling is at the end of
        a row, and zero.

    Raises:
        UsageError: there is nothing to predict.
    """
    size = len(tokens) - 1
    if size < 1:
        raise UsageError(f"a text of {len(tokens)} tokens has nothing to predict")
    if contiguous:
        bounds = np.arange(count + 1) * size // count
        starts, ends, stride = bounds[:-1], bounds[1:], length
    else:
        starts, ends, stride = np.arange(count) * length, np.full(count, size), count * length
    batches = math.ceil(np.max(ends - starts) / stride)
    starts, ends = starts[part.rows(count)], ends[part.rows(count)]

    def batch(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positions = (starts + number * stride)[:, np.newaxis] + np.arange(length)
        there = positions < ends[:, np.newaxis]
        found = np.where(there, positions, 0)
        inputs, targets = (np.where(there, tokens[found + ahead], 0) for ahead in (0, 1))
        return inputs.astype(np.int32), targets.astype(np.int32), there

    return map(batch, range(batches))


def _with_targets(
    tokens: np.ndarray, starts: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    found = tokens[starts[:, np.newaxis] + np.arange(length + 1)].astype(np.int32)
    return found[:, :-1], found[:, 1:]


def _read_file(name: str) -> str:
    path = pathlib.Path(name)
    if not path.is_file():
        raise DatasetNotFoundError(f"there is no text file {name}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not a UTF-8 text file: {error}") from error


def _read_prepared(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    builder = open_prepared(name, data_dir, {"train"})
    from tensorflow_datasets import features

    kinds = builder.info.features
    if len(kinds) != 1 or not all(isinstance(kinds[key], features.Text) for key in kinds):
        # A single text among others may be no more than a name: the images of CIFAR-10 have one.
        raise UsageError(
            f"{name} cannot be read as a text: one text feature and no other is needed, it has "
            f"{', '.join(sorted(kinds))}"
        )
    [key] = kinds
    sources = [
        builder.as_data_source(split=split)
        for split in ("train", "validation", "test")
        if split in builder.info.splits
    ]
    end = "" if all(len(source) == 1 for source in sources) else "\n"
    return "".join(
        source[i][key].decode("utf-8") + end for source in sources for i in range(len(source))
    )


def _fitting_vocabulary(path: pathlib.Path, level: Level, max_size: int | None) -> Vocabulary:
    found = Vocabulary.load(path)
    if found.level != level or (max_size is not None and len(found) > max_size):
        most = "" if max_size is None else f"at most {max_size} "
        raise UsageError(
            f"{path} holds a vocabulary of {len(found)} {found.level}, and {most}{level} were "
            "asked for"
        )
    return found


def _split(text: str, fraction: float, level: Level) -> tuple[str, str]:
    # Rounded first, so that a tenth of ten is one whatever the last bit of the product.
    at = len(text) - math.ceil(round(fraction * len(text), 6))
    if level == "words":
        while 0 < at < len(text) and not (text[at - 1].isspace() or text[at].isspace()):
            at += 1
    return text[:at], text[at:]


def _check_count(flag: str, count: int | None, size: int, purpose: str) -> None:
    if size < 2:
        raise UsageError(
            f"the text is too short: it has {size} tokens to {purpose}, at least 2 needed"
        )
    if count is not None and not 2 <= count <= size:
        raise UsageError(
            f"{flag} must be from 2 to {size}, which is what there is to {purpose}, got {count}"
        )
