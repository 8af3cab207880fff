"""Graphs: their readers and splits, generated chains, the training script, and the example."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import diagnose as script
from experiments import graph_classification
from experiments.data.graphs import load_graph, make_chains
from experiments.graph_classification import PRESETS, RunOptions, build_model, fit
from experiments.report import measure
from experiments.report.page import render
from experiments.report.trained import read_run
from experiments.train.errors import DatasetNotFoundError, NonFiniteError, UsageError
from tests.experiments.test_diagnose import SECTIONS, Page
from tests.experiments.training import records, run

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "nodes", "entries", "features", "classes", "counts"),
    [
        ("cora", 2708, 2 * 5278, 1433, 7, (140, 500, 1000)),
        ("citeseer", 3327, 2 * 4552, 3703, 6, (120, 500, 1000)),
        ("chameleon_filtered", 890, 2 * 8854, 2325, 5, None),
        ("squirrel_filtered", 2223, 2 * 46_998, 2089, 5, None),
        ("minesweeper", 10_000, 2 * 39_402, 7, 2, (5000, 2500, 2500)),
    ],
)
def test_graphs_have_the_published_sizes(
    name, nodes, entries, features, classes, counts, shared_graphs
):
    dataset = load_graph(name, data_dir=shared_graphs)
    assert dataset.features.shape == (nodes, features)
    assert dataset.graph.matrix.nse == entries + nodes  # and a loop at each node
    assert dataset.num_classes == classes
    masks = np.array(list(dataset.masks.values()))
    assert masks.sum(0).max() == 1
    if counts is not None:
        assert tuple(masks.sum(1)) == counts
    assert set(dataset.labels[masks.any(0)]) == set(range(classes))
    if name != "minesweeper":
        sums = np.asarray(dataset.features.todense()).sum(1)
        np.testing.assert_allclose(sums[sums > 0], 1, atol=1e-5)


def test_ten_splits_differ_and_leave_out_nodes_without_a_class(shared_graphs):
    with np.load(shared_graphs / "citeseer.npz") as arrays:
        known = arrays["has_label"]
    tests = []
    for split in (0, 4, 9):
        dataset = load_graph("citeseer", data_dir=shared_graphs, split=split)
        masks = np.array(list(dataset.masks.values()))
        assert masks.sum(0).max() == 1
        assert not masks[:, ~known].any()
        tests.append(masks[2])
    assert (tests[0] != tests[1]).any()
    assert (tests[1] != tests[2]).any()


def test_missing_and_damaged_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(DatasetNotFoundError, match=r"no .*cora\.npz\. Name .* with --data\.dir"):
        load_graph("cora", data_dir=tmp_path)
    monkeypatch.setenv("GRAPH_DATA_DIR", str(tmp_path / "mine"))
    with pytest.raises(DatasetNotFoundError, match=r"mine.minesweeper\.npz.* yandex-research"):
        load_graph("minesweeper")
    (tmp_path / "cora.npz").write_bytes(b"no zip")
    with pytest.raises(DatasetNotFoundError, match=r"cora\.npz is damaged"):
        load_graph("cora", data_dir=tmp_path)
    np.savez(tmp_path / "citeseer.npz", labels=np.zeros(3))
    with pytest.raises(DatasetNotFoundError, match=r"citeseer\.npz is damaged: .*node_features"):
        load_graph("citeseer", data_dir=tmp_path)
    with pytest.raises(UsageError, match=r"must be chains, cora, .* got 'pubmed'"):
        load_graph("pubmed")
    with pytest.raises(UsageError, match=r"--data\.split must be from 0 to 9, got 10"):
        load_graph("cora", split=10)


def test_chains_tell_their_class_at_the_first_node_only():
    dataset = make_chains(classes=3, chains=5, length=4, seed=1)
    features = np.asarray(dataset.features).reshape(15, 4, 3)
    labels = dataset.labels.reshape(15, 4)
    assert (features[:, 1:] == 0).all()
    np.testing.assert_array_equal(features[:, 0].argmax(1), labels[:, 0])
    assert (features[:, 0].sum(1) == 1).all()
    assert (labels == labels[:, :1]).all()
    # Each chain is one line, away from its first node.
    dense = np.asarray(dataset.graph.to_dense())
    expected = np.kron(np.eye(15), np.eye(4) + np.eye(4, k=-1))
    np.testing.assert_allclose(dense, expected / expected.sum(1, keepdims=True), atol=1e-7)
    # A chain is in one part as a whole, and each class in each part.
    for part, count in (("train", 1), ("validation", 1), ("test", 3)):
        mask = dataset.masks[part].reshape(15, 4)
        assert (mask == mask[:, :1]).all()
        np.testing.assert_array_equal(np.bincount(labels[mask[:, 0], 0]), [count] * 3)


# -------------------------------------------------------------------------------------- training

TINY = ["--data.length=6", "--data.chains=5", "--network.features=4", "--run.no-progress"]


@pytest.mark.parametrize("model", ["ignn", "gcn"])
@pytest.mark.slow
def test_two_epochs_of_training(model, tmp_path):
    folder = tmp_path / "run"
    flags = [*TINY, f"--model={model}", "--epochs=2", f"--run.dir={folder}"]
    ended = run(graph_classification, *flags)
    assert ended.code == 0, ended.errors
    assert re.search(r"epoch \d: test accuracy \d\.\d{4}", ended.output)
    lines = records(folder)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    result = json.loads((folder / "result.json").read_text())
    best = max(lines, key=lambda line: line["validation_accuracy"])
    assert result["epoch"] == best["epoch"]
    assert result["test_accuracy"] == best["test_accuracy"]
    solves = [f"{way}_{name}" for way in ("forward", "backward") for name in ("iterations",
              "residual_mean", "converged")]  # fmt: skip
    assert (set(solves) <= lines[0].keys()) == (model == "ignn")
    if model == "ignn":
        assert all(line["forward_converged"] == 1 for line in lines)
        # The same command again shows the result, and another one is refused.
        again = run(graph_classification, *flags)
        assert again.code == 0
        assert "is finished; --run.fresh starts over" in again.output
        other = run(graph_classification, *flags, "--lr=0.5")
        assert other.code == 2
        assert "lr was 0.01, is now 0.5" in other.errors


@pytest.mark.slow
def test_the_report_on_a_run(tmp_path, monkeypatch):
    """Against the figures of the run, and the eigenvalues of the dense Jacobian."""
    monkeypatch.setattr(measure, "BUDGETS", (2,))
    reports = []
    monkeypatch.setattr(script, "render", lambda report: reports.append(report) or render(report))
    folder = tmp_path / "run"
    flags = ["solver:picard", "--solver.tol=1e-5", "--solver.max-iter=60", *TINY, "--epochs=3"]
    flags += ["--data.directed=False", "--network.kappa=0.6"]
    assert run(graph_classification, *flags, f"--run.dir={folder}").code == 0
    ended = run(script, f"--run={folder}")
    assert ended.code == 0, ended.errors
    assert "solved 1 graph (" in ended.output
    (report,) = reports
    solves, result = report.solves, json.loads((folder / "result.json").read_text())
    assert solves.correct.mean() == pytest.approx(result["test_accuracy"])
    assert solves.converged.all()
    assert report.budgets.budgets.tolist() == [2, 60]
    assert report.traces["forward"].shape == (60, 1)
    assert np.isfinite(report.traces["backward"][0]).all()

    model, dataset = (trained := read_run(folder)).model, trained.dataset
    x = model.injection(dataset.graph, dataset.features)
    logits = np.float64(model(dataset.graph, dataset.features))[mask := dataset.masks["test"]]
    labels = dataset.labels[mask]
    np.testing.assert_array_equal(solves.labels, [labels])
    np.testing.assert_array_equal(solves.predicted, [logits.argmax(1)])
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    assert solves.loss == pytest.approx([losses.mean()], rel=1e-4)
    z, adjacency = np.float64(model.core(x)), np.float64(dataset.graph.to_dense())
    weight = np.float64(model.core.cell.recurrent.kernel[...])
    slopes = adjacency @ z @ weight + np.float64(x.features) > 0
    jacobian = slopes.reshape(-1, 1) * np.kron(adjacency, weight.T)
    radius = np.abs(np.linalg.eigvals(jacobian)).max()
    assert radius > 0.1
    assert report.spectra.radius == pytest.approx([radius], rel=0.02)

    page = Page((folder / "diagnosis" / "index.html").read_text(encoding="utf-8"))
    assert page.ids == SECTIONS
    evaluations = f"The graph is converged after {solves.iterations[0]} evaluations."
    assert evaluations in page.prose
    share = f"Right nodes {solves.correct.mean():.1%}, loss {solves.loss.mean():.4f} nats a node."
    assert share in page.prose
    assert "There is one graph, and so nothing to compare." in page.prose
    assert "the parameters are those of epoch" in page.prose

    assert run(graph_classification, *TINY, "--model=sgc", f"--run.dir={tmp_path}/sgc").code == 0
    refused = run(script, f"--run={tmp_path}/sgc")
    assert refused.code == 2
    assert "choose a run with --model ignn, eignn, monotone" in refused.complaint


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits():
    base = PRESETS["chains"]
    network = dataclasses.replace(base.network, features=4, dropout=0.3)
    options = {"epochs": 2, "network": network, "run": RunOptions(progress=False)}
    dataset = make_chains(chains=5, length=6)
    trained = [
        fit(dataclasses.replace(base, seed=seed, **options), dataset)[0] for seed in (0, 0, 1)
    ]
    first, second, third = (jax.tree.leaves(jax.device_get(params)) for params in trained)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any((one != other).any() for one, other in zip(first, third, strict=True))


@pytest.mark.slow
def test_trouble_is_reported(tmp_path, capsys):
    base, dataset = PRESETS["chains"], make_chains(chains=5, length=6)
    network = dataclasses.replace(base.network, features=4, dropout=0.3)
    settings = {"network": network, "run": RunOptions(progress=False), "epochs": 2}
    short = dataclasses.replace(
        base, solver=dataclasses.replace(base.solver, tol=1e-12, max_iter=2), **settings
    )
    _, _, result = fit(short, dataset)
    assert result["mean_forward_converged"] == 0
    assert "Few forward solves converge" in capsys.readouterr().out
    with pytest.raises(NonFiniteError, match="try a smaller --lr"):
        fit(dataclasses.replace(base, lr=1e38, **settings), dataset)
    bad = dataclasses.replace(base, network=dataclasses.replace(network, kappa=0.0))
    with pytest.raises(UsageError, match=r"IGNNCell\.kappa"):
        build_model(bad, dataset)
    refused = run(graph_classification, "--model=monotone", f"--run.dir={tmp_path}")
    assert refused.code == 2
    assert "--model monotone needs --data.directed False" in refused.errors
    # Words that read right in the help, in which a flag shows the default of its opposite.
    words = ["--model=monotone", "--data.directed", "False", "--network.normalize", "False"]
    config = graph_classification.parse_arguments(words)
    assert not config.data.directed
    assert not config.network.normalize


@pytest.mark.slow
def test_depth_matters_on_chains():
    base, dataset = PRESETS["chains"], make_chains(chains=5, length=20)
    network = dataclasses.replace(base.network, features=4, kappa=0.99)
    scores = {}
    for model in ("ignn", "gcn"):
        config = dataclasses.replace(
            base, model=model, epochs=40, eval_every=10, network=network,
            run=RunOptions(progress=False),
        )  # fmt: skip
        scores[model] = fit(config, dataset)[2]["test_accuracy"]
    assert scores["ignn"] > 0.9
    # Two layers see two edges far, and the other 17 nodes of a chain are guessed.
    assert scores["gcn"] <= 3 / 20 + 17 / 40 + 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_example_of_the_page_runs():
    text = (DOCS / "graphs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/graphs.md, block {number}", "exec"), names)
    assert names["logits"].shape == (6, 2)
    assert (names["logits"].argmax(-1) == names["labels"]).all()
