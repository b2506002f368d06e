"""Logs: two styles, fields, and no secret in either."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from automerge.telemetry.logs import configure_logs, log_context, redact

log = logging.getLogger("automerge.stages.search")
SECRET = 'wJalr"XUtnFEMI/K7\\MDENG+é'  # what escaping would change


pytestmark = pytest.mark.usefixtures("logs_as_before")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_human_lines_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("human")
    log.info("trial %d of %d", 3, 200)
    log.warning("the disk is nearly full")
    log.debug("not shown")
    first, second = lines(capsys)
    assert first[8:] == " trial 3 of 200"
    assert second[8:] == " warning: the disk is nearly full"


def test_json_lines_carry_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json")
    with log_context(run="r-1"), log_context(stage="search"):
        log.info("trial done", extra={"trial": 3, "objective": 0.91, "losses": {"low": 0.1}})
    log.info("outside")
    inside, outside = (json.loads(line) for line in lines(capsys))
    assert datetime.fromisoformat(inside.pop("ts")).utcoffset() == timedelta(0)
    assert inside == {
        "level": "info",
        "logger": "automerge.stages.search",
        "message": "trial done",
        "run": "r-1",
        "stage": "search",
        "trial": 3,
        "objective": 0.91,
        "losses": {"low": 0.1},
    }
    assert "stage" not in outside


def test_an_extra_field_cannot_replace_a_standard_one(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json")
    log.info("real", extra={"level": "forged", "logger": "forged"})
    [line] = lines(capsys)
    assert json.loads(line)["level"] == "info"


@pytest.mark.parametrize("style", ["human", "json"])
def test_secrets_of_the_environment_are_struck_out_everywhere(
    style, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logs(style)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)  # after configuring: a stage may set it late
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    try:
        raise RuntimeError(f"login with {SECRET} failed")
    except RuntimeError:
        log.exception("sent %s", SECRET, extra={"headers": {"auth": ["hf_abcdefgh"]}, "object": {SECRET}})
    text = "\n".join(lines(capsys))
    assert "login with *** failed" in text
    for form in (SECRET, json.dumps(SECRET)[1:-1], repr(SECRET)[1:-1], "hf_abcdefgh", "MDENG"):
        assert form not in text


class Fleeting(dict[str, str]):
    """An environment with a variable that another thread takes away while it is read."""

    def __iter__(self) -> Iterator[str]:
        return iter([*self.keys(), "GONE"])

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


def test_a_variable_that_goes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", Fleeting(A_TOKEN="hunter2-hunter2"))
    assert redact("it is hunter2-hunter2") == "it is ***"


def test_redaction_of_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "p/ss word")
    monkeypatch.setenv("API_KEY", "abc")  # too short to be struck out of every word
    assert redact("postgresql://me:hunter2@db/x") == "postgresql://***@db/x"
    assert redact("s3://bucket/key@2 and a@b") == "s3://bucket/key@2 and a@b"
    assert redact("https://h/k?X-Amz-Signature=0ab1&X-Amz-Date=2") == "https://h/k?X-Amz-Signature=***&X-Amz-Date=2"
    assert redact("https://h/?q=p%2Fss%20word abcdef") == "https://h/?q=*** abcdef"


def test_warnings_are_logged_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("human")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logging._showwarning  # type: ignore[attr-defined] # pytest replaces it in every test
        warnings.warn("something is odd", UserWarning, stacklevel=1)
    [line] = lines(capsys)
    assert "warning: " in line and line.endswith("UserWarning: something is odd")


def test_others_speak_from_warning_on_and_configuring_twice_does_not_double(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json")
    configure_logs("human")
    logging.getLogger("botocore").info("chatter")
    logging.getLogger("botocore").warning("worth knowing")
    assert [line[8:] for line in lines(capsys)] == [" warning: worth knowing"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure_logs("human", "LOUD")
