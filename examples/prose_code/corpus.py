"""English prose and Python code, both from the Python installation that runs this: nothing is downloaded.

A document is one module of the standard library or one topic of ``pydoc_data``. The code of a module is its source
without docstrings and comments; its prose are the paragraphs of its docstrings that read as English. A topic, a section
of the language reference, has prose only.

Some text stands in several places: topics quote each other, and modules share idioms and whole methods. What has stood
in one document is left out of all further ones, so that any split by document keeps the parts apart.
"""

import ast
import inspect
import itertools
import re
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from automerge.errors import TaskError

DOMAINS = ("prose", "code")

SEPARATOR = {"prose": "\n", "code": "\n\n"}
"""What stands between the paragraphs of a document; those of code are what ``ast.unparse`` sets apart."""

RUN = 64
"""No two documents of a domain have as many consecutive bytes in common. A power of two."""

# Characters that a document may have, so that no module, of up to 100 KB, outweighs all others of its part.
LONGEST = 16_384

# A paragraph of prose has so many characters, and this share of them are letters, spaces and marks of plain sentences.
SHORTEST_PARAGRAPH = 80
LEAST_PLAIN = 0.95
PLAIN = re.compile(r"[A-Za-z ,.']")

LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__"),  # not CPython's
    *("encodings", "pydoc_data"),  # tables; and the topics, which are read as such
    # Absent from some installations, which would then have another corpus.
    *("test", "tests", "idlelib", "lib2to3", "distutils", "ensurepip", "tkinter", "turtledemo", "__phello__"),
}
"""Folders of the standard library without documents."""

# Written when Python was built, with the paths of that machine.
BUILT = ("_sysconfigdata", "config-")


@cache
def corpus() -> Mapping[str, Mapping[str, list[str]]]:
    """The pieces of text of each document, by domain and name; see ``pieces``.

    The name of a module is its path, that of a topic ends in ``(topic)``. Documents without text are left out. Takes
    some seconds, once in a process.

    Raises:
        TaskError: this Python came without the sources of its standard library, or without its topics.
    """
    paragraphs: dict[str, dict[str, list[str]]] = {domain: {} for domain in DOMAINS}
    for name, text in topics().items():
        paragraphs["prose"][f"{name} (topic)"] = list(prose_paragraphs(text))
    for name, source in modules().items():
        tree = ast.parse(source)
        docstrings = take_docstrings(tree)
        paragraphs["prose"][name] = [found for text in docstrings for found in prose_paragraphs(text)]
        paragraphs["code"][name] = [text for text in ast.unparse(tree).split(SEPARATOR["code"]) if text]
    return {domain: pieces(paragraphs[domain], SEPARATOR[domain]) for domain in DOMAINS}


def topics() -> dict[str, str]:
    """The help texts of ``pydoc``: sections of the language reference, by name."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        raise TaskError("this Python has no pydoc_data.topics", "use a CPython with its whole library") from None
    return dict(texts)


def modules() -> dict[str, bytes]:
    """The sources of the standard library, by path relative to it."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if LEFT_OUT.isdisjoint(parts) and not any(part.startswith(BUILT) for part in parts):
            found["/".join(parts)] = path.read_bytes()
    if not found:
        raise TaskError(f"{library} has no Python sources", "use a CPython with the sources of its library")
    return found


def take_docstrings(tree: ast.Module) -> list[str]:
    """Remove the docstrings of a module, its classes and its functions, and return them in the order of the walk."""
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                docstrings.append(docstring)
                node.body = node.body[1:] or [ast.Pass()]
    return docstrings


def prose_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that are English sentences, each on one line: no code, grammar, tables, headings and lists."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        line = " ".join(paragraph.split())
        indented = paragraph[:1].isspace()
        sentences = line[:1].isupper() and line.endswith((".", ":", "?", "!"))
        if indented or not sentences or len(line) < SHORTEST_PARAGRAPH:
            continue
        if len(PLAIN.findall(line)) >= LEAST_PLAIN * len(line):
            yield line


def pieces(paragraphs: Mapping[str, list[str]], separator: str) -> dict[str, list[str]]:
    """Leave out the paragraphs that repeat a run of ``RUN`` bytes of an earlier one; the rest, in the same order.

    A document is cut to ``LONGEST`` characters first. Documents come in the order of their names. A run belongs to the
    paragraph in which it starts, and may end in a further one. A piece is what stood together: where a paragraph is
    left out one piece ends and another begins, so that no run arises that the text did not have.
    """
    shortened = {name: cut(found, LONGEST) for name, found in sorted(paragraphs.items())}
    kept = {}
    for name, flags in repeating_paragraphs(shortened, separator).items():
        stretches = itertools.groupby(zip(shortened[name], flags, strict=True), key=lambda pair: bool(pair[1]))
        kept[name] = [separator.join(text for text, _ in pairs) for repeats, pairs in stretches if not repeats]
    return {name: found for name, found in kept.items() if found}


def cut(paragraphs: list[str], longest: int) -> list[str]:
    """The first paragraphs, of at most ``longest`` characters together."""
    ends = np.cumsum([len(text) for text in paragraphs])
    return paragraphs[: int(np.searchsorted(ends, longest, side="right"))]


def repeating_paragraphs(paragraphs: Mapping[str, list[str]], separator: str) -> dict[str, NDArray[np.bool_]]:
    """For each document a flag for each paragraph: whether a run that starts in it started in an earlier one."""
    hashes, owners, ends = [], [], []  # of each document: its runs, the paragraphs in which they start, and their end
    count = 0
    for found in paragraphs.values():
        lengths = [len((text + separator).encode()) for text in found]
        runs = run_hashes(separator.join(found).encode())
        hashes.append(runs)
        owners.append(count + np.repeat(np.arange(len(found)), lengths)[: len(runs)])
        count += len(found)
        ends.append(count)
    owner = np.concatenate(owners)
    _, first, which = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    repeats = owner[first][which] < owner
    flags = np.bincount(owner[repeats], minlength=count).astype(bool)
    return dict(zip(paragraphs, np.split(flags, ends[:-1]), strict=True))


def run_hashes(text: bytes) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of each run of ``RUN`` bytes of ``text``, in order; none for a shorter text.

    Two equal runs have one hash. Two different ones almost never do, and then a paragraph too many is dropped.
    """
    factor = 0x9E3779B97F4A7C15  # odd, so that every power of it is invertible
    hashes = np.frombuffer(text, np.uint8).astype(np.uint64)
    length = 1
    while length < RUN and len(hashes) > length:
        # hash of a run of 2 n bytes = hash of its first n * factor^n + hash of its last n, modulo 2^64
        power = np.uint64(pow(factor, length, 2**64))
        hashes = hashes[:-length] * power + hashes[length:]
        length *= 2
    return hashes if length == RUN else hashes[:0]
