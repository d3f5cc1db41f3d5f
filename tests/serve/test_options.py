"""Options of the servers: what is accepted, where the key comes from, which addresses can be had."""

from __future__ import annotations

import argparse
import socket

import pytest

from megatron_r1v2.serve.options import ChatOptions, RewardOptions, bind, parse_options, read_api_key


def parse(*argv, model=ChatOptions):
    return parse_options(model, argparse.ArgumentParser(prog="serve"), argv)[1]


def test_every_field_is_an_option_with_its_default():
    assert parse() == ChatOptions()
    options = parse("--port", "0", "--max-queue", "7", "--max-body-mib", "0.5", "--reasoning-ends", "</think>")
    assert (options.port, options.max_queue, options.max_body_mib) == (0, 7, 0.5)
    assert (options.reasoning_ends, options.host) == ("</think>", "127.0.0.1")
    assert parse("--precision", "fp32", model=RewardOptions).precision == "fp32"
    assert (parse().port, parse(model=RewardOptions).port) == (8000, 8001)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--max-queue", "-1"), "argument --max-queue: '-1'; accepted: a whole number, 0 or more"),
        (("--max-queue", "1.5"), "'1.5'; accepted: a whole number, 0 or more"),
        (("--port", "http"), "argument --port: 'http'; accepted: a whole number, 0 or more"),
        (("--max-body-mib", "0"), "argument --max-body-mib: '0'; accepted: a number above 0"),
        (("--request-seconds", "nan"), "argument --request-seconds: 'nan'; accepted: a number above 0"),
        (("--request-seconds", "inf"), "argument --request-seconds: 'inf'; accepted: a number above 0"),
        (("--grace-seconds", "-0.1"), "argument --grace-seconds: '-0.1'; accepted: a number, 0 or more"),
    ],
)
def test_a_bad_value_is_told_with_what_is_accepted(capsys, argv, told):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_a_choice_is_one_of_its_words(capsys):
    with pytest.raises(SystemExit):
        parse("--precision", "fp8", model=RewardOptions)
    assert "invalid choice: 'fp8'" in capsys.readouterr().err


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert "a request that takes longer is ended (default: 3600.0)" in told
    assert "file with the key clients must send --" in told, "an empty default is not shown"


def test_the_key_comes_from_a_variable_or_a_file(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("open sesame\n")
    monkeypatch.setenv("SERVE_KEY", " from the variable ")
    assert read_api_key("") == ""
    assert read_api_key("SERVE_KEY") == "from the variable"
    assert read_api_key("", str(file)) == "open sesame"
    with pytest.raises(ValueError, match="two places of one key"):
        read_api_key("SERVE_KEY", str(file))
    with pytest.raises(ValueError, match=r"--api-key-file .*gone' is not a file"):
        read_api_key("", str(tmp_path / "gone"))
    file.write_text("\n")
    with pytest.raises(ValueError, match=f"--api-key-file {file}: there is no key in it"):
        read_api_key("", str(file))
    monkeypatch.delenv("SERVE_KEY")
    with pytest.raises(ValueError, match="--api-key-variable SERVE_KEY: there is no key in it"):
        read_api_key("SERVE_KEY")


def test_an_address_is_reserved_or_refused():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        # Nothing is accepted yet: a client is refused, and does not wait for a server that is still loading.
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", port))
    for host, port in (("127.0.0.1", 70_000), ("192.0.2.1", 0), ("no.such.host.invalid", 0)):
        with pytest.raises(ValueError, match=f"--host {host} --port {port}: cannot listen there"):
            bind(host, port)
