"""The command line of the reward server: bad input, and a help that teaches. `test_reward_server.py` runs it."""

from __future__ import annotations

import socket

import pytest

from megatron_r1v2.serve.reward_command import main


def told_by(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_told(tmp_path, capsys):
    folder = str(tmp_path)
    assert "--port: '-1'; accepted: a whole number, 0 or more" in told_by(capsys, folder, "--port", "-1")
    assert "invalid choice: 'fp8'" in told_by(capsys, folder, "--precision", "fp8")
    assert "there is no key in it" in told_by(capsys, folder, "--api-key-variable", "NOT_SET_ANYWHERE")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot listen there" in told_by(capsys, folder, "--port", port)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    told = told_by(capsys, folder, "--port", "0", "--device", "cpu")
    assert "model_type='llama'; this server loads 'qwen2_5_vl'" in told


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in (
        "reward_model.url of a GRPO run",
        "/pooling and /classify",
        "--port PORT",
        "(default: 8001)",
        "proxy",
    ):
        assert words in told
