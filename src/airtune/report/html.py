"""From a description of a page to one self-contained HTML file: style, script, plotly.js and data inside, no network.

The page carries a content security policy that forbids every request, so that it cannot call out even by mistake.
Texts from stored files are escaped; data goes in as JSON that no text can close.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from airtune.errors import MissingPackageError
from airtune.report.figures import Figure, Json
from airtune.report.files import write_text
from airtune.version import __version__


@dataclass(frozen=True)
class Tile:
    """One figure of the page's head: a label, a value, a remark."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class FigureSlot:
    """The place of a figure. `scope`: ``"page"``, or ``"entry"`` for what changes with the chosen run."""

    key: str
    scope: str = "page"
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Table:
    """A table of texts; the first cell of a row is its heading. `entry` : shown only for that chosen run."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    align: str = "right"
    plain: bool = False
    entry: int | None = None
    kind: str = "table"


@dataclass(frozen=True)
class Details:
    """Tables that are folded away until asked for."""

    title: str
    blocks: Sequence[Table]
    entry: int | None = None
    kind: str = "details"


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    title: str
    text: str
    entry: int | None = None
    kind: str = "code"


@dataclass(frozen=True)
class RoundView:
    """The timeline of one round with its selector."""

    title: str
    kind: str = "round"


@dataclass(frozen=True)
class Chooser:
    """The selector of the run (or plan) whose figures are shown below."""

    label: str
    names: Sequence[str]
    kind: str = "chooser"


Block = FigureSlot | Table | Details | Code | RoundView | Chooser


@dataclass(frozen=True)
class Section:
    """A part of the page: a key for links, a title, one plain sentence, blocks."""

    key: str
    title: str
    blocks: Sequence[Block]
    text: str = ""


@dataclass(frozen=True)
class Entry:
    """What changes with the chosen run: its figures and the data of its round view."""

    figures: Mapping[str, Figure]
    view: Json = field(default_factory=dict[str, object])


@dataclass(frozen=True)
class Page:
    """Everything that a page says."""

    title: str
    eyebrow: str
    headline: str
    lead: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = ()
    banners: Sequence[str] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict[str, Figure])
    entries: Sequence[Entry] = ()


def write_page(path: Path, page: Page) -> Path:
    """Write the page atomically and return its path."""
    return write_text(path, render(page))


def render(page: Page) -> str:
    """Return the page's HTML.

    Raises
    ------
    MissingPackageError : plotly is not installed.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("airtune.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = {
        "figures": {key: figure.json() for key, figure in page.figures.items()},
        "entries": [
            {"figures": {key: figure.json() for key, figure in entry.figures.items()}, "view": entry.view}
            for entry in page.entries
        ],
    }
    environment.filters["unbroken"] = unbroken
    templates = resources.files("airtune.report") / "templates"
    return environment.get_template("page.html.j2").render(
        page=page,
        version=__version__,
        css=Markup((templates / "page.css").read_text(encoding="utf-8")),
        script=Markup((templates / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(plotly_script()),
        data=Markup(script_json(data)),
    )


def unbroken(text: str) -> str:
    """Return a text whose numbers do not part from their units at the end of a line."""
    return re.sub(r"(?<=\d) (?=(?:%|ms|s|h|days|points|[kMGT]?bit|[mkMGT]?J)\b|%)", "\u00a0", text)


def script_json(value: object) -> str:
    """Return JSON that may stand inside a script element: no character of it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def plotly_script() -> str:
    """Return plotly.js as the installed plotly package ships it; nothing of plotly is imported but its name."""
    try:
        return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise MissingPackageError("report: plotly is not installed; valid: pip install 'airtune[plots]'") from error
