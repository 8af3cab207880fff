"""Every generated part of a page, and the figures of docs/results.md, are those in docs/data."""

import json
import re

import pytest

from experiments.benchmark import page as benchmark
from experiments.studies import (
    accuracy,
    controls,
    convergence,
    graphs,
    guarantees,
    memory,
    regularization,
    reversible,
    traffic,
)
from experiments.studies.tables import DOCS, ROOT, Command, Study, as_json

_MODULES = (
    accuracy,
    controls,
    convergence,
    graphs,
    guarantees,
    memory,
    regularization,
    reversible,
    traffic,
    benchmark,
)
STUDIES = {module.STUDY.name: module.STUDY for module in _MODULES}
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("name", STUDIES)
def test_pages_show_what_is_in_the_json(name):
    study = STUDIES[name]
    assert study.load(), study.path
    for path, text in study.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: render it again"


def test_every_generated_part_has_figures_and_every_json_a_study():
    assert {path.stem for path in (DOCS / "data").glob("*.json")} == STUDIES.keys()
    shown = set()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        begun = re.findall(r"^<!-- begin (\w+)/(.+?): written by `python -m .*` -->$", text, re.M)
        ended = re.findall(r"^<!-- end (\w+)/(.+?) -->$", text, re.M)
        assert begun == ended, path
        shown |= set(begun)
    rendered = {(name, part) for name, s in STUDIES.items() for part in s.render(s.load())}
    assert shown == rendered


@pytest.mark.parametrize("name", STUDIES)
def test_figures_say_where_they_come_from(name):
    for part in STUDIES[name].load().values():
        context = part["context"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", context["date"])
        assert "cores" in context["machine"]
        assert "jax 0." in context["versions"]
        assert re.fullmatch(
            r"python -m experiments\.(studies\.\w+|benchmark)( .*)?", context["command"]
        )


def test_every_picture_of_a_study_is_there():
    drawn = {picture for s in STUDIES.values() for picture in s.draw(s.load())}
    kept = {path.stem for path in (DOCS / "figures").glob("*.png")}
    assert kept == drawn | {"diagnosis"}  # a screenshot of a report, taken by hand


def memory_figures():
    """Of the rows on memory, from the JSON."""
    part = memory.STUDY.load()["language"]
    column = part["depths"].index(30)
    unrolled, equilibrium = (
        f"{part['temporaries'][model][column] / 2**20:.0f}"
        for model in ("weight-tied", "DEQ, Anderson")
    )
    images = memory.STUDY.load()["images"]
    budgets = " / ".join(
        f"{images['temporaries']['DEQ, Anderson'][images['depths'].index(budget)] / 2**20:.0f}"
        for budget in (10, 200)
    )
    return {
        "temporary memory of the gradient of the image network": f"{budgets} MiB",
        "the same for a language model 128 wide, depth 30": f"{unrolled} / {equilibrium} MiB",
    }


def convergence_figures():
    """Of the rows on convergence: the last tolerance, and of the maps the largest."""
    document = convergence.STUDY.load()
    anderson, picard = "Anderson(5)", "Picard"
    forward, backward = (
        " / ".join(
            str(document["cell"][way][name]["evaluations"][-1]) for name in (anderson, picard)
        )
        for way in ("forward", "backward")
    )
    maps = document["ridge"]["symmetric 0.1..0.99"]
    default = "Anderson(5), ridge 0.0001 (default)"
    largest = " / ".join(str(maps[name][-1][1]) for name in (default, picard))
    return {
        "the tutorial's cell to a residual of 1e-4, forward": f"{forward} evaluations",
        "the same backward": f"{backward} products",
        "symmetric map with eigenvalues 0.1 to 0.99": f"{largest} evaluations",
    }


def benchmark_figures():
    """Of the table beside other libraries, from the medians in the JSON."""
    document = benchmark.STUDY.load()

    def ratios(workload, case, own):
        rows = document[workload]["cases"][case]["rows"]
        seconds = {name: benchmark.seconds(row) for name, row in rows.items()}
        others = ("tutorial", "torchdeq", "jaxopt")
        best = dict(zip(others, own, strict=True))
        return " | ".join(f"{seconds[best[name]] / seconds[name]:.2f}" for name in others)

    two, stricter = "deq_jax, 2 devices", "deq_jax, 2 devices, tolerance / 2"
    return {
        "the residual cell to 1e-4, forward": ratios("solve", "forward", [two] * 3),
        "a training step of the tutorial's network": ratios(
            "step", "training step", [two, stricter, stricter]
        ),
        "`tanh(W z + U x + b)`, 128 wide": ratios(
            "dense", "forward + gradient", ["deq_jax, Picard"] * 3
        ),
    }


@pytest.mark.parametrize("figures", [memory_figures, convergence_figures, benchmark_figures])
def test_figures_at_a_glance_are_those_of_the_json(figures):
    lines = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    for label, figure in figures().items():
        (line,) = [line for line in lines if line.startswith(f"| {label}")]
        assert line.endswith(f"| {figure} |"), f"{line}\nin the JSON: {figure}"


def test_rounded_figures_at_a_glance_agree_with_the_json():
    """The JSON of these two workloads holds figures that were rounded themselves."""
    document = benchmark.STUDY.load()
    eager = document["eager"]["cases"]["forward"]["rows"]
    jitted, plain = (benchmark.seconds(eager[name]) for name in ("deq_jax", "deq_jax, eager"))
    products = document["preparation"]["cases"]["forward + gradient"]["rows"]["deq_jax"]
    ratio = benchmark.seconds(products, "prepared product") / benchmark.seconds(products, "product")
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (more,) = re.findall(r"an eager call over the jitted one.* \| ([\d.]+) ms more \|", text)
    (share,) = re.findall(r"backward loop of an ordinary .* \| ([\d.]+) of the time \|", text)
    assert float(more) == pytest.approx(1e3 * (plain - jitted), abs=0.0051)
    assert float(share) == pytest.approx(ratio, abs=0.0006)


@pytest.fixture
def study(tmp_path):
    """A study of two parts in a folder of its own, and its page."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for file, part in ((tmp_path / "README.md", "a"), (docs / "page.md", "b c")):
        begin, end = f"<!-- begin small/{part}: written by `x` -->", f"<!-- end small/{part} -->"
        file.write_text(f"Before.\n\n{begin}\n\nold\n\n{end}\n\nAfter.\n")
    render = lambda document: {name: f"{name} is {p['n']}" for name, p in document.items()}  # noqa: E731
    return Study("small", render, docs=docs)


def test_parts_are_kept_and_rendered_between_their_lines(study):
    study.keep("a", {"n": 1})
    study.keep("b c", {"n": [2, 3]})
    study.keep("a", {"n": 4})
    assert study.load() == {"a": {"n": 4}, "b c": {"n": [2, 3]}}
    study.publish()
    readme = (study.docs.parent / "README.md").read_text()
    begin, end = "<!-- begin small/a: written by `x` -->", "<!-- end small/a -->"
    assert readme == f"Before.\n\n{begin}\n\na is 4\n\n{end}\n\nAfter.\n"
    assert (
        "\n\nb c is [2, 3]\n\n<!-- end small/b c -->\n\nAfter.\n"
        in (study.docs / "page.md").read_text()
    )


def test_a_part_without_a_place_is_an_error(study):
    study.keep("nowhere", {"n": 1})
    with pytest.raises(ValueError, match="begin small/nowhere"):
        study.pages()
    page = study.docs / "page.md"
    page.write_text("<!-- begin small/nowhere: written by `x` -->\n")
    with pytest.raises(ValueError, match=r"page\.md has no line '<!-- end small/nowhere -->'"):
        study.pages()


def test_a_part_without_a_place_is_not_measured(study):
    command = Command(parts=("nowhere",), write=True)
    with pytest.raises(ValueError, match="begin small/nowhere"):
        study.run(command, {"nowhere": lambda _: pytest.fail("measured")})


def test_lists_stand_on_one_line():
    document = {"a": [1, 2.5, None], "b": [{"c": ["x, y", "z"]}, [[1], [2]]], "d": []}
    text = as_json(document)
    assert '"a": [1, 2.5, null],' in text
    assert '"c": ["x, y", "z"]' in text
    assert json.loads(text) == document
