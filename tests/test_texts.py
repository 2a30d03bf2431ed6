"""Texts of strangers on terminals, in logs, tables and pages."""

import csv
import io
import sys

import pytest

from vtp.texts import escape_tracebacks, in_html, in_markdown, listed, message, shown, text_problem, write_csv

ACTING = "\x1b]0;x\x07 \r\n\t\x00\x7f\x85\x9b \u2028\u2029 \u202e\u2066\u200b\ufeff \ud800 \udce9"


def test_nothing_that_a_terminal_acts_on_is_left():
    assert shown(ACTING) == (r"\x1b]0;x\x07 \r\n\t\x00\x7f\x85\x9b \u2028\u2029 \u202e\u2066\u200b\ufeff \ud800 \xe9")
    plain = "größe 日本語 \u3000 a-b_c \\ 😀"
    assert shown(plain) == plain


def test_no_line_of_a_message_passes_for_another():
    said = message("error: a\nerror: forged\x1b[2K\r\nerror: b\n")
    assert said.splitlines() == ["error: a", r"  error: forged\x1b[2K\r", "  error: b"]
    assert message("a\n1  2", indent="") == "a\n1  2"


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1", "=", "-"]
)
def test_no_text_is_a_formula(text):
    file = io.StringIO(newline="")
    write_csv(file, [["name", text], [text, 1]])
    rows = list(csv.reader(io.StringIO(file.getvalue(), newline="")))
    assert len(rows) == 2
    for cell in (rows[0][1], rows[1][0]):
        assert cell[0] not in "=+-@\t\r\n\uff1d"
        assert not cell.lstrip().startswith("=")


def test_numbers_stay_numbers():
    row = [-1, -1.5, "-1", "+2.5", "-1e-3", "1.", "-.5", "nan", "-inf", "", None, 'a, "b"']
    file = io.StringIO(newline="")
    write_csv(file, [row])
    read = next(csv.reader(io.StringIO(file.getvalue(), newline="")))
    assert read == ["-1", "-1.5", "-1", "+2.5", "-1e-3", "1.", "-.5", "nan", "-inf", "", "", 'a, "b"']


def test_pages_and_tables_hold_plain_text():
    text = '<script>"x"</script> [a](http://b) `c` a|b *d* \\| & \x1b\n'
    assert "<" not in in_html(text)
    assert '"' not in in_html(text)
    assert in_markdown(text) == (r'&lt;script>"x"&lt;/script> \[a\](http://b) \`c\` a\|b \*d\* \\\| &amp; \\x1b\\n')
    assert in_markdown("gfid_a_1024") == "gfid_a_1024"


def test_what_is_no_text_is_told():
    assert [text_problem(value) for value in ("é", "\udce9", "\ud800", b"a", None, 1)] == (
        [None, "is not UTF-8", "is not UTF-8", "is no text", "is no text", "is no text"]
    )


def test_tracebacks_are_escaped(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    escape_tracebacks()
    sys.excepthook(RuntimeError, RuntimeError("\x1b[31m\nerror: forged"), None)
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\nerror:" not in said
    assert r"\x1b[31m" in said


def test_ten_are_listed_and_the_rest_is_counted():
    names = [f"n{number}" for number in range(12)]
    assert listed(names) == "n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, and 2 more"
    assert listed(names[:10], "; ").endswith("; n9")
    assert listed(names[:2], count=40) == "n0, n1, and 38 more"
    assert listed([]) == "nothing"
