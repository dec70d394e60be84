"""Labelled texts from CSV files. What is ambiguous is refused, with the number of its line.

The reader is Python's own `csv` in strict mode. What it lets pass is checked here: rows of another width than the
header, columns of one name, marks and encodings of the text. Readers that infer more (types, missing values, index
columns) would turn a text such as "NA" or a comma without quotes into something else without a word.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from privtuner.errors import InputError

__all__ = ["TextTable", "label_names", "read_csv", "read_texts"]

# The longer mark first: that of UTF-32 in this byte order begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";"}


@dataclass(frozen=True)
class TextTable:
    """Texts and their labels, row by row.

    Attributes:
        source: where they are from, for messages.
        texts: one string a row.
        labels: one label a row, as many as ``texts``.
        lines: the line of ``source`` on which each row begins, counted from 1; empty for rows that are of no file.
    """

    source: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    lines: tuple[int, ...] = ()

    def where(self, label: str) -> str:
        """Return where ``label`` is first used, for messages."""
        row = self.labels.index(label)
        return f"{self.source}, line {self.lines[row]}" if self.lines else self.source


def read_csv(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    *,
    delimiter: str = ",",
    encoding: str | None = None,
) -> TextTable:
    """Read a CSV file whose first line names its columns.

    Fields that hold the delimiter, a quote or a line end stand in double quotes, quotes in them are doubled. Lines end
    with LF, CR LF or CR; empty ones are passed over. White space around a label is no part of it.

    Args:
        path: the file.
        text_column: name of the column of texts.
        label_column: name of the column of labels, another one.
        delimiter: what separates fields: one character, or "tab", "comma" or "semicolon".
        encoding: encoding of the text, by Python's name. None means what a byte-order mark says (UTF-8, UTF-16 or
            UTF-32), and UTF-8 without a mark.

    Raises:
        privtuner.errors.InputError: the file cannot be read or decoded, lacks a column or has it twice, has no rows, a
            row of another number of fields than the header, a row without a text or a label, white space before a
            label's quotes, or a NUL character. The line is named.
    """
    if text_column == label_column:
        raise InputError(f"texts and labels are both to come from the column {text_column!r}; name two")
    texts: list[str] = []
    labels: list[str] = []
    lines: list[int] = []
    for line, (text, label) in _records(path, {"text": text_column, "label": label_column}, delimiter, encoding):
        if label[:1].isspace() and label.lstrip().startswith('"'):
            raise InputError(
                f"{path}, line {line}: white space before a label's quotes, which are then part of it; take it away"
            )
        if not text.strip() or not label.strip():
            raise InputError(f"{path}, line {line}: text or label is empty; fill it in or drop the row")
        texts.append(text)
        labels.append(label.strip())
        lines.append(line)
    return TextTable(str(path), tuple(texts), tuple(labels), tuple(lines))


def read_texts(
    path: str | Path, text_column: str = "text", *, delimiter: str = ",", encoding: str | None = None
) -> tuple[str, ...]:
    """Read the texts of a CSV file, which needs no labels; see `read_csv`.

    Raises:
        privtuner.errors.InputError: as `read_csv`, of the texts alone.
    """
    texts = []
    for line, (text,) in _records(path, {"text": text_column}, delimiter, encoding):
        if not text.strip():
            raise InputError(f"{path}, line {line}: the text is empty; fill it in or drop the row")
        texts.append(text)
    return tuple(texts)


def label_names(train: TextTable, test: TextTable | None = None) -> tuple[str, ...]:
    """Return the labels of ``train``; a label's index is its place.

    Integers are in the order of numbers, if all labels are, other labels in that of their characters.

    Raises:
        privtuner.errors.InputError: fewer than two labels; two that differ only in case, white space, Unicode form or
            the way an integer is written; or ``test`` has one that ``train`` lacks.
    """
    spelled: dict[str | int, tuple[str, TextTable]] = {}
    for table in (train, test) if test is not None else (train,):
        for label in dict.fromkeys(table.labels):
            known, source = spelled.setdefault(_sameness(label), (label, table))
            if known != label:
                raise InputError(
                    f"{table.where(label)}: the label {label!a} differs only in spelling from {known!a} of "
                    f"{source.where(known)}; write both alike, or rename one if they are two classes"
                )
    names = sorted(set(train.labels))
    if all(_INTEGER.fullmatch(name) for name in names):
        names.sort(key=int)
    if len(names) < 2:
        raise InputError(f"{train.source} has the single label {names[0]!r}; a classifier needs two or more")
    unknown = sorted(set(test.labels) - set(names)) if test is not None else []
    if test is not None and unknown:
        raise InputError(
            f"{test.where(unknown[0])}: labels that {train.source} lacks: {', '.join(map(repr, unknown[:5]))}"
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            + "; no text of them could be classified rightly"
        )
    return tuple(names)


def _records(
    path: str | Path, columns: Mapping[str, str], delimiter: str, encoding: str | None
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line of each row below the header, and its fields in ``columns``: what they hold -> their names."""
    delimiter = _DELIMITERS.get(delimiter, delimiter)
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise InputError(f"delimiter is {delimiter!r}; give one character, or tab, comma or semicolon")
    content = _decode(path, encoding)
    with _fields_of(len(content)):
        rows = _rows(path, content, delimiter)
        first, header = next(rows, (1, []))
        places = [_place(path, header, name, what) for what, name in columns.items()]
        empty = True
        for line, row in rows:
            if len(row) != len(header):
                raise InputError(
                    f"{path}, line {line}: {_fields(len(row))} where the header has {len(header)}; put quotes around "
                    f"fields that contain {delimiter!r}, and leave no field out"
                )
            empty = False
            yield line, [row[place] for place in places]
    if empty:
        raise InputError(f"{path} has no rows below its header in line {first}")


def _decode(path: str | Path, encoding: str | None) -> str:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    marked = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    try:
        chosen = codecs.lookup(encoding or marked or "utf-8").name
        if marked is not None and not chosen.startswith(marked):
            raise InputError(f"{path} begins with the byte-order mark of {marked.upper()}, which is not {encoding}")
        text = content.decode(chosen)
    except UnicodeDecodeError as error:
        line = _lines(content[: error.start].decode(chosen, "ignore"))
        raise InputError(
            f"{path}, line {line}: byte {content[error.start]:#04x} is not {chosen.upper()}; save the file as UTF-8 or "
            "name its encoding (--encoding cp1252 for most files of Windows)"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise InputError(f"encoding is {encoding!r}, which reads no text; give one such as utf-8 or cp1252") from error
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise InputError(
            f"{path}, line {_lines(text[: text.index(chr(0))])}: a NUL character; the file is no text, or in another "
            "encoding (--encoding utf-16-le for UTF-16 without a byte-order mark)"
        )
    return text


def _rows(path: str | Path, content: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty with the line it begins on."""
    # newline="" leaves line ends inside quotes as they are and counts CR, LF and CR LF as the csv module does.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    begin = 1
    try:
        for row in reader:
            if row:
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {begin}: a quoted field of the row that begins here is not closed, or not followed by "
            f"{delimiter!r} ({error}); write a quote inside a quoted field twice"
        ) from error


@contextmanager
def _fields_of(characters: int) -> Iterator[None]:
    """Let fields be as long as the file: the module's limit is one for the whole process."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, characters + 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _place(path: str | Path, header: Sequence[str], name: str, what: str) -> int:
    """Return the index of the column called ``name``."""
    places = [place for place, column in enumerate(header) if column == name]
    if len(places) == 1:
        return places[0]
    if places:
        raise InputError(
            f"{path} has {len(places)} columns {name!r} (numbers {', '.join(str(place + 1) for place in places)}); "
            f"rename all but the one of the {what}s"
        )
    alike = [column for column in header if _sameness(column) == _sameness(name)]
    separator = next((word for word, sign in _DELIMITERS.items() if len(header) == 1 and sign in header[0]), None)
    if len(alike) == 1:
        advice = f"name it as it is written: --{what}-column {_show(alike[0])}"
    elif separator:
        advice = f"its fields seem to be separated otherwise: --delimiter {separator}"
    else:
        advice = f"its first line must name the columns; name that of the {what}s with --{what}-column"
    columns = ", ".join(_show(column) for column in header[:10]) + (", ..." if len(header) > 10 else "")
    raise InputError(f"{path} has no column {name!r}; its columns are: {columns or 'none'}; {advice}")


def _sameness(label: str) -> str | int:
    """Return what two ways to write one label have in common."""
    if _INTEGER.fullmatch(label):
        return int(label)
    # Format characters (soft hyphens, zero-width spaces) are not seen; lower, as casefold takes "Masse" for "Maße".
    seen = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen.lower()).split())


def _show(text: str) -> str:
    """Return a column's name for messages, cut short: without a header it is a text."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."


def _fields(count: int) -> str:
    return f"{count} field" + ("" if count == 1 else "s")


def _lines(text: str) -> int:
    """Return the number of the line that ``text`` ends on."""
    return 1 + text.count("\n") + text.count("\r") - text.count("\r\n")
