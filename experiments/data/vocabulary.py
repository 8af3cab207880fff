"""Vocabularies of text: its characters, or its words and punctuation marks.

The words of a text are cut in the manner of the word-level benchmarks: each newline is a token of
its own, `<eos>`; other white space separates tokens and is no token; a word keeps the hyphens and
apostrophes inside it and an apostrophe in front of it (`well-known`, `don't`, `'tis`); every other
mark is a token of its own. Case is kept. `<unk>` and `<eos>` in the text are those tokens, and
WikiText's `@-@`, `@,@` and `@.@` stay whole; other tokens of such a text, `H.` for instance, are
cut further than its authors cut them.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from experiments.train.errors import UsageError
from experiments.train.runs import write_atomically

Level = Literal["characters", "words"]

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"

_TOKEN = re.compile(r"<unk>|<eos>|@[-,.]@|\n|'?\w+(?:['\u2019-]\w+)*|[^\w\s]")

_NO_SPACE_BEFORE = frozenset(".,:;?!)]}%")
_NO_SPACE_AFTER = frozenset("([{")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Symbols and their numbers.

    Attributes:
        level: what the symbols are, `characters` or `words`.
        symbols: each of them once; a token is an index into it. The first of the words is `<unk>`,
            which stands for all that are not in it.

    Raises:
        ValueError: the symbols are not as described.
    """

    level: Level
    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"level must be one of {get_args(Level)}, got {self.level}")
        if len(set(self.symbols)) < len(self.symbols):
            raise ValueError("a symbol occurs twice in the vocabulary")
        if self.level == "characters" and any(len(symbol) != 1 for symbol in self.symbols):
            raise ValueError("a symbol of a vocabulary of characters is not one character")
        if self.level == "words" and self.symbols[:1] != (UNKNOWN,):
            raise ValueError(f"the first symbol of a vocabulary of words is not {UNKNOWN}")

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def build(cls, text: str, level: Level, max_size: int | None = None) -> "Vocabulary":
        """The vocabulary of a text.

        Args:
            text: the text.
            level: `characters`, all that occur, in the order of their code points; or `words`,
                `<unk>` and then the most frequent first, equally frequent ones in the order of
                their code points.
            max_size: at most so many symbols, `<unk>` included; None for all. Of words only.

        Raises:
            ValueError: `max_size` is given for characters or is below 2.
        """
        if level == "characters":
            if max_size is not None:
                raise ValueError("a vocabulary of characters has all of them and no max_size")
            return cls(level, tuple(sorted(set(text))))
        if max_size is not None and max_size < 2:
            raise ValueError(f"max_size must be at least 2, got {max_size}")
        counts = collections.Counter(pieces(text, level))
        del counts[UNKNOWN]
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(level, (UNKNOWN, *words)[:max_size])

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, `[N]` int32; of words, those that are not known are `<unk>`.

        Raises:
            ValueError: a character is not known; the message names all that are not.
        """
        numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        parts = pieces(text, self.level)
        if self.level == "words":
            found = map(numbers.get, parts, itertools.repeat(0))
        else:
            unknown = sorted(set(text) - numbers.keys())
            if unknown:
                raise ValueError(
                    f"not in the vocabulary: {', '.join(map(repr, unknown))}, "
                    f"of which the text has {sum(map(text.count, unknown))}"
                )
            found = map(numbers.__getitem__, parts)
        return np.fromiter(found, np.int32, len(parts))

    def decode(self, tokens: np.ndarray | Sequence[int]) -> str:
        """The text of tokens.

        Of words this is readable and has the same tokens again, but not the white space of the text
        that they came from: there is one space between two words, none before a closing mark, and
        none around a newline.

        Raises:
            ValueError: a token is no index into the symbols.
        """
        numbers = np.asarray(tokens).reshape(-1)
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if outside.size:
            raise ValueError(f"tokens must be from 0 to {len(self) - 1}, got {outside[0]}")
        symbols = [self.symbols[number] for number in numbers]
        return "".join(symbols) if self.level == "characters" else _join(symbols)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary to a JSON file, which is never seen half-written."""
        write_atomically(pathlib.Path(path), json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Reads what `save` wrote.

        Raises:
            UsageError: the file does not hold a vocabulary; the message names it.
        """
        try:
            document = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            return cls(document["level"], tuple(document["symbols"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} does not hold a vocabulary ({error!r})") from error

    @classmethod
    def load_or_build(
        cls,
        path: str | os.PathLike[str] | None,
        text: str,
        level: Level,
        max_size: int | None = None,
    ) -> "Vocabulary":
        """The vocabulary in a file if it is there, else that of a text, which is saved to it.

        Args:
            path: the file; None: build and do not save.
            text: see `build`.
            level: see `build`.
            max_size: see `build`.

        Raises:
            UsageError: the file does not hold a vocabulary of this level and at most this size.
            ValueError: see `build`.
        """
        if path is None or not pathlib.Path(path).exists():
            built = cls.build(text, level, max_size)
            if path is not None:
                built.save(path)
            return built
        found = cls.load(path)
        if found.level != level or (max_size is not None and len(found) > max_size):
            most = "" if max_size is None else f"at most {max_size} "
            raise UsageError(
                f"{path} holds a vocabulary of {len(found)} {found.level}, and {most}{level} were "
                "asked for"
            )
        return found


def pieces(text: str, level: Level) -> Sequence[str]:
    """The characters of a text, or its words, marks and newlines (as `<eos>`)."""
    if level == "characters":
        return text
    return [END_OF_LINE if piece == "\n" else piece for piece in _TOKEN.findall(text)]


def leading(text: str, level: Level, count: int) -> str:
    """The start of a text up to its token number `count`, counted from 0, or all of it."""
    if level == "characters":
        return text[:count]
    beyond = next(itertools.islice(_TOKEN.finditer(text), count, None), None)
    return text if beyond is None else text[: beyond.start()]


def _join(words: Sequence[str]) -> str:
    parts: list[str] = []
    glue = ""
    for word in words:
        newline = word == END_OF_LINE
        if not newline and word not in _NO_SPACE_BEFORE:
            parts.append(glue)
        parts.append("\n" if newline else word)
        glue = "" if newline or word in _NO_SPACE_AFTER else " "
    return "".join(parts)
