"""The examples of a Markdown page, and how they are run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# A fence and what follows the language: ```python is ours, ```python tf is TensorFlow's, and
# ```python cuda needs a GPU.
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
KINDS = ("python", "python tf", "python cuda")


def run_examples(page: Path, kinds: Sequence[str] = ("python",)) -> int:
    """Runs the blocks of these kinds in one namespace, in order.

    Args:
        page: a Markdown file; the traceback of an error has its lines.
        kinds: what the fences say.

    Returns:
        The number of blocks that were run.

    Raises:
        AssertionError: a block of Python with another mark, which nothing would ever run.
    """
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    found = [block for block in BLOCK.finditer(text) if block[1].split()[:1] == ["python"]]
    assert all(block[1].strip() in KINDS for block in found)
    chosen = [block for block in found if block[1].strip() in kinds]
    for block in chosen:
        line = text.count("\n", 0, block.start(2))
        exec(compile("\n" * line + block[2], str(page), "exec"), namespace)
    return len(chosen)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(BLOCK, "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings}


def dead_links(page: Path) -> list[str]:
    """The links of a page to files and headings that are not there."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        there = path.read_text(encoding="utf-8") if anchor and path.is_file() else ""
        if not path.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    return dead
