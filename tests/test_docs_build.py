"""The API reference and the pages as HTML: complete, and every link leads somewhere."""

from __future__ import annotations

import html.parser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pdoc.doc
import pytest
from public_names import MODULES, names

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


class Page(html.parser.HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and not urlsplit(value).scheme:
                self.targets.append(value)

    def missing(self) -> Iterator[str]:
        """The links that lead nowhere."""
        for target in self.targets:
            place = urlsplit(target)
            path = self.path.parent / unquote(place.path) if place.path else self.path
            if not path.is_file():
                yield target
            elif place.fragment and path.suffix == ".html":
                found = self if path == self.path else Page(path)
                if unquote(place.fragment) not in found.anchors:
                    yield target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``make docs`` fills."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-W", "error", str(ROOT / "docs" / "build.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(built: Path, module: str) -> None:
    page = Page(built / f"{module.replace('.', '/')}.html")
    absent = set(names(module)) - page.anchors
    assert not absent, f"{module}: {sorted(absent)} are not in the reference"
    members = pdoc.doc.Module.from_name(module).members
    bare = [name for name in names(module) if not members[name].docstring]
    assert not [name for name in bare if not name.startswith("__")], f"{module}: no docstring"


def test_every_page_is_there_and_linked(built: Path) -> None:
    index = Page(built / "index.html")
    expected = {f"{path.stem}.html" for path in PAGES if path.name != "README.md"}
    expected |= {f"{module.replace('.', '/')}.html" for module in MODULES} | {"overview.html"}
    assert expected <= set(index.targets)
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in PAGES:
        assert path.name == "README.md" or f"]({path.name})" in text, f"docs/README.md: {path.name}"


def test_links_lead_somewhere(built: Path) -> None:
    missing = {path.name: sorted(set(Page(path).missing())) for path in built.rglob("*.html")}
    assert not {name: links for name, links in missing.items() if links}


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<p id="a"><a href="#a"></a><a href="#b"></a><img src="none.png"></p>')
    assert list(Page(page).missing()) == ["#b", "none.png"]
