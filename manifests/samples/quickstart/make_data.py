"""Question-answer pairs from the documentation that ships inside this Python, for the quickstart.

    python make_data.py [--folder data] [--train-rows 240] [--eval-rows 40]

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

HELD_OUT = "shlex.quote"
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
""".split()  # noqa: SIM905 - 110 lines for a person to scroll over

QUESTIONS = (
    "What does `{name}` do in Python?",
    "What is `{name}` for in Python?",
    "Explain Python's `{name}`.",
    "How would you describe `{name}` from Python's standard library?",
    "When would I use `{name}` in Python?",
)

MAX_ANSWER_CHARACTERS = 200
EVAL_SHARE = 0.15


@dataclass(frozen=True)
class Entry:
    """One documented thing."""

    name: str
    """As one writes it: shlex.quote, str.split."""
    kind: str
    """function, class or method"""
    home: str
    """The module or class it belongs to, None written as the empty string for builtins."""
    signature: str
    text: str
    """First paragraphs of the docstring."""

    @property
    def answer(self) -> str:
        place = {
            "function": f"a function of the module `{self.home}`" if self.home else "a built-in function",
            "class": f"a class of the module `{self.home}`" if self.home else "a built-in class",
            "method": f"a method of the class `{self.home}`",
        }[self.kind]
        return f"`{self.name}{self.signature}` is {place}. {self.text}"


def documented() -> Iterator[Entry]:
    """Everything public in the listed modules that has a signature and a docstring in plain sentences."""
    for module_name in ("", *MODULES):
        try:
            module = importlib.import_module(module_name) if module_name else builtins
        except ImportError:  # a Python built without it
            continue
        for name, thing in sorted(public_names(module).items()):
            full_name = f"{module_name}.{name}".lstrip(".")
            if inspect.isclass(thing):
                yield from entries(full_name, "class", module_name, thing)
                for method_name, method in sorted(vars(thing).items()):
                    if not method_name.startswith("_") and inspect.isroutine(method):
                        yield from entries(f"{full_name}.{method_name}", "method", full_name, method)
            elif inspect.isroutine(thing):
                yield from entries(full_name, "function", module_name, thing)


def public_names(module: ModuleType) -> dict[str, object]:
    """What the module offers and has defined itself; `os.path` is `posixpath` under the name that people use."""
    listed = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    things = {name: getattr(module, name, None) for name in listed}
    return {name: thing for name, thing in things.items() if not inspect.ismodule(thing)}


def entries(name: str, kind: str, home: str, thing: object) -> Iterator[Entry]:
    signature, text = call_signature(thing), first_paragraphs(getattr(thing, "__doc__", None))
    if signature is not None and text:
        yield Entry(name, kind, home, signature, text)


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


def first_paragraphs(docstring: object) -> str:
    """As many leading paragraphs of running text as fit; empty when the first is none, or too short or too long."""
    taken: list[str] = []
    text = inspect.cleandoc(docstring) if isinstance(docstring, str) else ""
    for paragraph in re.split(r"\n\s*\n", text):
        text = " ".join(paragraph.split())
        text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
        if not is_running_text(paragraph, text) or len(" ".join([*taken, text])) > MAX_ANSWER_CHARACTERS:
            break
        taken.append(text)
    answer = " ".join(taken)
    return answer if len(answer) >= 40 else ""


def is_running_text(paragraph: str, text: str) -> bool:
    """Sentences, not code, lists, tables or a signature."""
    unusual = re.search(r">>>|\n\s+\S|^\s*[-*+|=]|--|::|->|__|[^\n\x20-\x7e]|[Dd]eprecated|^\w+\(", paragraph)
    return unusual is None and text[:1].isupper() and text[-1:] == "."


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
    parser.add_argument("--train-rows", type=int, default=240, help="rows of train.jsonl (default 240)")
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
