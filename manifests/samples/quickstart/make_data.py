"""Question-answer pairs from the documentation that ships inside this Python, for the quickstart.

    python make_data.py [--folder data] [--train-rows 200] [--eval-rows 40]

Writes train.jsonl, eval.jsonl and question.txt. Every docstring is real text and nothing is downloaded; the same
Python always gives the same files. A name that is asked about in one file is never asked about in another.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HELD_OUT = "queue.Queue.full"
"""What question.txt asks about: in neither file."""

MODULES = """
    argparse array ast base64 binascii bisect bz2 calendar cmath codecs collections colorsys configparser
    contextlib copy csv dataclasses datetime decimal difflib email.message email.utils enum filecmp
    fileinput fnmatch fractions functools getpass gettext glob gzip hashlib heapq hmac html http.client
    http.cookies imaplib inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox
    math mimetypes netrc numbers operator optparse os os.path pathlib pickle pkgutil platform plistlib
    poplib pprint queue quopri random re reprlib sched secrets selectors shelve shlex shutil signal
    smtplib socket sqlite3 ssl stat statistics string struct subprocess sys sysconfig tarfile tempfile
    textwrap threading time timeit token tokenize traceback types unicodedata urllib.parse urllib.request
    uuid wave weakref xml.etree.ElementTree zipfile zlib
""".split()  # noqa: SIM905 - 100 lines for a person to scroll over

QUESTIONS = (
    "What does `{name}` do in Python?",
    "What is `{name}` for in Python?",
    "Explain Python's `{name}`.",
    "How would you describe `{name}` from Python's standard library?",
    "When would I use `{name}` in Python?",
)

# First words of docstrings that become the verb of a sentence: Return the floor -> `math.floor(x)` returns the floor.
VERBS = """
    abort acquire add append apply build calculate call change check choose clear close compare compile
    compress compute concatenate connect construct convert copy count create decode decompress delete
    describe deserialize determine disable dump emit enable encode escape evaluate execute exit expand
    extend extract feed fetch find flush force format generate get give guess handle import increment
    indicate initialize insert invoke iterate join list load log make mark match merge move normalize open
    pad parse perform pop prepare print process produce provide push put query raise read register release
    remove rename replace report represent request reset resolve restore retrieve return reverse rotate
    round run save search seek select send serialize set shuffle skip sort split start stop store strip
    swap take terminate test transform translate truncate turn unlock unregister update use validate
    verify wait wake walk wrap write yield
""".split()  # noqa: SIM905 - 100 lines for a person to scroll over

MAX_TEXT_CHARACTERS = 240
EVAL_SHARE = 0.15


@dataclass(frozen=True)
class Entry:
    """One documented thing."""

    name: str
    """As one writes it: shlex.quote, str.split."""
    signature: str
    """(s)"""
    text: str
    """First paragraph of the docstring, as what is said of the name: returns a shell-escaped version of the string."""

    @property
    def answer(self) -> str:
        return f"`{self.name}{self.signature}` {self.text}"


def documented() -> Iterator[Entry]:
    """Everything public in the listed modules that has a signature and a docstring that says what it does."""
    for module_name in ("", *MODULES):
        try:
            module = importlib.import_module(module_name) if module_name else builtins
        except ImportError:  # a Python built without it
            continue
        for name, thing in sorted(public_names(module).items()):
            full_name = f"{module_name}.{name}".lstrip(".")
            yield from entries(full_name, thing)
            if inspect.isclass(thing):
                for method_name, method in sorted(vars(thing).items()):
                    if not method_name.startswith("_"):
                        yield from entries(f"{full_name}.{method_name}", method)


def public_names(module: ModuleType) -> dict[str, object]:
    """What the module offers and has defined itself; `os.path` is `posixpath` under the name that people use."""
    listed = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    things = {name: getattr(module, name, None) for name in listed}
    return {name: thing for name, thing in things.items() if not inspect.ismodule(thing)}


def entries(name: str, thing: object) -> Iterator[Entry]:
    if inspect.isclass(thing) or inspect.isroutine(thing):
        signature, text = call_signature(thing), said_of_it(first_paragraph(getattr(thing, "__doc__", None)))
        if signature is not None and text:
            yield Entry(name, signature, text)


def call_signature(thing: object) -> str | None:
    """(s, *, maximum=10): without annotations and self. None when it is unknown, long or differs from run to run."""
    function = thing.__func__ if isinstance(thing, (staticmethod, classmethod)) else thing
    try:
        signature = inspect.signature(function)  # type: ignore[arg-type]  # TypeError is caught
    except (TypeError, ValueError):
        return None
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls", "mcls")
    ]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    text = text.replace("(/, ", "(").replace("(/)", "()").replace(", /", "")
    return text if len(text) <= 60 and "<" not in text and "0x" not in text else None


def first_paragraph(docstring: object) -> str:
    """The docstring's first paragraph in one line, markup taken out; empty when it is not sentences, short or long."""
    if not isinstance(docstring, str):
        return ""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring))[0]
    text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"`\1`", " ".join(paragraph.split())).replace("``", "`")
    return text if is_running_text(paragraph, text) and 25 <= len(text) <= MAX_TEXT_CHARACTERS else ""


def is_running_text(paragraph: str, text: str) -> bool:
    """Sentences, not code, lists, tables or a signature."""
    unusual = re.search(r">>>|\n\s+\S|^\s*[-*+|=]|--|::|->|__|[^\n\x20-\x7e]|[Dd]eprecated|^\w+\(", paragraph)
    return unusual is None and text[:1].isupper() and text[-1:] == "."


def said_of_it(text: str) -> str:
    """Return True if ... -> returns True if ...; empty when the text does not begin with a known verb."""
    first, _, rest = text.partition(" ")
    verb = first.lower()
    if verb in VERBS:
        verb = third_person(verb)
    return f"{verb} {rest}" if verb in THIRD_PERSONS else ""


def third_person(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ies"
    return f"{verb}es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else f"{verb}s"


THIRD_PERSONS = frozenset(map(third_person, VERBS))


def distinct(found: Iterator[Entry]) -> list[Entry]:
    """The first entry of each name and of each text, in the order of a hash: mixed, and the same every time."""
    names: set[str] = set()
    texts: set[str] = set()
    kept = []
    for entry in found:
        if entry.name not in names and entry.text not in texts:
            kept.append(entry)
        names.add(entry.name)
        texts.add(entry.text)
    return sorted(kept, key=lambda entry: fraction_of(entry.name))


def fraction_of(text: str) -> float:
    """A number in [0, 1) that only depends on `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split(found: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """(train, eval), apart by the last part of the name: str.split and bytes.split say nearly the same."""
    last = HELD_OUT.rpartition(".")[2]
    rest = [entry for entry in found if entry.name.rpartition(".")[2] != last]
    is_eval = [fraction_of(entry.name.rpartition(".")[2]) < EVAL_SHARE for entry in rest]
    return (
        [entry for entry, held in zip(rest, is_eval, strict=True) if not held],
        [entry for entry, held in zip(rest, is_eval, strict=True) if held],
    )


def row(entry: Entry) -> dict[str, object]:
    question = QUESTIONS[int(fraction_of(f"question {entry.name}") * len(QUESTIONS))].format(name=entry.name)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": entry.answer}]}


def write_rows(path: Path, found: list[Entry]) -> None:
    path.write_text("".join(json.dumps(row(entry)) + "\n" for entry in found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data", help="where to write")
    parser.add_argument("--train-rows", type=int, default=200, help="rows of train.jsonl (default 200)")
    parser.add_argument("--eval-rows", type=int, default=40, help="rows of eval.jsonl (default 40)")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of modules that are only looked at
        train, evaluation = split(distinct(documented()))
    if len(train) < options.train_rows or len(evaluation) < options.eval_rows:
        sys.exit(f"this Python documents {len(train)} and {len(evaluation)} usable names; ask for fewer rows")
    options.folder.mkdir(parents=True, exist_ok=True)
    write_rows(options.folder / "train.jsonl", train[: options.train_rows])
    write_rows(options.folder / "eval.jsonl", evaluation[: options.eval_rows])
    (options.folder / "question.txt").write_text(QUESTIONS[0].format(name=HELD_OUT) + "\n", encoding="utf-8")
    print(f"{options.train_rows} training rows and {options.eval_rows} evaluation rows in {options.folder}")


if __name__ == "__main__":
    main()
