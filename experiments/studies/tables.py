"""What the studies share: figures kept as JSON in docs/data, and pages rendered from them.

A study has parts. Each part is measured by itself and kept in `docs/data/STUDY.json`, together with
where and how it was measured. A page, README.md or one in docs/, shows a part between two lines:

    <!-- begin STUDY/PART: written by `COMMAND` -->
    <!-- end STUDY/PART -->
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"

Part = dict[str, Any]
"""What was measured, as JSON, and under `context` where and how."""

Document = dict[str, Part]
"""All parts of a study: the content of its JSON file."""


@dataclasses.dataclass(frozen=True)
class Command:
    """The command line that all studies have in common.

    Attributes:
        parts: measure only these parts. Without names all parts are measured.
        write: keep the figures in docs/data, and render the pages and pictures from them.
        render: measure nothing, and render the pages and pictures from the figures in docs/data.
    """

    parts: tyro.conf.Positional[tuple[str, ...]] = ()
    write: bool = False
    render: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """Figures in a JSON file, and the pages and pictures that are made from them.

    Attributes:
        name: name of the JSON file, without its ending.
        render: document -> the Markdown text of each generated part of a page, by its name.
        draw: document -> the pictures in docs/figures, by their names without the ending.
        docs: folder of the pages; its parent has the README.
    """

    name: str
    render: Callable[[Document], dict[str, str]]
    draw: "Callable[[Document], dict[str, Figure]]" = lambda _: {}
    docs: pathlib.Path = DOCS

    @property
    def path(self) -> pathlib.Path:
        """The JSON file."""
        return self.docs / "data" / f"{self.name}.json"

    def load(self) -> Document:
        """The kept parts; none if there is no file yet."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def keep(self, name: str, part: Part) -> None:
        """Writes a part to the JSON file, in the place of an older one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(as_json(self.load() | {name: part}), encoding="utf-8")

    def pages(self) -> dict[pathlib.Path, str]:
        """The pages that show a part of this study, with their text as it ought to be.

        Raises:
            ValueError: a part is shown nowhere.
        """
        pages, changed = self._texts(), {}
        for part, text in self.render(self.load()).items():
            begin, end = self._begin(part), f"<!-- end {self.name}/{part} -->"
            for path in self._showing(part, pages):
                found = begin.search(pages[path])
                assert found is not None
                before, after = pages[path][: found.end()], pages[path][found.end() :]
                _, closing, rest = after.partition(end)
                if not closing:
                    raise ValueError(f"{path} has no line {end!r}")
                pages[path] = changed[path] = f"{before}\n{text}\n\n{end}{rest}"
        return changed

    def _texts(self) -> dict[pathlib.Path, str]:
        paths = [self.docs.parent / "README.md", *sorted(self.docs.glob("*.md"))]
        return {path: path.read_text(encoding="utf-8") for path in paths if path.exists()}

    def _begin(self, part: str) -> re.Pattern[str]:
        return re.compile(rf"<!-- begin {re.escape(f'{self.name}/{part}')}: .*-->\n")

    def _showing(self, part: str, pages: dict[pathlib.Path, str]) -> list[pathlib.Path]:
        shown = [path for path, page in pages.items() if self._begin(part).search(page)]
        if not shown:
            raise ValueError(f"no page has the line '<!-- begin {self.name}/{part}: ... -->'")
        return shown

    def publish(self) -> None:
        """Renders the pages and draws the pictures, from the JSON file."""
        for path, text in self.pages().items():
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
        for name, figure in self.draw(self.load()).items():
            path = self.docs / "figures" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
            print(f"wrote {path}")

    def run(self, config: Command, measures: Mapping[str, Callable[[Any], Part]]) -> None:
        """Measures, prints, and writes, as the command line says.

        Args:
            config: the command line.
            measures: what measures each part.

        Raises:
            SystemExit: a part is unknown.
            ValueError: a part that is to be written is shown nowhere; before it is measured.
        """
        for name in config.parts:
            if name not in measures:
                raise SystemExit(f"unknown part {name!r}; known are: {', '.join(measures)}")
        if config.render:
            self.publish()
            return
        if config.write:
            pages = self._texts()
            for name in config.parts or measures:
                self._showing(name, pages)
        for name in config.parts or measures:
            measured = {"context": context(self.name), **measures[name](config)}
            part = json.loads(json.dumps(measured))
            print(f"\n{self.render({name: part})[name]}\n", flush=True)
            if config.write:
                self.keep(name, part)
        if config.write:
            self.publish()


def as_json(document: Any) -> str:
    """Indented JSON with each list of numbers or words on one line."""
    text = json.dumps(document, indent=1, ensure_ascii=False)

    def on_one_line(found: re.Match[str]) -> str:
        return "[" + ", ".join(line.strip() for line in found[1].split(",\n")) + "]"

    return re.sub(r"\[\n([^\[\]{}]*)\n\s*\]", on_one_line, text) + "\n"


def context(study: str) -> dict[str, str]:
    """When, where and by which command a part of a study is measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {device()}",
        "versions": versions(("jax", "jaxlib")),
        "revision": revision(),
        "command": f"python -m experiments.studies.{study} {shlex.join(sys.argv[1:])}".strip(),
    }


def origin(context: Mapping[str, Any]) -> str:
    """A line of small print: when, where and by which command a part was measured."""
    parts = [
        f"{context['date']}, {context['machine']}",
        f"deq_jax {context['revision']}, {context['versions']}",
        *([f"{context['rounds']} rounds"] if "rounds" in context else []),
        f"`{context['command']}`",
        *([context["note"]] if "note" in context else []),
    ]
    return f"<sub>{'; '.join(parts)}</sub>"


def machine() -> str:
    """The machine and the versions, in one line."""
    return f"{processor()}, {device()}, {versions(('jax', 'jaxlib'))}"


def device() -> str:
    """Platform and kind of JAX's first device."""
    import jax  # the benchmark's parent process measures better without it

    first = jax.devices()[0]
    return f"{first.platform} ({first.device_kind})"


def processor() -> str:
    """Cores and model, in one line."""
    try:
        with open("/proc/cpuinfo") as lines:
            models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
            model = next(models, platform.processor())
    except OSError:
        model = platform.processor()
    return f"{os.cpu_count()} cores {model}"


def versions(packages: Iterable[str]) -> str:
    """Versions of Python and of those packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def revision() -> str:
    """The checkout's commit, with `-dirty` where files differ from it; empty if there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    return "\n".join([markdown_head(columns), *map(markdown_row, rows)])


def markdown_head(columns: Iterable[str]) -> str:
    """The first two lines of a Markdown table."""
    columns = list(columns)
    return "\n".join([markdown_row(columns), markdown_row(["---"] * len(columns))])


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
