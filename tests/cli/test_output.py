from __future__ import annotations

import logging

import pytest

from remote_modules.cli import output


def test_error_of_many_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error(ValueError("one\n  two\n\nthree"))
    assert capsys.readouterr().err == "error: one two three\n"


def test_error_without_text_names_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error(ValueError())
    assert capsys.readouterr().err == "error: ValueError\n"


def test_os_error_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error(PermissionError(13, "Permission denied", "/root/key.pem"))
    assert capsys.readouterr().err == "error: /root/key.pem: permission denied\n"


def test_open_line_is_ended_once(capsys: pytest.CaptureFixture[str]) -> None:
    output.stream("half")
    output.end_line()
    output.end_line()
    assert capsys.readouterr().out == "half\n"


def test_log_shows_warnings_only_unless_debugging(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("remote_modules.net")
    output.configure_logging(is_debug=False)
    logger.info("unseen")
    logger.warning("hop failed")
    assert capsys.readouterr().err == "warning: hop failed\n"
    output.configure_logging(is_debug=True)
    logger.debug("seen")
    assert "DEBUG remote_modules.net: seen" in capsys.readouterr().err
