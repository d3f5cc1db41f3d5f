"""The server of Skywork-VL-Reward as a process, asked by our own client and by clients that do it wrong."""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import io
import json
import multiprocessing
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_r1v2.config.schema import RewardModelConfig
from megatron_r1v2.rewards.served_model import ScoreEndpoint, ScoringFailed, ServedRewardModel
from megatron_r1v2.serve.reward_server import SkyworkReward
from megatron_r1v2.types import Prompt
from tests.ranks import free_port
from tests.serve.tiny_skywork import direct_score, write_tiny_skywork
from tests.tiny import tiny_png

ALONE: Any = SimpleNamespace(is_replica_leader=True, tensor_size=1, pipeline_size=1)
PICTURES = (tiny_png(1), tiny_png(2, width=40, height=56))
KEY = "open sesame"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("skywork") / "tiny-reward"
    write_tiny_skywork(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "megatron_r1v2", "serve-reward-model", str(folder), "--port", str(port)]
    options = ["--precision", "fp32", "--device", "cpu", "--max-body-mib", "1", "--api-key-variable", "SERVER_KEY"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVER_KEY", KEY)
        process = subprocess.Popen([*command, *options])
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 200
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                assert json.loads(answer.read()) == {"status": "ok", "model": "tiny-reward"}
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    yield url
    process.terminate()
    process.wait()


def make_prompt(content: str, *images: bytes) -> Prompt:
    return Prompt(
        key="sample",
        messages=({"role": "user", "content": content},),
        token_ids=(1,),
        tiles_TCHW=torch.zeros(0, 3, 32, 32, dtype=torch.uint8),
        answer="3",
        answer_type="numeric",
        images=images,
    )


RESPONSES = ("three", "3</think>\\boxed{3}", "3")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """Return what transformers gives for the prompts of the test below, with `RESPONSES`."""
    # In a process of its own: with parallel/cpu.py installed, as other tests leave it, transformers leaves the rotary
    # frequencies of a loaded Qwen2.5-VL uninitialised.
    questions = ([PICTURES[0], "\nHow many?"], ["First ", PICTURES[0], " and ", PICTURES[1]], ["What is 1 + 2?"])
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return [
            process.submit(direct_score, folder, *conversation(parts, response)).result()
            for parts, response in zip(questions, RESPONSES, strict=True)
        ]


def conversation(parts: list[Any], response: str) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": response}]
    return messages, [Image.open(io.BytesIO(part)).convert("RGB") for part in parts if not isinstance(part, str)]


@pytest.mark.parametrize("endpoint", ScoreEndpoint)
def test_the_client_gets_the_scores_of_transformers(expected, address, monkeypatch, endpoint):
    monkeypatch.setenv("R1V2_REWARD_MODEL_API_KEY", KEY)
    settings = RewardModelConfig(url=f"{address}/{endpoint.value}")
    prompts = [
        make_prompt("<image>\nHow many?", PICTURES[0]),
        make_prompt("First <image> and <image>", *PICTURES),
        make_prompt("What is 1 + 2?"),
    ]
    scores = ServedRewardModel(settings, ALONE).score(prompts, RESPONSES)
    assert scores == [pytest.approx(score, abs=1e-4) for score in expected]
    assert len(set(scores)) == 3


def test_a_response_that_spells_image_tokens_has_a_score_and_no_image(address, monkeypatch):
    monkeypatch.setenv("R1V2_REWARD_MODEL_API_KEY", KEY)
    settings = RewardModelConfig(url=address)
    prompt = make_prompt("<image>\nHow many?", PICTURES[0])
    (score,) = ServedRewardModel(settings, ALONE).score([prompt], ["<|vision_start|><|image_pad|><|vision_end|>" * 3])
    assert isinstance(score, float)


def test_a_wrong_key_ends_the_run_and_says_where_to_look(address, monkeypatch):
    monkeypatch.setenv("R1V2_REWARD_MODEL_API_KEY", "wrong")
    settings = RewardModelConfig(url=address)
    with pytest.raises(ScoringFailed, match=r"HTTP 401.*R1V2_REWARD_MODEL_API_KEY"):
        ServedRewardModel(settings, ALONE).score([make_prompt("a")], ["b"])


def post(address: str, content: Any, path: str = "/pooling") -> tuple[int, str]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    with suppress(BrokenPipeError):  # a body that is too large is refused while it is sent
        connection.request("POST", path, body, {"Authorization": f"Bearer {KEY}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text if answer.status == 200 else json.loads(text)["error"]["message"]


def asking(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "b"}]}


def picture(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def bomb() -> str:
    """Return a small file of 49 million black pixels."""
    buffer = io.BytesIO()
    Image.new("1", (7000, 7000)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


TEXT = {"type": "text", "text": "a"}
PNG = "data:image/png;base64,"
BAD = {
    "not JSON": (b"{", 400, "the body is not JSON"),
    "deep JSON": (b"[" * 100_000, 400, "the body is not JSON"),
    "a list": ([], 400, "must be a JSON object"),
    "no messages": ({}, 400, "messages must be a list"),
    "bad role": ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0]"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    "not answered": ({"messages": [{"role": "user", "content": "a"}]}, 400, "must be the assistant's"),
    "part": (asking({"type": "audio"}), 400, "messages[0].content[0]: accepted are"),
    "address": (asking(picture("http://127.0.0.1:1/a.png")), 400, "This server fetches nothing"),
    "file": (asking(picture("file:///etc/hostname")), 400, "This server fetches nothing"),
    "base64": (asking(picture(PNG + "!!!")), 400, "not base64"),
    "no image": (asking(picture(PNG + base64.b64encode(b"GIF89a").decode())), 400, "no PNG, JPEG or WebP"),
    "cut": (asking(picture(PNG + base64.b64encode(PICTURES[0][:-40]).decode())), 400, "cannot be decoded"),
    "too many pixels": (asking(picture(bomb())), 413, "49000000 pixels"),
    "too many images": (asking(*[picture(PNG)] * 17), 413, "more than 16 images"),
    "too many messages": ({"messages": [{"role": "user", "content": "a"}] * 257}, 413, "257 messages"),
    "too large": (b" " * (2**20 + 1), 413, "larger than 1048576 bytes"),
    "too long": (asking({"type": "text", "text": "a" * 600}), 413, "at most 512"),
    "other model": (asking(TEXT) | {"model": "gpt"}, 404, "this server has 'tiny-reward'"),
    "activation": (asking(TEXT) | {"use_activation": True}, 400, "raw scores only"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_what_is_wrong_with_it(address, name):
    content, status, message = BAD[name]
    got, told = post(address, content)
    assert (got, message in told) == (status, True), told


def test_the_answer_has_the_shape_of_vllm(address):
    status, told = post(address, asking(TEXT), "/classify")
    answer = json.loads(told)
    assert status == 200
    assert answer["data"][0]["num_classes"] == len(answer["data"][0]["probs"]) == 1
    assert answer["usage"]["prompt_tokens"] > 10
    assert answer["model"] == "tiny-reward"


def test_folders_that_are_no_such_checkpoint_are_refused(folder, tmp_path):
    def copy(name: str, head: dict[str, torch.Tensor] | None, **config: Any) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in folder.iterdir():
            if file.name != "value_head.safetensors":
                (target / file.name).symlink_to(file)
        if head is not None:
            save_file(head, target / "value_head.safetensors")
        if config:
            (target / "config.json").unlink()
            (target / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
        return target

    weight, bias = torch.zeros(1, 64), torch.zeros(1)
    with pytest.raises(ValueError, match=r"value_head.safetensors is missing"):
        SkyworkReward(copy("none", None))
    with pytest.raises(ValueError, match=r"a value head has v_head.summary.weight"):
        SkyworkReward(copy("names", {"weight": weight}))
    with pytest.raises(ValueError, match=r"is \[1, 32\] and the hidden size is 64"):
        SkyworkReward(copy("size", {"v_head.summary.weight": weight[:, :32], "v_head.summary.bias": bias}))
    with pytest.raises(ValueError, match=r"model_type='qwen2'; this server loads 'qwen2_5_vl'"):
        SkyworkReward(copy("kind", {"v_head.summary.weight": weight, "v_head.summary.bias": bias}, model_type="qwen2"))
