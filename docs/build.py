"""Makes the HTML of the API reference and of the pages beside it.

    python docs/build.py FOLDER

The reference comes from the docstrings, by pdoc; the pages are the Markdown files of this folder
and the README. Links between them are turned, and other files that they lead to are copied.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pdoc.doc
from pdoc import render
from pdoc.render_helpers import to_html

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MODULES = (
    "fastbconv",
    "fastbconv.activations",
    "fastbconv.constraints",
    "fastbconv.estimators",
    "fastbconv.functional",
    "fastbconv.initializers",
    "fastbconv.keras_weights",
    "fastbconv.likelihoods",
    "fastbconv.noise",
    "fastbconv.regularizers",
)
# Source -> name of the page.
PAGES = {DOCS / "README.md": "index", ROOT / "README.md": "overview"} | {
    path: path.stem for path in sorted(DOCS.glob("*.md")) if path.name != "README.md"
}
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def with_turned_links(source: Path, folder: Path) -> str:
    """The Markdown of a page, its links leading to other pages or to copies in ``folder``."""

    def turned(link: re.Match[str]) -> str:
        path, anchor = (source.parent / link[1]).resolve(), link[2] or ""
        if path in PAGES:
            return f"]({PAGES[path]}.html{anchor})"
        if not path.is_file():  # brackets and parentheses of an example
            return link[0]
        copy = Path("files") / path.relative_to(ROOT)
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / copy)
        return f"]({copy.as_posix()})"

    return _LINK.sub(turned, source.read_text(encoding="utf-8"))


def without_dead_links(page: str) -> str:
    """pdoc links every name that a class has, also those of torch, which are not on the page."""
    anchors = set(re.findall(r'\bid="([^"]+)"', page))

    def kept(link: re.Match[str]) -> str:
        return link[0] if link[1] in anchors else link[2]

    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', kept, page)


def build(folder: Path) -> None:
    """Writes everything to ``folder``, which is made where it is missing."""
    modules = {name: pdoc.doc.Module.from_name(name) for name in MODULES}
    render.configure(docformat="google", show_source=False, template_directory=DOCS / "template")
    render.env.globals["pages"] = list(PAGES.values())
    written = {
        f"{name.replace('.', '/')}.html": without_dead_links(render.html_module(module, modules))
        for name, module in modules.items()
    }
    written["search.js"] = render.search_index(modules)
    page = render.env.get_template("page.html.jinja2")
    for source, name in PAGES.items():
        body = to_html(with_turned_links(source, folder))
        written[f"{name}.html"] = page.render(name=name, body=body, all_modules=modules)
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    build(Path(sys.argv[1]))
