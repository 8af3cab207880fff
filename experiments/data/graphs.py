"""Graphs whose nodes are classified: citations, web pages, a grid of mines, and chains."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCSR

from deq_jax.cells.graph import Graph
from experiments.train.errors import DatasetNotFoundError, UsageError

SOURCES = {
    "cora": "kimiyoung/planetoid and bingzhewei/geom-gcn",
    "citeseer": "kimiyoung/planetoid and bingzhewei/geom-gcn",
    "chameleon_filtered": "yandex-research/heterophilous-graphs",
    "squirrel_filtered": "yandex-research/heterophilous-graphs",
    "minesweeper": "yandex-research/heterophilous-graphs",
}
"""The graphs that are read from files, and the repositories that publish them."""

SPLITS = 10
"""Splits of each graph that is read from a file, besides the Planetoid split of two of them."""

Metric = Literal["accuracy", "roc_auc"]


@dataclasses.dataclass(frozen=True)
class GraphDataset:
    """A graph, the features and classes of its nodes, and the nodes of one split.

    Attributes:
        name: name of the data.
        graph: the graph.
        features: `[N, features]`, an array, or a BCSR where most features are zero.
        labels: `[N]` int32; 0 where a node has no class and is in no part of the split.
        num_classes: number of classes.
        masks: boolean `[N]` for each of train, validation and test.
        split: what the split is, in words.
        metric: what is reported: accuracy, or for two classes the area under the ROC curve.
    """

    name: str
    graph: Graph
    features: jax.Array | BCSR
    labels: np.ndarray
    num_classes: int
    masks: Mapping[str, np.ndarray]
    split: str
    metric: Metric

    def describe(self) -> str:
        """What the data are, in a line."""
        nodes, features = self.features.shape
        entries = self.graph.matrix.nse
        counts = " / ".join(f"{mask.sum():,}" for mask in self.masks.values())
        kind = "symmetric" if self.graph.symmetric else "directed"
        return (
            f"{self.name}, {nodes:,} nodes, {kind} adjacency matrix with {entries:,} entries, "
            f"{features:,} features, {self.num_classes} classes; {self.split}: {counts} nodes for "
            "train / validation / test"
        )


def default_data_dir() -> pathlib.Path:
    """Where the files of graphs are looked for: `$GRAPH_DATA_DIR` or `~/graphs`."""
    return pathlib.Path(os.environ.get("GRAPH_DATA_DIR", "~/graphs")).expanduser()


def load_graph(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    split: int | None = None,
) -> GraphDataset:
    """Reads a graph from `NAME.npz`. Its edges have no direction.

    Words of documents (Cora, Citeseer) and of pages (Chameleon, Squirrel) are divided by their
    number in each node. Citeseer has 15 nodes without words, without edges and without a class.
    They are nodes of the graph and in no part of a split.

    Args:
        name: one of `SOURCES`.
        data_dir: folder of the file; None for `default_data_dir()`.
        split: number of one of the ten splits, from 0. None: for Cora and Citeseer the split of
            Planetoid, for the others split 0.

    Raises:
        DatasetNotFoundError: the file is not there, or does not hold what it should.
        UsageError: the name or the number of the split is unknown.
    """
    if name not in SOURCES:
        raise UsageError(f"--data.name must be chains, {', '.join(SOURCES)}, got {name!r}")
    if split is not None and not 0 <= split < SPLITS:
        raise UsageError(f"--data.split must be from 0 to {SPLITS - 1}, got {split}")
    folder = default_data_dir() if data_dir is None else pathlib.Path(data_dir)
    path = folder / f"{name}.npz"
    where = (
        f"Name the folder that holds {name}.npz with --data.dir. The data are published by "
        f"{SOURCES[name]} on GitHub"
    )
    if not path.is_file():
        raise DatasetNotFoundError(f"cannot read {name}: there is no {path}. {where}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            read = _read_citations if "feat_indptr" in arrays else _read_pages
            return read(name, arrays, split)
    except (KeyError, OSError, ValueError) as error:
        damaged = f"cannot read {name}: {path} is damaged: {error}. {where}"
        raise DatasetNotFoundError(damaged) from error


def _read_citations(name: str, arrays: Any, split: int | None) -> GraphDataset:
    """Cora and Citeseer: rows of words in compressed form."""
    pointers, words, shape = (arrays[f"feat_{part}"] for part in ("indptr", "indices", "shape"))
    counts = np.diff(pointers)
    data = np.repeat(1 / np.maximum(counts, 1), counts)
    nodes, width = map(int, shape)
    known = arrays["has_label"]
    masks = {}
    for part, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        if split is None:
            mask = np.zeros(nodes, bool)
            mask[arrays[f"{short}_idx"]] = True
        else:
            mask = arrays[f"geom_{short}_masks"][split]
        masks[part] = mask & known
    labels = np.where(known, arrays["labels"], 0).astype(np.int32)
    return GraphDataset(
        name,
        Graph.from_edges(arrays["edges"], nodes),
        _sparse(data, words, pointers, (nodes, width)),
        labels,
        int(labels.max()) + 1,
        masks,
        "Planetoid's split" if split is None else f"split {split} of Geom-GCN",
        "accuracy",
    )


def _read_pages(name: str, arrays: Any, split: int | None) -> GraphDataset:
    """The files of "A critical look at the evaluation of GNNs under heterophily"."""
    split = split or 0
    features, labels = arrays["node_features"], arrays["node_labels"].astype(np.int32)
    rows: jax.Array | BCSR = jnp.asarray(features, jnp.float32)
    if name != "minesweeper":
        features = features / np.maximum(features.sum(1, keepdims=True), 1)
        nodes, words = np.nonzero(features)
        pointers = np.searchsorted(nodes, np.arange(len(features) + 1))
        rows = _sparse(features[nodes, words], words, pointers, features.shape)
    masks = {
        "train": arrays["train_masks"][split],
        "validation": arrays["val_masks"][split],
        "test": arrays["test_masks"][split],
    }
    classes = int(labels.max()) + 1
    return GraphDataset(
        name,
        Graph.from_edges(arrays["edges"].T, len(labels)),
        rows,
        labels,
        classes,
        masks,
        f"split {split}",
        "roc_auc" if classes == 2 else "accuracy",
    )


def _sparse(data: Any, columns: Any, pointers: Any, shape: tuple[int, int]) -> BCSR:
    arrays = (
        jnp.asarray(data, jnp.float32),
        jnp.asarray(columns, jnp.int32),
        jnp.asarray(pointers, jnp.int32),
    )
    return BCSR(arrays, shape=shape, indices_sorted=False, unique_indices=True)


def make_chains(
    *, classes: int = 2, chains: int = 20, length: int = 10, directed: bool = True, seed: int = 0
) -> GraphDataset:
    """Chains of nodes, each of one class, which only the features of its first node tell.

    A node's features are zeros. Those of the first node of a chain have a 1 in the place of the
    class of the chain. So a node at distance d from the first one can only be classified by a
    network that looks d edges far. Of the chains of each class a fifth is trained on, a fifth is
    for validation, and the rest is for testing.

    Source: Gu et al., "Implicit graph neural networks", 2020, section 5.1, where nodes are split
    instead of chains.

    Args:
        classes: number of classes.
        chains: chains of each class, at least 3.
        length: nodes of a chain.
        directed: let edges lead away from the first node only.
        seed: of the split.
    """
    total = classes * chains
    nodes = total * length
    first = np.arange(total) * length
    of_chain = np.arange(total) % classes
    labels = np.repeat(of_chain, length).astype(np.int32)
    features = np.zeros((nodes, classes), np.float32)
    features[first, of_chain] = 1
    senders = np.arange(nodes).reshape(total, length)[:, :-1].ravel()
    order = np.random.default_rng(seed).permuted(np.arange(total).reshape(chains, classes), axis=0)
    fifth = max(1, chains // 5)
    parts = {
        "train": order[:fifth],
        "validation": order[fifth : 2 * fifth],
        "test": order[2 * fifth :],
    }
    masks = {
        part: np.isin(np.arange(total), members).repeat(length) for part, members in parts.items()
    }
    return GraphDataset(
        "chains",
        Graph.from_edges(
            np.stack([senders, senders + 1]),
            nodes,
            normalization="mean" if directed else "symmetric",
        ),
        jnp.asarray(features),
        labels,
        classes,
        masks,
        f"{total} chains of {length} nodes, split by seed {seed}",
        "accuracy",
    )
