import pytest

from megatron_r1v2.rewards.answers.dates import read_date


@pytest.mark.parametrize(
    ("spellings", "expected"),
    [
        (("1999/05/01", "1999-5-1", "1999.05.01", "May 1, 1999", "1 May 1999", "May 1st 1999", "1st of May 1999",
          "1999\u5e745\u67081\u65e5"), "date 1999-5-1"),
        (("May 1", "1 may", "May 1st"), "date 0-5-1"),
        (("1999\u5e745\u6708",), "date 1999-5-0"),
        (("5/1/1999", "05/01/1999", "5-1-1999"), "date 5/1/1999"),
        (("3 pm", "3:00 pm", "3 p.m.", "3:00 PM"), "time 3:00 pm"),
        (("7-8", "7 to 8", r"7\sim 8", "from 7 to 8", "between 7 and 8", "7\u81f38"), "range 7 to 8"),
        (("1990-1995", "1990--1995"), "range 1990 to 1995"),
        (("1.5-2.5",), "range 1.5 to 2.5"),
        (("1990s",), "decade 1990"),
    ],
)  # fmt: skip
def test_one_spelling(spellings, expected):
    assert {read_date(text) for text in spellings} == {expected}


@pytest.mark.parametrize(
    "text", ["", "7", "-8", "7-x", "7 and 8", "from 7 and 8", "1:2", "13:45", "May", "x-y", "2-3-4-5"]
)
def test_what_is_no_date(text):
    assert read_date(text) is None
