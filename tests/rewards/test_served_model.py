"""The client of a served reward model against a real server process that is slow, broken, busy, or killed."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1v2.config.schema import RewardModelConfig
from megatron_r1v2.rewards.served_model import PATIENCE, ScoreEndpoint, ScoringFailed, ServedRewardModel, split_url
from megatron_r1v2.stages import loaded_reward_model
from megatron_r1v2.types import Prompt
from tests.tiny import tiny_png

ALONE: Any = SimpleNamespace(is_replica_leader=True, tensor_size=1, pipeline_size=1)
PICTURE = tiny_png(1)
PROMPT = Prompt(
    key="sample-1",
    messages=({"role": "system", "content": "Be right."}, {"role": "user", "content": "<image>\nHow many?"}),
    token_ids=(1,),
    tiles_TCHW=torch.zeros(0, 3, 32, 32, dtype=torch.uint8),
    answer="3",
    answer_type="numeric",
    images=(PICTURE,),
)


class Server:
    def __init__(self, folder: Path) -> None:
        self.file = folder / "port"
        script = Path(__file__).with_name("scoring_server.py")
        self.process = subprocess.Popen([sys.executable, str(script), str(self.file)])
        deadline = time.monotonic() + 60
        while not self.file.exists():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.address = f"http://127.0.0.1:{self.file.read_text()}"

    def told(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.address) as answer:
            return json.loads(answer.read())


def shorten_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run in this process ask a server as often as ever, but with short pauses between: they are 15 seconds."""
    patience = dataclasses.replace(PATIENCE, first_pause_seconds=0.05)
    quick = functools.partial(ServedRewardModel, patience=patience)
    monkeypatch.setattr(loaded_reward_model, "ServedRewardModel", quick)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def client(server: Server) -> Callable[..., ServedRewardModel]:
    def make(mode: str, **settings: Any) -> ServedRewardModel:
        patience = {"timeout_seconds": 20.0, "attempts": 3, "first_pause_seconds": 0.05} | settings
        return ServedRewardModel(
            RewardModelConfig(url=f"{server.address}/{mode}"), ALONE, dataclasses.replace(PATIENCE, **patience)
        )

    return make


def ask(model: ServedRewardModel, count: int = 1) -> list[float]:
    return model.score([PROMPT] * count, ["word " * number for number in range(1, count + 1)])


def test_scores_come_in_order_and_no_more_are_under_way_than_allowed(client, server):
    assert ask(client("slow", concurrency=4), 12) == [float(number) for number in range(1, 13)]
    assert 2 <= server.told()["most"] <= 4


@pytest.mark.parametrize("endpoint", ScoreEndpoint)
def test_a_request_is_what_vllm_reads(client, server, endpoint, monkeypatch):
    monkeypatch.setenv("R1V2_REWARD_MODEL_API_KEY", "open sesame")
    model = client(f"ok/v1/{endpoint.value}/")
    assert ask(model) == [1.0]
    last = server.told()["last"]
    assert last["path"] == f"/ok/v1/{endpoint.value}"
    assert last["key"] == "Bearer open sesame"
    url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    expected = {
        "use_activation": False,
        "answer": "3",
        "messages": [
            {"role": "system", "content": "Be right."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "\nHow many?"},
                ],
            },
            {"role": "assistant", "content": "word "},
        ],
    }
    assert last["body"] == expected | ({"task": "classify"} if endpoint is ScoreEndpoint.pooling else {})


def test_a_server_that_wakes_up_is_waited_for(client, server):
    assert ask(client("wakes", attempts=4)) == [1.0]
    assert server.told()["asked"] == 4


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("busy", "HTTP 503.*told why"),
        ("garbage", "JSONDecodeError"),
        ("nan", "not a finite number"),
        ("two", "no single score"),
        ("empty", "no single score"),
        ("huge", "longer than"),
    ],
)
def test_what_is_no_score_is_asked_again_and_then_an_error_with_numbers(client, server, mode, told):
    with pytest.raises(ScoringFailed, match=rf"'sample-1' in 3 attempts over .* s; the last one: .*{told}"):
        ask(client(mode))
    assert server.told()["asked"] == 3


@pytest.mark.parametrize("mode", ["hangs", "drips"])
def test_a_slow_server_is_given_the_time_limit_and_no_more(client, mode):
    started = time.monotonic()
    with pytest.raises(ScoringFailed, match="in 2 attempts"):
        ask(client(mode, timeout_seconds=0.5, attempts=2))
    assert time.monotonic() - started < 15


def test_a_refused_request_is_not_repeated(client, server):
    with pytest.raises(ScoringFailed, match=r"HTTP 401: .*told why.*R1V2_REWARD_MODEL_API_KEY"):
        ask(client("refuses"))
    assert server.told()["asked"] == 1


def test_a_server_killed_in_the_middle_ends_the_step_with_numbers(client, server):
    def kill_in_the_middle() -> None:
        while server.told()["asked"] < 24:
            time.sleep(0.02)
        server.process.kill()

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    with pytest.raises(ScoringFailed, match=r"3 attempts.*; [1-9]\d* of 400 responses of this step had a score"):
        ask(client("slow", concurrency=8), 400)
    killer.join()


def test_nobody_listening_is_an_error_and_not_a_zero(client, server):
    server.process.kill()
    server.process.wait()
    with pytest.raises(ScoringFailed, match=r"3 attempts.*refused.*; 0 of 20 responses"):
        ask(client("ok"), 20)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1/pooling"),
        ("http://127.0.0.1:1/v1/", "http://127.0.0.1:1/v1/pooling"),
        ("http://127.0.0.1:1/pooling", "http://127.0.0.1:1/pooling"),
        ("http://127.0.0.1:1/classify/", "http://127.0.0.1:1/classify"),
    ],
)
def test_the_address_says_what_the_server_understands(url, asked):
    assert split_url(url) == (asked, ScoreEndpoint(asked.rsplit("/")[-1]))


def test_without_a_key_none_is_sent(client, server, monkeypatch):
    monkeypatch.delenv("R1V2_REWARD_MODEL_API_KEY", raising=False)
    assert ask(client("ok")) == [1.0]
    assert not server.told()["last"]["key"]
