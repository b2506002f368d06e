"""Cron: what is taken for what, and what is refused."""

import re

import pytest

from automerge_pipelines.cron import six_fields


@pytest.mark.parametrize(
    ("written", "six"),
    [
        ("0 2 * * *", "0 0 2 * * *"),  # as five fields Kubeflow would read: second 0, minute 2, every hour
        ("*/15 * * * *", "0 */15 * * * *"),
        ("30 0 2 * * *", "30 0 2 * * *"),
        ("  0   2 * *  1-5 ", "0 0 2 * * 1-5"),
        ("0 2 ? * MON,wed", "0 0 2 ? * MON,wed"),
        ("5/10 0-6/2 1,15 Jan-Mar *", "0 5/10 0-6/2 1,15 Jan-Mar *"),
        ("0 0 29 2 *", "0 0 0 29 2 *"),
        ("0 0 31 2,3 *", "0 0 0 31 2,3 *"),
        ("0 0 30 2 1", "0 0 0 30 2 1"),  # with a day of the week, either of them starts it
    ],
)
def test_six_fields(written: str, six: str) -> None:
    assert six_fields(written) == six
    assert six_fields(six) == six


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "has 0 fields"),
        ("0 2 * *", "has 4 fields"),
        ("0 0 2 * * * *", "has 7 fields"),
        ("@daily", "has 1 fields"),
        ("60 2 * * *", "the minute 60 is not from 0 to 59"),
        ("0 24 * * *", "the hour 24 is not from 0 to 23"),
        ("0 0 0 * *", "the day of the month 0 is not from 1 to 31"),
        ("0 0 * 13 *", "the month 13 is not from 1 to 12"),
        ("0 0 * * 7", "the day of the week 7 is not from 0 to 6; Sunday is 0"),
        ("0 0 * * someday", "the day of the week has 'someday', which is no number"),
        ("5-1 * * * *", "the minute '5-1' ends before it begins"),
        ("*/0 * * * *", "the minute 0 is not from 1 to 59"),
        ("*-5 * * * *", "a range begins with a number"),
        ("1,,2 * * * *", "is no cron field"),
        ("0 0 L * *", "the day of the month has 'L'"),
        ("0 0 * * 1#2", "is no cron field"),
        ("0 0 30 2 *", "no month has such a day"),
        ("0 0 31 4,6,9,11 *", "no month has such a day"),
        ("٣ * * * *", "is no cron field"),
    ],
)
def test_refused(written: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        six_fields(written)
