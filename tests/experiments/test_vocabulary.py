import collections
import itertools
import json
import re
import string
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from experiments.data.vocabulary import Vocabulary
from experiments.train.errors import UsageError

VERSE = "To be, or not to be:\nthat is (perhaps) the question.\n"
VERSE_WORDS = ["To", "be", ",", "or", "not", "to", "be", ":", "<eos>", "that", "is", "("]
VERSE_WORDS += ["perhaps", ")", "the", "question", ".", "<eos>"]


def words_of(text):
    """The words of a text, all of which its own vocabulary knows."""
    vocabulary = Vocabulary.build(text, "words")
    return [vocabulary.symbols[token] for token in vocabulary.encode(text)]


prose = st.text(st.sampled_from("ab'-,.(@<>\n \t\u2019é9_"), max_size=40) | st.text(max_size=40)


def cut(text):
    """The rule for words as a loop over characters, without the marks that stay whole."""
    found, at = [], 0

    def is_letter(position):
        return position < len(text) and (text[position].isalnum() or text[position] == "_")

    while at < len(text):
        start, one = at, text[at]
        at += 1
        if is_letter(start) or (one == "'" and is_letter(at)):
            while is_letter(at) or (
                at < len(text) and text[at] in "'\u2019-" and is_letter(at + 1)
            ):
                at += 1
            found.append(text[start:at])
        elif one == "\n":
            found.append("<eos>")
        elif not one.isspace():
            found.append(one)
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (VERSE, VERSE_WORDS),
        ("", []),
        ("\n\n", ["<eos>", "<eos>"]),
        ("don't 'tis well-known", ["don't", "'tis", "well-known"]),
        ("wait--what's o' clock?", ["wait", "-", "-", "what's", "o", "'", "clock", "?"]),
        ("a <unk> b<eos>c <x>", ["a", "<unk>", "b", "<eos>", "c", "<", "x", ">"]),
        ("24 @.@ 5 @,@ x @-@ y @", ["24", "@.@", "5", "@,@", "x", "@-@", "y", "@"]),
        ("Zoë can\u2019t", ["Zoë", "can\u2019t"]),
    ],
)
def test_words_of_a_text(text, words):
    assert words_of(text) == words


@given(st.text(st.sampled_from("abz'-,.(\n \t\u2019é9_"), max_size=40))
def test_words_against_a_loop(text):
    assert words_of(text) == cut(text)


@given(st.text(max_size=40))
@pytest.mark.slow
def test_characters_are_sorted_and_come_back(text):
    vocabulary = Vocabulary.build(text, "characters")
    assert list(vocabulary.symbols) == sorted(collections.Counter(text))
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [vocabulary.symbols.index(one) for one in text]
    assert vocabulary.decode(tokens) == text


def test_words_are_ranked_by_frequency_and_then_by_letter():
    text = "c c c <unk> <unk> b\n b\n a"
    vocabulary = Vocabulary.build(text, "words")
    assert vocabulary.symbols == ("<unk>", "c", "<eos>", "b", "a")
    assert vocabulary.encode("a new b c\n").tolist() == [4, 0, 3, 1, 2]
    small = Vocabulary.build(text, "words", max_size=3)
    assert (len(small), small.symbols) == (3, ("<unk>", "c", "<eos>"))
    assert small.encode("a b c").tolist() == [0, 0, 1]
    assert Vocabulary.build(text, "words", max_size=99) == vocabulary


@given(prose, st.integers(2, 6))
def test_vocabulary_of_words_against_a_counter(text, size):
    counts = collections.Counter(word for word in words_of(text) if word != "<unk>")
    vocabulary = Vocabulary.build(text, "words", max_size=size)
    kept = vocabulary.symbols[1:]
    assert vocabulary.symbols[0] == "<unk>"
    assert len(kept) == min(len(counts), size - 1)
    left_out = set(counts) - set(kept)
    ranks = [(-counts[word], word) for word in kept]
    assert ranks == sorted(ranks)
    assert all((-counts[word], word) > ranks[-1] for word in left_out)


@given(prose)
def test_decoded_words_have_the_same_tokens(text):
    vocabulary = Vocabulary.build(text, "words")
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(vocabulary.encode(vocabulary.decode(tokens)), tokens)


def test_decoded_words_are_readable():
    vocabulary = Vocabulary.build(VERSE, "words")
    assert vocabulary.decode(vocabulary.encode(VERSE)) == VERSE
    assert vocabulary.decode([]) == ""
    assert vocabulary.decode(vocabulary.encode("not   to\tbe new")) == "not to be <unk>"


@given(prose)
def test_tokens_start_where_their_words_stand(text):
    vocabulary = Vocabulary.build(text, "words")
    starts = vocabulary.token_starts(text).tolist()
    words = ["\n" if word == "<eos>" else word for word in words_of(text)]
    assert len(starts) == len(words)
    end = 0
    for start, word in zip(starts, words, strict=True):
        # Between two tokens there is white space and nothing else.
        assert not text[end:start].strip()
        is_newline = word == "\n" and text.startswith("<eos>", start)
        end = start + (len("<eos>") if is_newline else len(word))
        assert text[start:end] == ("<eos>" if is_newline else word)
    assert not text[end:].strip()
    characters = Vocabulary.build(text, "characters")
    assert characters.token_starts(text).tolist() == list(range(len(text)))


def test_unknown_characters_are_named():
    vocabulary = Vocabulary.build("abc", "characters")
    with pytest.raises(ValueError, match=r"not in the vocabulary: '\\n', 'é', .* has 3"):
        vocabulary.encode("aé\néb")


@pytest.mark.parametrize("token", [-1, 3])
def test_tokens_that_stand_for_nothing(token):
    vocabulary = Vocabulary.build("abc", "characters")
    with pytest.raises(ValueError, match=f"tokens must be from 0 to 2, got {token}"):
        vocabulary.decode([0, token])


@pytest.mark.parametrize(
    ("level", "symbols", "complaint"),
    [
        ("characters", ("a", "b", "a"), "occurs twice"),
        ("characters", ("a", "bc"), "not one character"),
        ("words", ("a", "<unk>"), "first symbol"),
        ("words", (), "first symbol"),
        ("bytes", ("a",), "level must be one of"),
    ],
)
def test_symbols_that_are_no_vocabulary(level, symbols, complaint):
    with pytest.raises(ValueError, match=complaint):
        Vocabulary(level, symbols)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="max_size must be at least 2, got 1"):
        Vocabulary.build("a b", "words", max_size=1)
    with pytest.raises(ValueError, match="no max_size"):
        Vocabulary.build("ab", "characters", max_size=2)


@pytest.mark.parametrize("level", ["characters", "words"])
def test_file_gives_the_same_vocabulary_and_is_the_same_each_time(tmp_path, level):
    vocabulary = Vocabulary.build('Zoë said "no\\\u2028" 🙂\n', level)
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    vocabulary.save(first)
    loaded = Vocabulary.load(first)
    loaded.save(second)
    assert loaded == vocabulary
    assert first.read_bytes() == second.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first.json", "second.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"level": "words"}', '{"level": "words", "symbols": ["a"]}', "\xff"]
)
def test_files_that_hold_no_vocabulary(tmp_path, content):
    file = tmp_path / "vocabulary.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=r"vocabulary\.json does not hold a vocabulary"):
        Vocabulary.load(file)


def test_words_are_kept_as_the_file_of_a_tokenizer(tmp_path):
    """Anybody can read the file with the library alone, and gets the same tokens."""
    vocabulary = Vocabulary.build(VERSE, "words")
    vocabulary.save(tmp_path / "vocabulary.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "vocabulary.json"))
    text = "(perhaps not)\n the unknown question"
    assert tokenizer.encode(text).ids == vocabulary.encode(text).tolist()


def test_files_of_words_from_before_tokenizers_are_read(tmp_path):
    file = tmp_path / "vocabulary.json"
    file.write_text('{"level": "words", "symbols": ["<unk>", "a", "b"]}')
    assert Vocabulary.load(file) == Vocabulary("words", ("<unk>", "a", "b"))


def test_other_rules_of_cutting_words_are_refused(tmp_path):
    file = tmp_path / "vocabulary.json"
    Vocabulary.build(VERSE, "words").save(file)
    document = json.loads(file.read_text())
    document["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    file.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"vocabulary\.json .* cuts words by other rules"):
        Vocabulary.load(file)


@pytest.mark.parametrize("level", ["characters", "words"])
def test_a_million_characters_are_encoded_fast(level):
    generator = np.random.default_rng(0)
    letters = list(string.ascii_letters + " " * 10 + ".,\n")
    text = "".join(generator.choice(letters, 1_100_000))
    vocabulary = Vocabulary.build(text, level, None if level == "characters" else 10_000)
    start = time.process_time()
    vocabulary.encode(text)
    assert time.process_time() - start < 2


WHOLE = re.compile(r"<unk>|@[-,.]@|'?\w+(['\u2019-]\w+)*|[^\w\s]")
"""A token of WikiText that is a word, a mark or a sign of this module too."""


@pytest.mark.slow
def test_wikitext_is_cut_as_its_authors_cut_it_where_the_rules_are_the_same(shared_tfds):
    text = (shared_tfds.parent / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    lines = [[*line.split(" "), "<eos>"] for line in text.splitlines()]
    lines = [[word for word in line if word] for line in lines]
    # The number of tokens that is published for the validation part.
    assert sum(map(len, lines)) == 217_646
    expected, cut_further = [], 0
    for word in itertools.chain(*lines):
        whole = word == "<eos>" or WHOLE.fullmatch(word)
        expected += [word] if whole else cut(word)
        cut_further += not whole
    assert words_of(text) == expected
    starts, end = [], 0
    for word in expected:
        symbol = "\n" if word == "<eos>" else word
        starts.append(text.index(symbol, end))
        end = starts[-1] + len(symbol)
    assert Vocabulary.build(text, "words").token_starts(text).tolist() == starts
    # These are "U.S.", "...", "No." and their like.
    assert 0 < cut_further < 0.01 * 217_646
