"""Text that comes with the dependencies: Python of the standard library, torch's C++ headers, English of docstrings.

Each corpus is a list of documents, one a file, in an order that depends on the seed alone; near copies (headers that
begin alike) are dropped. Documents are either trained on or held out, never both.
"""

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evomerge.errors import EvoMergeError

MAX_DOCUMENT_CHARACTERS = 20_000  # so that no single file dominates
MIN_DOCUMENT_CHARACTERS = 300
MAX_FILE_BYTES = 60_000
SIGNATURE_CHARACTERS = 200  # documents that begin with the same characters count as copies
SKIPPED_FOLDERS = frozenset({"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"})
DOCSTRING_PACKAGES = ("numpy", "scipy", "sklearn")
MIN_PARAGRAPH_CHARACTERS = 120

C_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Document:
    """The cleaned text of one file; ``source`` names the file relative to its package."""

    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents to train on, and passages of other documents that are held out."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def read_corpus(name: str, num_train_characters: int, num_passages: int, passage_characters: int, seed: int) -> Corpus:
    """Return enough training documents of corpus ``name``, and one or two held-out passages from each further file.

    Raises: EvoMergeError where the installed packages hold too little text.
    """
    documents = _documents(name, seed)
    train: list[Document] = []
    num_characters = 0
    while num_characters < num_train_characters and (document := next(documents, None)):
        train.append(document)
        num_characters += len(document.text)
    trained_text = "\n".join(document.text for document in train)
    passages = _passages(documents, passage_characters, seed)
    held_out: list[Document] = []
    while len(held_out) < num_passages and (passage := next(passages, None)):
        if passage.text not in trained_text:
            held_out.append(passage)
    if len(held_out) < num_passages:
        raise EvoMergeError(
            f"corpus {name!r}: expected {num_train_characters} characters and {num_passages} held-out passages, found "
            f"{num_characters} and {len(held_out)}; install the packages whole, or ask for less in the recipe"
        )
    return Corpus(tuple(train), tuple(held_out))


def _documents(name: str, seed: int) -> Iterator[Document]:
    """Yield the distinct documents of a corpus, in the seed's order, reading files as they are asked for."""
    folder_files, clean = SOURCES[name]
    files = sorted(folder_files())
    seen = set()
    for index in np.random.default_rng([seed, 6]).permutation(len(files)):
        source, path = files[index]
        text = _printable(clean(path.read_text(encoding="utf-8", errors="ignore")))[:MAX_DOCUMENT_CHARACTERS]
        signature = text[:SIGNATURE_CHARACTERS]
        if len(text) >= MIN_DOCUMENT_CHARACTERS and signature not in seen:
            seen.add(signature)
            yield Document(source, text)


def _passages(documents: Iterable[Document], num_characters: int, seed: int) -> Iterator[Document]:
    """Yield one or two passages of each document, apart from each other, that begin with a line and end with a word."""
    rng = np.random.default_rng([seed, 7])
    for document in documents:
        starts = [0, *(match.end() for match in re.finditer("\n", document.text[:-num_characters]))]
        first = int(rng.choice(starts))
        apart = [start for start in starts if abs(start - first) >= num_characters]
        second = [int(rng.choice(apart))] if apart else []
        for start in sorted([first, *second]):
            passage = document.text[start : start + num_characters].rsplit(None, 1)[0].strip("\n")
            if len(passage) > num_characters / 2:
                yield Document(document.source, passage)


def _printable(text: str) -> str:
    """Return the text in printable ASCII, without tabs and runs of blank lines."""
    kept = "".join(c for c in text.replace("\t", "    ") if c == "\n" or " " <= c <= "~")
    return re.sub(r"\s*\n\s*\n+", "\n\n", kept).strip() + "\n"


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EvoMergeError(f"package {package!r}: expected installed files, found none; install it")
    return Path(spec.origin).parent


def _files(root: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    for path in root.rglob(pattern):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and path.is_file() and path.stat().st_size < MAX_FILE_BYTES:
            yield f"{root.name}/{relative.as_posix()}", path


def _python_files() -> Iterator[tuple[str, Path]]:
    return _files(Path(sysconfig.get_path("stdlib")), "*.py")


def _header_files() -> Iterator[tuple[str, Path]]:
    return _files(_folder("torch") / "include", "*.h")


def _docstring_files() -> Iterator[tuple[str, Path]]:
    for package in DOCSTRING_PACKAGES:
        yield from _files(_folder(package), "*.py")


def _parsed(code: str) -> ast.Module:
    """Return the syntax tree, empty for what this Python cannot parse (templates, files of other versions)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in other people's strings
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def _code(code: str) -> str:
    """Return Python without comments and docstrings, uniformly formatted."""
    tree = _parsed(code)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1 and _is_text(body[0]):
            del body[0]
    return ast.unparse(tree)


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _header(code: str) -> str:
    return C_COMMENT.sub("", code)


def _prose(code: str) -> str:
    """Return the paragraphs of the docstrings that read as plain English, one a line."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(_parsed(code)) if isinstance(node, documented)]
    paragraphs = [" ".join(part.split()) for text in docstrings if text for part in text.split("\n\n")]
    return "\n".join(dict.fromkeys(filter(_is_prose, paragraphs)))


def _is_prose(paragraph: str) -> bool:
    num_letters = sum(c.isalpha() or c == " " for c in paragraph)
    marked_up = ">>>" in paragraph or "---" in paragraph
    return len(paragraph) >= MIN_PARAGRAPH_CHARACTERS and not marked_up and num_letters > 0.9 * len(paragraph)


SOURCES: dict[str, tuple[Callable[[], Iterator[tuple[str, Path]]], Callable[[str], str]]] = {
    "python": (_python_files, _code),
    "c": (_header_files, _header),
    "english": (_docstring_files, _prose),
}
