"""Sixty-four clients at once, bad requests among them: nothing crashes and nobody is forgotten."""

from __future__ import annotations

import random
import threading

import httpx
import openai

from benchmarks import serve_load
from tests.serve.running import ask, messages_of, metric, stream, until

CLIENTS = 64
REQUESTS = 3
BAD = (
    b"",
    b"{",
    b"[]",
    b'{"messages": 1}',
    b'{"messages": [{"role": "user", "content": "a"}], "n": -1}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,AA"}}]}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
    b"\xff" * 1000,
)


def test_every_request_of_sixty_four_clients_gets_its_own_answer(run, server, client):
    """Greedy answers are known; a client that is told to come again comes again."""
    expected = {number: run.texts[number] for number in range(len(run.prompts))}
    failures, answered, refused = [], [], []

    def one_client(name: int) -> None:
        choose = random.Random(name)
        mine = server.client(api_key="secret", max_retries=20, timeout=120)
        for turn in range(REQUESTS):
            number = choose.randrange(len(expected))
            messages = messages_of(run.prompts[number])
            try:
                kind = (name + turn) % 4
                if kind == 0:
                    answer = httpx.post(
                        f"{server.url}/v1/chat/completions",
                        content=choose.choice(BAD),
                        headers={"Authorization": "Bearer secret"},
                        timeout=120,
                    )
                    assert answer.status_code in (400, 503), answer.text
                    refused.append(name)
                elif kind == 1:
                    texts, reasons, _ = stream(mine, messages, temperature=0)
                    assert texts == {0: expected[number]}
                    assert reasons.keys() == {0}
                    answered.append(name)
                elif kind == 2:
                    chunks = ask(mine, messages, temperature=1, stream=True)
                    next(iter(chunks))
                    chunks.close()  # leaves in the middle
                    answered.append(name)
                else:
                    answer = ask(mine, messages, temperature=0, n=2)
                    assert [choice.message.content for choice in answer.choices] == [expected[number]] * 2
                    answered.append(name)
            except (AssertionError, openai.OpenAIError, httpx.HTTPError) as error:
                failures.append((name, turn, repr(error)[:300]))

    health, done = [], threading.Event()

    def ask_for_health() -> None:
        while not done.wait(0.2):
            health.append(httpx.get(f"{server.url}/health", timeout=60).status_code)

    threads = [threading.Thread(target=one_client, args=(name,)) for name in range(CLIENTS)]
    watcher = threading.Thread(target=ask_for_health)
    for thread in [*threads, watcher]:
        thread.start()
    for thread in threads:
        thread.join(200)
        assert not thread.is_alive()
    done.set()
    watcher.join(60)
    assert len(health) > 2
    assert set(health) == {200}, "also while all places are taken"
    assert not failures
    assert len(answered) + len(refused) == CLIENTS * REQUESTS
    assert len(refused) == CLIENTS * REQUESTS // 4
    until(lambda: metric(server, "r1v2_open_responses") == 0)
    assert ask(client, messages_of(run.prompts[0]), temperature=0).choices[0].message.content == expected[0]
    assert metric(server, 'r1v2_requests_total{status="500"}') == 0


def test_the_benchmark_counts_answers_and_refusals(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    options = ["--url", server.url, "--clients", "8", "--requests", "32", "--requests-of-one", "2", "--rounds", "1"]
    options += ["--bad-every", "4", "--max-tokens", "8", "--image-pixels", "32", "--question", "abc?"]
    figures = serve_load.measure(serve_load.parser().parse_args(options))
    (many,) = figures["many_clients"]
    assert (many["answered"], many["bad_requests_told_so"], figures["lost"]) == (24, 8, 0)
    assert 24 <= many["tokens"] <= 24 * 8
    assert figures["throughput_ratio_median"] > 0
    assert (figures["healthy_after"], figures["answered_500"]) == (True, 0)
