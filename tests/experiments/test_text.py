import dataclasses
import hashlib
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import prepare_data
from experiments.data.text import load_text
from experiments.train.errors import DatasetNotFoundError, UsageError

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def shakespeare(shared_tfds):
    if not (shared_tfds / "tiny_shakespeare").is_dir():
        message = f"there is no prepared tiny_shakespeare in {shared_tfds}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return {"name": "tiny_shakespeare", "data_dir": shared_tfds}


@pytest.fixture
def file(tmp_path):
    """Writes a text file and returns its name."""

    def write(text, name="text.txt"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a data set that is not on disk in the place of a prepared one."""

    def put(splits, *text_features):
        from tensorflow_datasets import features

        kinds = {key: features.Text() for key in text_features}
        builder = SimpleNamespace(
            info=SimpleNamespace(features=features.FeaturesDict(kinds), splits=splits),
            as_data_source=lambda split: [
                {key: one.encode() for key in text_features} for one in splits[split]
            ],
        )
        monkeypatch.setattr("experiments.data.text.open_prepared", lambda *arguments: builder)

    return put


def both(dataset):
    """The texts of both parts."""
    return tuple(dataset.vocabulary.decode(part) for part in (dataset.train, dataset.evaluation))


def test_tiny_shakespeare_is_cut_as_everybody_cuts_it(shakespeare):
    dataset = load_text(**shakespeare)
    assert (len(dataset.train), len(dataset.evaluation)) == (1_003_854, 111_540)
    assert dataset.train.dtype == dataset.evaluation.dtype == np.int32
    assert len(dataset.vocabulary) == 65
    assert dataset.evaluation_name == "validation"
    assert dataset.characters_per_token == 1
    digest = hashlib.sha256("".join(both(dataset)).encode()).hexdigest()
    assert digest.startswith("86c4e6aa")
    # In char-rnn's and nanoGPT's vocabulary as well, these are the numbers of "First Citizen".
    assert dataset.train[:13].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47, 64, 43, 52]


@pytest.mark.slow
def test_words_of_tiny_shakespeare(shakespeare):
    dataset = load_text(**shakespeare, level="words", vocabulary_size=5000)
    assert len(dataset.vocabulary) == 5000
    assert dataset.vocabulary.decode(dataset.train[:5]) == "First Citizen:\nBefore"
    assert 0 < (dataset.evaluation == 0).mean() < 0.1
    assert len(dataset.evaluation) * dataset.characters_per_token == pytest.approx(111_540, abs=20)


def test_end_of_a_file_is_reported_on(file):
    dataset = load_text(file(ALPHABET), evaluation_fraction=0.1)
    # A tenth of 26, rounded up.
    assert both(dataset) == (ALPHABET[:23], "xyz")
    assert dataset.vocabulary.symbols == tuple(ALPHABET)
    assert dataset.evaluation_name == "validation"
    for part in (dataset.train, dataset.evaluation):
        assert part.dtype == np.int32


@pytest.mark.parametrize("percent", [7, 14, 30, 55])
def test_share_of_a_text_is_exact(file, percent):
    # In floating point 0.07 * 100 and others are above the whole number.
    dataset = load_text(file("0123456789" * 10), evaluation_fraction=percent / 100)
    assert len(dataset.evaluation) == percent


def test_validation_part_comes_out_of_the_training_part(file):
    name = file(ALPHABET)
    dataset = load_text(name, evaluation_fraction=0.5, validation_fraction=0.3)
    assert both(dataset) == ("abcdefghi", "jklm")
    assert dataset.evaluation_name == "validation"
    assert dataset.vocabulary.symbols == tuple(ALPHABET)
    # What is at the end of the file makes no difference to the tokens.
    other = load_text(
        file(ALPHABET[:13] + ALPHABET[:12:-1], "other.txt"),
        evaluation_fraction=0.5,
        validation_fraction=0.3,
    )
    assert other.checksum() == dataset.checksum()


def test_first_tokens_of_each_part(file):
    dataset = load_text(file(ALPHABET), evaluation_fraction=0.5, train_tokens=4, eval_tokens=3)
    assert both(dataset) == ("abcd", "nop")
    words = load_text(
        file("one two,\nthree four\nfive six\nseven eight"),
        level="words",
        evaluation_fraction=0.6,
        eval_tokens=3,
        train_tokens=2,
    )
    # The cut is at 16 of 40 characters, in the middle of "four".
    assert both(words) == ("one two", "\n<unk> <unk>")
    assert words.characters_per_token == len("\nfive six") / 3
    # All words of the training part, not only of the first two tokens.
    assert words.vocabulary.symbols == ("<unk>", ",", "<eos>", "four", "one", "three", "two")


def test_vocabulary_of_words_does_not_know_what_is_held_out(file):
    name = file("a a b c d e\n" + "x " * 6)
    options = {"level": "words", "evaluation_fraction": 0.5}
    dataset = load_text(name, **options)
    assert dataset.vocabulary.symbols == ("<unk>", "a", "<eos>", "b", "c", "d", "e")
    assert dataset.evaluation.tolist() == [0] * 6
    dataset = load_text(name, **options, validation_fraction=0.4)
    assert dataset.vocabulary.symbols == ("<unk>", "a", "b", "c")
    assert dataset.vocabulary.decode(dataset.evaluation) == "<unk> <unk> <unk>"


def test_vocabulary_is_kept_in_its_file(file, tmp_path):
    path = tmp_path / "vocabulary.json"
    first = load_text(file("hello world\n" * 3), vocabulary_path=path)
    again = load_text(file("hold well\n" * 3, "second.txt"), vocabulary_path=path)
    assert again.vocabulary == first.vocabulary
    assert "".join(both(again)) == "hold well\n" * 3
    with pytest.raises(UsageError, match=r"vocabulary\.json does not know all of .*third.*'z'"):
        load_text(file("hello zoo\n" * 3, "third.txt"), vocabulary_path=path)
    with pytest.raises(UsageError, match=r"vocabulary\.json holds a vocabulary of 9 characters"):
        load_text(file("hello world\n" * 9), vocabulary_path=path, level="words")


def test_vocabulary_of_words_is_kept_in_its_file(file, tmp_path):
    options = {"level": "words", "evaluation_fraction": 0.5}
    options["vocabulary_path"] = tmp_path / "vocabulary.json"
    name = file("one two,\nthree two\n" * 3)
    first, again = load_text(name, **options), load_text(name, **options)
    assert again.vocabulary == first.vocabulary
    assert again.checksum() == first.checksum()
    other = load_text(file("two four\n" * 4, "second.txt"), **options)
    assert other.vocabulary == first.vocabulary
    assert both(other)[0] == "two <unk>\ntwo <unk>\n"
    with pytest.raises(UsageError, match="of 6 words, and at most 3 words were asked for"):
        load_text(name, **options, vocabulary_size=3)
    with pytest.raises(UsageError, match="of 6 words, and characters were asked for"):
        load_text(name, **options | {"level": "characters"})


def test_checksum_covers_everything(file):
    dataset = load_text(file(ALPHABET))
    symbols = (*ALPHABET[1:], ALPHABET[0])
    text = dataset.vocabulary
    changed = [
        dataclasses.replace(dataset, train=dataset.train[::-1]),
        dataclasses.replace(dataset, evaluation=dataset.evaluation[:-1]),
        dataclasses.replace(dataset, vocabulary=dataclasses.replace(text, symbols=symbols)),
        load_text(file(ALPHABET), evaluation_fraction=0.2),
    ]
    assert len({one.checksum() for one in [dataset, *changed]}) == 5
    assert load_text(file(ALPHABET)).checksum() == dataset.checksum()


def test_splits_of_one_text_are_joined_in_their_order(stand_in):
    splits = {"test": ["gh"], "train": ["abcd"], "other": ["zz"], "validation": ["ef"]}
    stand_in(splits, "text")
    assert both(load_text("stand_in", evaluation_fraction=0.5)) == ("abcd", "efgh")


def test_examples_are_lines_where_a_split_has_several(stand_in):
    stand_in({"train": ["ab", "cd"], "test": ["ef"]}, "sentence")
    assert "".join(both(load_text("stand_in", evaluation_fraction=0.5))) == "ab\ncd\nef\n"


def test_text_must_be_one_feature_and_the_only_one(stand_in, shared_tfds):
    with pytest.raises(UsageError, match=r"cifar10 cannot be read .* has id, image, label$"):
        load_text("cifar10", data_dir=shared_tfds)
    stand_in({"train": ["ab"]}, "title", "body")
    with pytest.raises(UsageError, match=r"one text feature and no other .* it has body, title$"):
        load_text("stand_in")


def test_what_is_no_text_is_not_read(monkeypatch):
    from tensorflow_datasets import features

    kinds = features.FeaturesDict({"number": features.Scalar(np.int64)})
    builder = SimpleNamespace(info=SimpleNamespace(features=kinds, splits=()))
    monkeypatch.setattr("experiments.data.text.open_prepared", lambda *arguments: builder)
    with pytest.raises(UsageError, match=r"no other is needed, it has number$"):
        load_text("stand_in")


@pytest.mark.parametrize("missing", ["split", "file"])
def test_text_that_is_not_whole(shakespeare, tmp_path, missing):
    folder = tmp_path / "tiny_shakespeare" / "1.0.0"
    folder.mkdir(parents=True)
    for source in (shakespeare["data_dir"] / "tiny_shakespeare" / "1.0.0").iterdir():
        if missing == "split" or "-test." not in source.name:
            (folder / source.name).write_bytes(source.read_bytes())
    if missing == "split":
        info = json.loads((folder / "dataset_info.json").read_text())
        info["splits"] = [split for split in info["splits"] if split["name"] != "train"]
        (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetNotFoundError, match=r"1\.0\.0 is incomplete"):
        load_text("tiny_shakespeare", data_dir=tmp_path)


def test_missing_text_names_folder_and_command(tmp_path):
    with pytest.raises(DatasetNotFoundError) as caught:
        load_text("tiny_shakespeare", data_dir=tmp_path)
    message = str(caught.value)
    assert f"no prepared data set in {tmp_path / 'tiny_shakespeare'}" in message
    assert f"python -m experiments.prepare_data tiny_shakespeare --data-dir {tmp_path}" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["absent.txt", "some/where"])
def test_missing_file(name):
    with pytest.raises(DatasetNotFoundError, match=f"there is no text file {name}"):
        load_text(name)


def test_files_of_other_kinds(file):
    with pytest.raises(UsageError, match=r"text\.txt is not a UTF-8 text file"):
        load_text(file(b"\xff\xfe\x00"))
    # Neither a byte order mark nor carriage returns are part of a text.
    dataset = load_text(file(b"\xef\xbb\xbfab\r\ncd\r\n"), evaluation_fraction=0.5)
    assert both(dataset) == ("ab\n", "cd\n")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"evaluation_fraction": 0.0}, "--data.evaluation must be above 0 and below 1"),
        ({"evaluation_fraction": 1.0}, "--data.evaluation must be above 0 and below 1"),
        ({"evaluation_fraction": math.nan}, "--data.evaluation must be above 0"),
        ({"validation_fraction": -0.1}, "--data.validation must be at least 0"),
        ({"validation_fraction": 1.0}, "--data.validation must be at least 0 and below 1"),
        ({"train_tokens": 24}, "--data.train must be from 2 to 23, .* train on, got 24"),
        ({"train_tokens": 1}, "--data.train must be from 2 to 23, .* got 1"),
        ({"eval_tokens": 4}, "--data.eval must be from 2 to 3, .* report on, got 4"),
        ({"evaluation_fraction": 0.01}, "it has 1 tokens to report on, at least 2"),
        ({"evaluation_fraction": 0.99}, "it has 0 tokens to train on"),
        ({"vocabulary_size": 5}, "--data.vocabulary .* got 5 for characters"),
        ({"vocabulary_size": 1, "level": "words"}, "--data.vocabulary must be at least 2"),
    ],
)
def test_arguments_out_of_range(file, options, complaint):
    with pytest.raises(UsageError, match=complaint):
        load_text(file(ALPHABET), **options)


@pytest.mark.parametrize("text", ["", "\ufeff", "a"])
@pytest.mark.parametrize("level", ["characters", "words"])
def test_empty_text(file, tmp_path, text, level):
    path = tmp_path / "vocabulary.json"
    with pytest.raises(UsageError, match="the text is too short: it has 0 tokens to train on"):
        load_text(file(text), level=level, vocabulary_path=path)
    assert not path.exists()


def test_unknown_data_sets_are_not_prepared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert prepare_data.main(["no_such_data_set", "--data-dir", str(tmp_path)]) == 2
    assert "no data set named no_such_data_set" in capsys.readouterr().err
