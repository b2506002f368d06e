"""Cron expressions in the dialect of Kubeflow Pipelines: six fields, the first of which is the second.

Its scheduler reads the five fields of everyone else's cron without complaint, but as second, minute, hour, ...: a job
for two o'clock would start every hour. So five fields are taken for what they mean, and everything is checked here.
"""

import re

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")

# Name, smallest and largest value, and names for values from the smallest on.
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)
_PART = re.compile(r"(?P<first>\*|\?|\w+)(-(?P<last>\w+))?(/(?P<step>\w+))?", re.ASCII)
_LONGEST_MONTH = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}


def six_fields(text: str) -> str:
    """A cron expression of five or six fields as one of six, with single spaces.

    Raises:
        ValueError: it has another number of fields, a field has no meaning, or no date fits it.
    """
    fields = text.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise ValueError(
            f"{text!r} has {len(fields)} fields; cron has 5 (minute, hour, day of the month, month, day of the week), "
            "or 6 with the second before them"
        )
    values = [_values(field, *row) for field, row in zip(fields, _FIELDS, strict=True)]
    days, months = values[3], values[4]
    if fields[5] in ("*", "?") and not any(min(days) <= _LONGEST_MONTH.get(month, 31) for month in months):
        raise ValueError(f"{text!r}: no month has such a day; it would never start")
    return " ".join(fields)


def _values(field: str, name: str, low: int, high: int, names: tuple[str, ...]) -> set[int]:
    """The values that a field stands for."""
    found: set[int] = set()
    for part in field.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"the {name} {field!r} is no cron field; use numbers, '*', '1-5', '1,3' or '*/2'")
        step = _number(match["step"], name, 1, high, ()) if match["step"] is not None else 1
        if match["first"] in ("*", "?"):
            if match["last"] is not None:
                raise ValueError(f"the {name} {field!r} is no cron field; a range begins with a number")
            first, last = low, high
        else:
            first = _number(match["first"], name, low, high, names)
            last = first if match["step"] is None else high
            if match["last"] is not None:
                last = _number(match["last"], name, low, high, names)
        if first > last:
            raise ValueError(f"the {name} {field!r} ends before it begins")
        found.update(range(first, last + 1, step))
    return found


def _number(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> int:
    if text.lower() in names:
        return low + names.index(text.lower())
    if not text.isdecimal():
        raise ValueError(f"the {name} has {text!r}, which is no number" + (f" and none of {names}" if names else ""))
    value = int(text)
    if not low <= value <= high:
        sunday = "; Sunday is 0" if names is _DAYS else ""
        raise ValueError(f"the {name} {value} is not from {low} to {high}{sunday}")
    return value
