"""Labelled texts from CSV files: what is read, and one refusal, with its line, for each thing left open."""

import codecs
import csv
import io
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loops import each
from privtuner.errors import InputError
from privtuner.train.dataset import TextTable, label_names, read_csv
from text_cases import write_csv


@pytest.fixture
def read(tmp_path):
    def read(content, *columns, **options):
        path = tmp_path / "a.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_csv(path, *columns, **options)

    return read


def test_file_is_read(read, tmp_path):
    table = read('\ufefflabel,text,other\r\n x ,"a, ""b""\nc",1\r\ny,ä,2\r\n')
    assert table == TextTable(str(tmp_path / "a.csv"), ('a, "b"\nc', "ä"), ("x", "y"), (2, 4))


def test_columns_can_be_named(tmp_path):
    table = read_csv(write_csv(tmp_path / "a.csv", [("p", "q")], "one,two"), "two", "one")
    assert (table.texts, table.labels) == (("q",), ("p",))


def test_texts_stay_as_they_are(read):
    """Nothing is inferred: no missing value, number, date or white space of a text."""
    texts = ["NA", "null", "  two  spaces ", "1e5", "007", "TRUE", "2020-01-01", 'it is 5" long', "=1+1", "'quoted'"]
    table = read("text,label\n" + "".join(f"{text},x\n" for text in texts))
    assert table.texts == tuple(texts)


@each(end=["\n", "\r\n", "\r"])
def test_line_ends(read, end):
    table = read(end.join(["text,label", "a,x", "", '"b', 'c",y', "d,x"]))
    assert table.texts == ("a", f"b{end}c", "d")
    assert table.lines == (2, 4, 6)


@each(
    ("encoding", "mark"),
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ],
)
def test_byte_order_marks(read, encoding, mark):
    content = mark + "text,label\nÄrger,é\n".encode(encoding)
    assert read(content) == read(content, encoding=encoding)
    assert (read(content).texts, read(content).labels) == (("Ärger",), ("é",))


def test_encoding_that_is_named(read):
    content = "text,label\nça coûte 5 €,x\n".encode("cp1252")
    assert read(content, encoding="cp1252").texts == ("ça coûte 5 €",)
    with pytest.raises(InputError, match=r"a\.csv, line 2: byte 0xe7 is not UTF-8; .*--encoding cp1252"):
        read(content)


@each(delimiter=[";", "\t", "|"])
def test_delimiter_that_is_named(read, delimiter):
    assert read(f"text{delimiter}label\na, b{delimiter}x\n", delimiter=delimiter).texts == ("a, b",)


def test_delimiter_by_its_word(read):
    assert read("text\tlabel\na\tx\n", delimiter="tab").texts == ("a",)


@each(delimiter=["", ";;", '"', "\n", "\r", "\0"])
def test_delimiter_that_cannot_be(read, delimiter):
    with pytest.raises(InputError, match="delimiter is .*; give one character"):
        read("text,label\na,x\n", delimiter=delimiter)


@each(encoding=["no-such", "base64", "undefined"])
def test_encoding_that_cannot_be(read, encoding):
    with pytest.raises(InputError, match=f"encoding is '{encoding}', which reads no text"):
        read("text,label\na,x\n", encoding=encoding)


def test_field_longer_than_the_csv_module_allows(read):
    before = csv.field_size_limit()
    long = "word " * 100_000
    assert read(f"text,label\n{long},x\nb,y\n").texts == (long, "b")
    with pytest.raises(InputError, match="line 3"):
        read(f"text,label\n{long},x\nb\n")
    assert csv.field_size_limit() == before


@each(
    ("content", "reason"),
    [
        ("", "no column 'text'; its columns are: none"),
        ("txt,label\na,b\n", "no column 'text'; its columns are: 'txt', 'label'; its first line must name the columns"),
        ("text,lab\na,b\n", "no column 'label'; its columns are: 'text', 'lab'"),
        ("Text,label\na,b\n", "no column 'text'; its columns are: 'Text', 'label'; .*--text-column 'Text'"),
        ("text, label\na, b\n", "no column 'label'; .*--label-column ' label'"),
        ("text,,\na,b,c\n", "no column 'label'; its columns are: 'text', '', ''"),
        ("text;label\na;b\n", "no column 'text'; .*--delimiter semicolon"),
        ("text\tlabel\na\tb\n", "no column 'text'; .*--delimiter tab"),
        (",".join("abcdefghijklm"), "'i', 'j', ...;"),
        ("x" * 500 + ",label\n", "columns are: 'x{40}'..., 'label'"),
        ("text,label,label\na,b,7\n", r"2 columns 'label' \(numbers 2, 3\); rename all but the one of the labels"),
        ("text,text,label\na,b,7\n", r"2 columns 'text' \(numbers 1, 2\); rename all but the one of the texts"),
        ("text,label\n", "has no rows below its header in line 1"),
        ("\n\ntext,label\n\n", "has no rows below its header in line 3"),
        ("text,label\nb,x\na, b,x\n", "line 3: 3 fields where the header has 2; put quotes around"),
        ("label,text\nx,a, b\n", "line 2: 3 fields where the header has 2"),
        ("text,label\nb,x,\n", "line 2: 3 fields where the header has 2"),
        ("text,label\na\n", "line 2: 1 field where the header has 2"),
        ("text,label\n   \na,x\n", "line 2: 1 field where"),
        ("text,label,more\na,b\n", "line 2: 2 fields where the header has 3"),
        ("text,label\na,x\n ,y\n", "line 3: text or label is empty"),
        ("text,label\na,\n", "line 2: text or label is empty"),
        ("text,label\n,\n", "line 2: text or label is empty"),
        ('text,label\na,"x"\nb, "y"\n', "line 3: white space before a label's quotes"),
        ('text,label\na,x\n"b\nc",\n', "line 3: text or label is empty"),
        ('text,label\n"a\nb",x\n\nc\n', "line 5: 1 field"),
        ('text,label\na,x\n"b,y\nc,z\n', "line 3: a quoted field of the row that begins here is not closed"),
        ('text,label\n"a" b,x\n', "line 2: a quoted field .* not followed by ','"),
        ('text,label\n"a \\"b\\"",x\n', "line 2: a quoted field .* write a quote inside a quoted field twice"),
        (b"text,label\nok,a\nb\xff,a\n", "line 3: byte 0xff is not UTF-8"),
        (b"text,label\r\rok,a\rb\xff,a\r", "line 4: byte 0xff is not UTF-8"),
        (b"\xff\xfet\0e\0\n\0\0\xd8", "line 2: byte 0x00 is not UTF-16"),
        (b"text,label\na\0b,x\n", "line 2: a NUL character"),
        ("text,label\na,x\n".encode("utf-16-le"), "line 1: a NUL character; .*--encoding utf-16-le"),
    ],
)
def test_file_that_cannot_be_used(read, content, reason):
    with pytest.raises(InputError, match=r"a\.csv.*" + reason) as caught:
        read(content)
    assert "\n" not in str(caught.value)


def test_mark_against_the_encoding(read):
    with pytest.raises(InputError, match="begins with the byte-order mark of UTF-8, which is not cp1252"):
        read(codecs.BOM_UTF8 + b"text,label\na,x\n", encoding="cp1252")


def test_one_column_for_both(read):
    with pytest.raises(InputError, match="both to come from the column 'text'"):
        read("text,label\na,x\n", "text", "text")


def test_column_twice_that_nobody_asks_for(read):
    assert read("text,label,x,x,,\na,b,1,2,3,4\n").labels == ("b",)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot read .*nowhere.csv: No such file"):
        read_csv(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="cannot read .*: Is a directory"):
        read_csv(tmp_path)


# Text of any characters that an encoding can hold; surrogates and NUL are of no text.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12).filter(str.strip)


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    # Where not everything is quoted, some versions of the writer leave a CR that is not its line end without quotes.
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_written_is_read(tmp_path, rows, end, delimiter, encoding, quoting):
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=end, delimiter=delimiter, quoting=quoting)
    writer.writerows([["label", "number", "text"], *([label, 1, text] for text, label in rows)])
    path = tmp_path / "a.csv"
    path.write_bytes(file.getvalue().encode(encoding))
    table = read_csv(path, delimiter=delimiter, encoding=None if encoding != "utf-8" else "utf-8")
    assert table.texts == tuple(text for text, _ in rows)
    assert table.labels == tuple(label.strip() for _, label in rows)
    # A row begins on the line after the last one of the row before it.
    ends = [len(re.findall(r"\r\n|\r|\n", f"{label}{delimiter}{text}\0")) + 1 for text, label in rows]
    assert table.lines == tuple(2 + sum(ends[:place]) for place in range(len(rows)))


@given(st.binary(max_size=60), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path, content, header):
    path = tmp_path / "a.csv"
    path.write_bytes((b"text,label\n" if header else b"") + content)
    try:
        table = read_csv(path)
    except InputError:
        return
    assert len(table.texts) == len(table.labels) == len(table.lines) > 0


def table(*labels, source="file.csv"):
    return TextTable(source, labels, labels, tuple(range(2, 2 + len(labels))))


def test_labels_are_sorted():
    assert label_names(table("b", "a", "b"), table("a")) == ("a", "b")


def test_integers_are_in_the_order_of_numbers():
    assert label_names(table("10", "9", "-1", "100")) == ("-1", "9", "10", "100")
    assert label_names(table("10", "9", "a")) == ("10", "9", "a")
    assert label_names(table(*map(str, range(12)))) == tuple(map(str, range(12)))


@each(
    ("one", "other"),
    [
        ("lost_card", "Lost_Card"),
        ("lost card", "lost  card"),
        ("lost card", "lost\u00a0card"),
        ("caf\u00e9", "cafe\u0301"),
        ("lost\u200b", "lost"),
        ("\uff21", "A"),
        ("7", "07"),
        ("7", "+7"),
    ],
)
def test_labels_that_differ_in_spelling_alone(one, other):
    both = rf"file.csv, line 4: the label {re.escape(ascii(other))} differs only .* {re.escape(ascii(one))} of "
    with pytest.raises(InputError, match=both + "file.csv, line 2; write both alike"):
        label_names(table(one, "else", other))
    with pytest.raises(InputError, match=r"test.csv, line 3: .* of file.csv, line 2"):
        label_names(table(one, "else"), table("else", other, source="test.csv"))


def test_labels_that_are_two_classes():
    names = ("Maße", "Masse", "lost card", "lost_card", "lostcard", "m1", "m01", "7", "7.0")
    assert label_names(table(*names)) == tuple(sorted(names))


def test_labels_of_no_file_are_told_apart_as_well():
    with pytest.raises(InputError, match="^memory: the label 'A' differs only in spelling from 'a' of memory;"):
        label_names(TextTable("memory", ("x", "y"), ("a", "A")))


def test_one_label_is_not_enough():
    with pytest.raises(InputError, match="single label 'a'"):
        label_names(table("a", "a"))


def test_label_that_was_never_trained():
    with pytest.raises(InputError, match="line 3: labels that file.csv lacks: 'c', 'd', 'e', 'f', 'g' and 1 more"):
        label_names(table("a", "b"), table("a", *"cdefgh"))
