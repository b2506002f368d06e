"""The prose and code example's texts."""

import ast
from pathlib import Path

import pytest

from automerge.errors import TaskError
from prose_code import corpus as prose_code_corpus
from prose_code.corpus import (
    DOMAINS,
    LONGEST,
    RUN,
    corpus,
    modules,
    pieces,
    prose_paragraphs,
    run_hashes,
    take_docstrings,
)


def runs(text: str) -> set[bytes]:
    encoded = text.encode()
    return {encoded[start : start + RUN] for start in range(len(encoded) - RUN + 1)}


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_two_documents_have_a_run_in_common(domain: str) -> None:
    seen: dict[bytes, str] = {}
    for name, found in corpus()[domain].items():
        for run in set().union(*map(runs, found)):
            assert seen.setdefault(run, name) == name


@pytest.mark.parametrize(("domain", "least"), [("prose", 300_000), ("code", 1_000_000)])
def test_there_is_enough_text_in_many_documents_and_none_dominates(domain: str, least: int) -> None:
    lengths = [sum(map(len, found)) for found in corpus()[domain].values()]
    assert sum(lengths) > least
    assert len(lengths) > 200
    assert max(lengths) <= LONGEST * 1.1  # separators come on top


def test_prose_has_topics_and_docstrings_and_code_has_modules() -> None:
    texts = corpus()
    assert any("class definition" in piece for piece in texts["prose"]["class (topic)"])
    assert any("argument" in piece for piece in texts["prose"]["argparse.py"])
    assert not [name for name in texts["code"] if name.endswith("(topic)")]
    assert any("def " in piece for piece in texts["code"]["argparse.py"])


def test_the_domains_are_told_apart_by_their_first_lines() -> None:
    # Prose lines are sentences; a stray line of code among them would blur the tasks.
    texts = corpus()
    prose = [line for found in texts["prose"].values() for piece in found for line in piece.split("\n")]
    assert all(line[0].isupper() and line[-1] in ".:?!" for line in prose)
    code = "\n".join(piece for found in texts["code"].values() for piece in found)
    assert not [line for line in code.split("\n") if line.lstrip().startswith(('"""', "#"))]
    assert code.count("\n    ") > 10 * len(texts["code"])


def test_docstrings_are_taken_out_of_every_level_and_nothing_else_is() -> None:
    tree = ast.parse(
        '"""Module."""\nx = "value"\nclass A:\n    """Class."""\n'
        '    def f(self):\n        """Method."""\n        return "kept"\n'
        'async def g():\n    "Coroutine."\n'
    )
    assert sorted(take_docstrings(tree)) == ["Class.", "Coroutine.", "Method.", "Module."]
    rest = ast.unparse(tree)
    assert "'value'" in rest
    assert "'kept'" in rest
    assert "pass" in rest
    assert "Class" not in rest
    ast.parse(rest)


def test_prose_is_sentences_on_one_line() -> None:
    sentence = "A sentence that is long enough to be taken, because it has more\nthan eighty characters altogether."
    other = {
        "indented": "    " + sentence,
        "heading": "Short heading",
        "grammar": 'Name ::= (letter | "_") (letter | digit | "_")* and so on until the line has become long enough.',
        "lower case": sentence.lower(),
        "unfinished": sentence.rstrip("."),
    }
    text = "\n\n".join(["First line.", *other.values(), sentence])
    assert list(prose_paragraphs(text)) == [sentence.replace("\n", " ")]


def test_a_repeated_paragraph_is_left_out_and_ends_the_piece() -> None:
    common = "c" * RUN
    found = pieces({"b": ["before", f"x{common}y", "after"], "a": ["one", common, "two"]}, "\n")
    assert found == {"a": [f"one\n{common}\ntwo"], "b": ["before", "after"]}


def test_a_paragraph_whose_run_ends_in_the_next_one_is_a_repeat() -> None:
    half = "0123456789abcdefghijklmnopqrstuv"
    found = pieces({"a": [half + "A", half + "B"], "b": [half + "A", half + "B"]}, "\n")
    # What is left is shorter than a run.
    assert found == {"a": [f"{half}A\n{half}B"], "b": [half + "B"]}


def test_one_byte_less_than_a_run_in_common_is_no_repeat() -> None:
    common = bytes(range(32, 32 + RUN - 1)).decode()
    texts = {"a": [f"1{common}2"], "b": [f"3{common}4"]}
    assert pieces(texts, "\n") == texts


def test_a_document_wholly_repeated_is_gone_and_a_repeat_in_a_document_too() -> None:
    text = "t" * 10 + "u" * RUN
    assert pieces({"a": [text, "between", text], "b": [text]}, "\n") == {"a": [f"{text}\nbetween"]}


def test_a_document_is_cut_at_a_paragraph() -> None:
    paragraphs = [str(number) * (LONGEST // 4) for number in range(6)]
    # Each is one character again and again: its runs repeat within it, which is no reason to leave it out.
    assert pieces({"a": paragraphs}, "\n") == {"a": ["\n".join(paragraphs[:4])]}


def test_run_hashes_are_equal_where_the_runs_are() -> None:
    text = bytes(range(256)) * 2 + b"end"
    hashes = run_hashes(text)
    assert len(hashes) == len(text) - RUN + 1
    assert len(set(hashes[:256].tolist())) == 256
    assert hashes[:100].tolist() == hashes[256:356].tolist()
    assert len(run_hashes(text[:RUN])) == 1
    assert len(run_hashes(text[: RUN - 1])) == 0
    assert len(run_hashes(b"")) == 0


def test_an_installation_without_sources_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose_code_corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(TaskError, match="no Python sources"):
        modules()


def test_tests_of_the_library_and_installed_packages_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (
        "a.py",
        "package/b.py",
        "test/c.py",
        "package/tests/d.py",
        "site-packages/e.py",
        "_sysconfigdata_x.py",
    ):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    monkeypatch.setattr(prose_code_corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    assert list(modules()) == ["a.py", "package/b.py"]
