"""Text that is written, against decoding by whole solves, and what is said of bad flags."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.models.generation import generate
from experiments import generate as script
from experiments.generate import Arguments, write
from experiments.language_model import Config, TextData
from experiments.report.trained import SCRIPTS, read_run
from experiments.train.runs import flat_settings
from experiments.train.sequences import SequenceNetwork
from tests.experiments.runs import untrained
from tests.experiments.test_trained import arguments

WORDS = "the cat sat , the dog ran .\nthe cat ran , the dog sat .\n" * 4
SMALL = ["--network.features=8", "--network.hidden-features=8", "--cell.heads=2"]
SMALL += ["--data.length=6", "--batch-size=2"]


@pytest.fixture(scope="module")
def decoded(language_run):
    """`decoded(text, count)`: each time the most probable character after a solve of all."""
    run = read_run(language_run)
    model, vocabulary = run.model, run.dataset.text.vocabulary

    @jax.jit
    def logits(tokens):
        return model(tokens)

    def go_on(text, count):
        for _ in range(count):
            tokens = vocabulary.encode(text)
            # A position does not depend on those behind it: one length serves for all.
            padded = np.zeros((1, 8), np.int32)
            padded[0, : len(tokens)] = tokens
            best = np.asarray(logits(jnp.asarray(padded)))[0, len(tokens) - 1].argmax()
            text += vocabulary.symbols[best]
        return text

    return go_on


@pytest.mark.slow
def test_the_most_probable_text(language_run, decoded, capsys):
    flags = [f"--run={language_run}", "--prompt=<b>", "--count=5", "--temperature=0"]
    assert script.main(flags) == 0
    captured = capsys.readouterr()
    assert captured.out == decoded("<b>", 5) + "\n"
    said = re.fullmatch(
        r"([\d.]+) evaluations a token, ([\d.]+)% of the solves converged, [\d.]+ tokens a second",
        captured.err.strip(),
    )
    assert 1 < float(said[1]) <= 30
    assert 0 <= float(said[2]) <= 100


@pytest.mark.slow
def test_a_long_prompt_is_read_as_far_as_the_network_knows(language_run, decoded, monkeypatch):
    """What is not seen in training, --data.length 8, is not looked at, but printed."""
    end = "/b> is 3"
    read = []

    def spy(model, tokens, *args, **kwargs):
        read.append((tokens.shape, kwargs["cache_size"]))
        return generate(model, tokens, *args, **kwargs)

    monkeypatch.setattr(script, "generate", spy)
    texts = [
        write(Arguments(language_run, start + end, count=1, temperature=0)).texts[0]
        for start in ("", "4;\n<b>2 & 9<")
    ]
    assert texts == [decoded(end, 1), "4;\n<b>2 & 9<" + decoded(end, 1)]
    assert read == [((1, 8), 7)] * 2


@pytest.mark.slow
def test_samples_and_seeds(language_run, capsys):
    given = {"run": language_run, "prompt": "<b>", "count": 20, "samples": 2, "cache": 3}
    first = write(Arguments(**given))
    assert len(set(first.texts)) == 2
    assert all(text.startswith("<b>") and len(text) == 23 for text in first.texts)
    assert first.tokens == 40
    assert first.stats.iterations.shape == (2, 19)
    assert f"{first.stats.iterations.mean():.1f} evaluations" in first.summary()
    flags = [f"--{name}={value}" for name, value in given.items()]
    assert script.main([*flags, "--seed=1"]) == 0
    heads = r"--- 1 of 2 ---\n(<b>.{20})\n--- 2 of 2 ---\n(<b>.{20})\n"
    shown = re.fullmatch(heads, capsys.readouterr().out, re.DOTALL)
    assert set(shown.groups()).isdisjoint(first.texts)


@pytest.mark.slow
def test_one_token_of_the_most_probable_one(language_run, decoded):
    """There is nothing to draw, and nothing is solved but the prompt."""
    written = write(Arguments(language_run, "<b>", count=1, top_k=1, samples=2))
    assert written.texts == (decoded("<b>", 1),) * 2
    assert re.fullmatch(r"[\d.]+ tokens a second", written.summary())


@pytest.mark.slow
def test_words_by_a_control(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS)
    flags = [f"--data.name={tmp_path / 'text.txt'}", "--data.level=words"]
    flags += ["--model=explicit", "--depth=2"]
    untrained(tmp_path / "run", "language_model", *SMALL, *flags)
    written = write(Arguments(tmp_path / "run", "the   cat\n unicorn", count=4))
    assert written.stats is None
    (text,) = written.texts
    assert text.startswith("the cat\n<unk>")
    assert len(re.findall(r"<unk>|\w+|[.,\n]", text)) == 8
    with pytest.raises(script.UsageError, match="has no words"):
        write(Arguments(tmp_path / "run", "  "))


def test_as_many_positions_as_in_training():
    memory = SequenceNetwork(memory=64)
    assert script.default_cache(Config(data=TextData(length=64))) == 63
    assert script.default_cache(Config(data=TextData(length=64), network=memory)) == 127
    assert script.default_cache(Config(data=TextData(length=1))) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt="], "--prompt is empty"),
        (
            ["--prompt=aß§a"],
            "--prompt has characters that are not in the vocabulary: 'a', '§', 'ß'",
        ),
        (["--top-k=100"], "--top-k must be from 1 to the 18 of the vocabulary, got 100"),
        (["--top-k=0"], "--top-k must be from 1 to the 18"),
        (["--count=0"], "--count must be at least 1, got 0"),
        (["--cache=0"], "--cache must be at least 1, got 0"),
        (["--samples=0"], "--samples must be at least 1, got 0"),
        (["--seed=-1"], "--seed must be at least 0, got -1"),
        (["--temperature=-1"], "--temperature must be at least 0 and finite, got -1.0"),
        (["--temperature=nan"], "--temperature must be at least 0 and finite, got nan"),
    ],
)
def test_bad_flags(flags, message, language_run, capsys):
    assert script.main([f"--run={language_run}", "--prompt=b", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("image_classification", [], "holds a run of experiments.image_classification;"),
        ("copy_memory", [], "holds a run of experiments.copy_memory;"),
        ("language_model", ["--model=lstm"], "holds a recurrent control, --model lstm"),
    ],
)
def test_runs_that_write_no_text(name, flags, message, tmp_path, capsys):
    settings = flat_settings(SCRIPTS[name].parse_arguments(flags))
    found = {"script": name, "arguments": flags, "config": settings}
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert script.main([f"--run={tmp_path}", "--prompt=b"]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_text(language_run, tmp_path, capsys):
    shutil.copytree(language_run, tmp_path / "run")
    arguments(tmp_path / "run", "--data.name=absent.txt")
    assert script.main([f"--run={tmp_path / 'run'}", "--prompt=b"]) == 2
    assert "error: there is no text file absent.txt" in capsys.readouterr().err
