"""Servers from start to end: several ranks, long responses, and an end that was asked for."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time

import openai
import pytest

from tests.serve.running import ask, get, messages_of, metric, served, until


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.sequence=true"),
        pytest.param(("parallel.pipeline=2",), marks=pytest.mark.slow),
    ],
    ids=["TP2 with sequence parallelism", "PP2"],
)
def test_two_ranks_answer_as_one_and_outlive_an_idle_time(run, tmp_path, layout):
    # Twenty seconds without a word would end the ranks that wait; on a busy machine, a few pass within a step.
    arguments = (*layout, "parallel.timeout_minutes=0.33")
    with served(run.folder, *arguments, ranks=2, log=tmp_path / "log") as running:
        client = running.client()
        for pause in (0, 22):
            time.sleep(pause)
            for number in (2, 15):
                answer = ask(client, messages_of(run.prompts[number]), temperature=0, logprobs=True, top_logprobs=1)
                assert answer.choices[0].message.content == run.texts[number]
                told = [token.logprob for token in answer.choices[0].logprobs.content]
                assert told == pytest.approx(run.log_probs[number][: len(told)], abs=2e-5)
                assert all(token.top_logprobs for token in answer.choices[0].logprobs.content)
            with ask(client, n=8, temperature=1, stream=True) as stream:
                next(iter(stream))
            until(lambda: metric(running, "r1v2_open_responses") == 0)
        assert running.stop() == [0, 0]


def test_sigterm_lets_what_is_under_way_finish_and_takes_no_more(run, tmp_path):
    with served(run.root / "model", *HF_SETTINGS, "--grace-seconds", "200", log=tmp_path / "log") as running:
        found = []
        worker = threading.Thread(
            target=lambda: found.append(ask(running.client(timeout=240), n=120, temperature=1, max_tokens=1500))
        )
        worker.start()
        until(lambda: metric(running, "r1v2_open_responses") > 0)
        running.processes[0].terminate()
        until(lambda: get(f"{running.url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="about to end"):
            ask(running.client())
        running.processes[0].join(240)
        worker.join(240)
        assert running.processes[0].exitcode == 0
        assert len(found[0].choices) == 120


def test_clients_that_leave_free_their_places_and_those_that_stay_are_told_of_the_end(run, tmp_path):
    with served(run.root / "model", *HF_SETTINGS, "--grace-seconds", "0", log=tmp_path / "log") as running:
        for number, streamed in enumerate((b"true", b"false"), start=1):
            leave_in_the_middle(running, streamed)
            assert metric(running, "r1v2_abandoned_requests_total") == number
        chunks = iter(ask(running.client(timeout=240), n=16, temperature=0, max_tokens=1500, stream=True))
        next(chunks)
        running.processes[0].terminate()
        with pytest.raises(openai.APIError, match="about to end"):
            list(chunks)
        running.processes[0].join(240)
        assert running.processes[0].exitcode == 0


def leave_in_the_middle(running, streamed: bytes) -> None:
    """Ask for more responses than the server works at, and hang up when they are under way."""
    content = b'{"messages": [{"role": "user", "content": "abc?"}], "n": 64, "temperature": 0, "stream": %s}' % streamed
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content
        )
        until(lambda: metric(running, "r1v2_open_responses") > 0)
    until(lambda: metric(running, "r1v2_open_responses") == 0)


HF_SETTINGS = (
    "model.precision=fp32",
    "data.max_tiles=2",
    "data.max_prompt_tokens=200",
    "generation.max_response_tokens=1500",
    "generation.kv_cache_gib=0.2",
    "generation.max_tokens_per_step=512",
)


def test_responses_may_be_of_64k_tokens_and_a_request_that_takes_too_long_is_ended(run, tmp_path):
    model = shutil.copytree(run.root / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 131072
    (model / "config.json").write_text(json.dumps(config))
    arguments = (*HF_SETTINGS, "generation.max_response_tokens=65536", "--request-seconds", "4")
    with served(model, *arguments, log=tmp_path / "log") as running:
        client = running.client(timeout=240)

        def stopped_in_time() -> bool:
            try:
                answer = ask(client, seed=1, temperature=1, max_tokens=65536, stop=["a", "left"])
            except openai.InternalServerError:  # the first one on a busy machine
                return False
            return answer.choices[0].finish_reason == "stop"

        until(stopped_in_time)
        with pytest.raises(openai.BadRequestError, match="accepted: 1 to 65536"):
            ask(client, max_tokens=65537)
        with pytest.raises(openai.InternalServerError, match="longer than 4 s") as caught:
            ask(client, temperature=0)  # says one word for ever
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than 4 s"):
            list(ask(client, temperature=0, stream=True))
        until(lambda: metric(running, "r1v2_open_responses") == 0)
        assert running.stop(signal.SIGINT) == [0]
