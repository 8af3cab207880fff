"""Vocabularies of text: its characters, or its words and punctuation marks.

The `tokenizers` library cuts words, with these rules: each newline is a token of its own, `<eos>`;
other white space separates tokens and is no token; a word keeps the hyphens and apostrophes inside
it and an apostrophe in front of it (`well-known`, `don't`, `'tis`); every other mark is a token of
its own. Case is kept. `<unk>` and `<eos>` in the text are those tokens, and WikiText's `@-@`, `@,@`
and `@.@` stay whole. Other tokens of WikiText, `H.` for instance, are cut further than its authors
cut them.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import WordLevelTrainer

from experiments.train.errors import UsageError
from experiments.train.runs import write_atomically

Level = Literal["characters", "words"]

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"

# These classes are Python's `\w` and `\s`. In the library, `\w` also matches combining marks.
_WORD = r"[\p{L}\p{N}_]+"
_MARK = r"[^\p{L}\p{N}_\s\x1c-\x1f]"
_TOKEN = rf"{UNKNOWN}|{END_OF_LINE}|@[-,.]@|'?{_WORD}(?:['\u2019-]{_WORD})*|{_MARK}"

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
        tokenizer = _word_tokenizer([UNKNOWN])
        trainer = WordLevelTrainer(vocab_size=len(text) + 1, show_progress=False)
        tokenizer.train_from_iterator(_blocks(text), trainer)
        numbers = tokenizer.get_vocab()
        # The trainer ranks `<unk>` among the others, by how often it stands in the text.
        numbers[UNKNOWN] = -1
        return cls(level, tuple(sorted(numbers, key=numbers.__getitem__))[:max_size])

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, `[N]` int32; of words, those that are not known are `<unk>`.

        Raises:
            ValueError: a character is not known; the message names all that are not.
        """
        if self.level == "words":
            numbers = [self._tokenizer.encode(block).ids for block in _blocks(text)]
            return np.fromiter(itertools.chain(*numbers), np.int32)
        numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        unknown = sorted(set(text) - numbers.keys())
        if unknown:
            raise ValueError(
                f"not in the vocabulary: {', '.join(map(repr, unknown))}, "
                f"of which the text has {sum(map(text.count, unknown))}"
            )
        return np.fromiter(map(numbers.__getitem__, text), np.int32, len(text))

    def token_starts(self, text: str) -> np.ndarray:
        """The place in a text where each of its tokens starts, `[N]`."""
        if self.level == "characters":
            return np.arange(len(text))
        starts, before = [], 0
        for block in _blocks(text):
            starts += [before + start for start, _ in self._tokenizer.encode(block).offsets]
            before += len(block)
        return np.array(starts, int)

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
        """Writes a JSON file, which nobody sees half-written.

        For words, `tokenizers.Tokenizer.from_file` reads the same file.
        """
        if self.level == "words":
            document = self._tokenizer.to_str()
        else:
            document = json.dumps(dataclasses.asdict(self))
        write_atomically(pathlib.Path(path), document + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Reads what `save` wrote.

        Raises:
            UsageError: the file, which the message names, does not hold a vocabulary, or its rules
                for cutting words are others than those of this module.
        """
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
            document = json.loads(text)
            if "model" not in document:
                return cls(document["level"], tuple(document["symbols"]))
            numbers = document["model"]["vocab"]
            found = cls("words", tuple(sorted(numbers, key=numbers.__getitem__)))
            ours = json.loads(found._tokenizer.to_str())
            same = all(document[k] == ours[k] for k in ("normalizer", "pre_tokenizer", "model"))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} does not hold a vocabulary ({error!r})") from error
        if not same:
            raise UsageError(
                f"{path} does not hold a vocabulary of this module: it cuts words by other rules"
            )
        return found

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return _word_tokenizer(self.symbols)


def _word_tokenizer(symbols: Sequence[str]) -> Tokenizer:
    """The tokenizer of the words in `symbols`, numbered in their order."""
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token=UNKNOWN))
    tokenizer.normalizer = Replace("\n", END_OF_LINE)
    tokenizer.pre_tokenizer = Split(Regex(_TOKEN), "removed", invert=True)
    return tokenizer


def _blocks(text: str, size: int = 2**16) -> Iterator[str]:
    """A text in pieces that end with a newline, which no token goes across."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


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
