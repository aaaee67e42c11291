"""Docs, help texts, messages, docstrings and comments use plain English terms: one term for each thing.

Names, code and text in backticks are not checked.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SOURCES = sorted(file for folder in ("src", "bench") for file in (ROOT / folder).rglob("*.py"))
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "src").rglob("*.md")),
    *sorted((ROOT / "src").rglob("*.html")),
    *sorted((ROOT / "src").rglob("*.j2")),
]

# A pattern that must not occur, and what to write instead.
WORDS = {
    r"mend(s|ed|ing)?": "fix",
    r"besides": "also, in addition",
    r"beside": "next to, compared with",
    r"unasked": "already exists; pass X=true to overwrite",
    r"(tells?|told) apart": "distinguish",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"borne": "tolerated",
    r"ours": "OpenMAE's",
    r"(ended|stopped|preempted) from outside": "killed, stopped by the platform",
    r"in (its|their) turns?": "(leave it out)",
    r"by turns": "alternately",
    r"one after the other": "alternately, in sequence",
    r"aloud": "with a warning",
    r"with a word": "with a warning",
    r"doubled (files?|images?)": "duplicates",
    r"pictures?": "image, figure",
    r"photographs?": "image",
    r"(is|are|was|were|be) told": "is logged, is reported",
    r"tells? of": "report",
    r"says? so": "is logged, is reported",
    r"inert": "has no effect",
    r"(does|do|did|can|cannot) not act|cannot act": "has no effect",
    r"passed over": "skipped",
    r"answers? no more": "stopped responding",
    r"shared out": "sharded, split",
    r"wrong requests?": "invalid input",
    r"the request was wrong": "invalid input",
    r"machine's sake": "an infrastructure failure",
    r"in clear": "is not encrypted",
    r"proven equal": "verified against",
    r"who is who": "process topology",
    r"the judge": "the watchdog",
    r"signs? of life": "heartbeat",
    r"(lies?|lay|stands?|stood) (beside|in|there|here|at|below|outside|between|among|above)": "is, is stored",
    r"where (it|they) (lies?|stands?)": "where it is, in place",
    r"alone": "only",
    r"whole (file|checkpoint|tensor|line|run|set)s?": "complete, entire",
    r"as above": "repeat what is meant",
    r"likewise": "also",
    r"of (its|their|his) own": "its own X, a separate X",
    r"labels? a (digit|class)": "labelled images per digit",
    r"recommendations?": "trial",
    r"anew": "again",
    r"in place of": "instead of",
    r"for want of": "because X is missing",
    r"(was|were|is|are) cut": "is interrupted",
    r"(comes?|came) to (its|their) end": "finishes, ends",
    r"strangers?('s)?": "untrusted",
    r"till": "until",
    r"nobody's|somebody's|nobody|somebody": "name who it is, or use the passive",
    r"reckon(s|ed|ing)?": "compute, count",
    r"hither|thither|whence|thence|hence|thereof|thereby|wherein|therein": "(plain words)",
}
HEADINGS = {"how", "by what", "names", "what", "more", "which", "why", "two commands"}
OPENINGS = {"what", "of", "where", "who", "whether", "whose", "whom"}

_PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{words})\b)" for i, words in enumerate(WORDS)), re.IGNORECASE)
_CODE_SPAN = re.compile(r"(`+).+?\1", re.DOTALL)


def prose_of_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of a page, without code, links' targets and tags."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, re.sub(r"\]\([^)]*\)|<[^>]*>", "]", _CODE_SPAN.sub("` `", line))


def prose_of_source(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of comments, docstrings and texts with a space; a single word may be a key."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        names = tokenize.tok_name[token.type]
        if token.type == tokenize.COMMENT or (names in ("STRING", "FSTRING_MIDDLE") and " " in token.string):
            for offset, line in enumerate(_CODE_SPAN.sub(_blank, token.string).splitlines()):
                yield token.start[0] + offset, line


def _blank(span: re.Match[str]) -> str:
    return "`" + "\n" * span.group().count("\n") + "`"


def findings(prose: Iterator[tuple[int, str]], name: str) -> list[str]:
    found = []
    for number, line in prose:
        for match in _PATTERN.finditer(line):
            better = list(WORDS.values())[int(match.lastgroup[1:])]  # type: ignore[index]
            found.append(f"{name}:{number}: {match.group()!r}, better: {better}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_of_the_source(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = findings(prose_of_source(text), path.relative_to(ROOT).as_posix())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].lower() in OPENINGS:
                name = getattr(node, "name", "module")
                found.append(f"{path.name}: the docstring of {name} begins with {words[0]!r}")
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_of_the_page(path: Path) -> None:
    lines = list(prose_of_page(path.read_text(encoding="utf-8")))
    found = findings(iter(lines), path.relative_to(ROOT).as_posix())
    for number, line in lines:
        if line.startswith("#") and line.lstrip("# ").strip().lower() in HEADINGS:
            found.append(f"{path.name}:{number}: a heading that nobody searches for: {line!r}")
    assert not found, "\n".join(["", *found])


def test_a_finding_names_file_line_word_and_what_to_write() -> None:
    text = '"""Return it."""\n\n# as above\nx = "a picture of `pictures/`"\n'
    assert findings(prose_of_source(text), "a.py") == [
        "a.py:3: 'as above', better: repeat what is meant",
        "a.py:4: 'picture', better: image, figure",
    ]
    page = "# Title\n\n`mend` [x](docs/picture.png)\n\n```\nmend\n```\n\nMends it.\n"
    assert findings(prose_of_page(page), "a.md") == ["a.md:9: 'Mends', better: fix"]
