import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_r1v2.rewards.verifiers import Call, VerifierPool, answer_call, claims_call, worker_count

HERE = str(Path(__file__).parent)
ROOT = str(Path(__file__).parents[2])
# Generous, because tests share two cores with each other; still short, because hanging checks take all of it.
TIMEOUT = 1.0


def _hostile(function, *arguments):
    return Call("hostile_checks", function, arguments)


def process_ids(pool):
    return [worker.process.pid for worker in pool._workers]


def _is_alive(process_id):
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    with VerifierPool(2, TIMEOUT) as made:
        yield made


def _answer(value, answer_type="numeric"):
    return answer_call(f"left 3</think>\\boxed{{{value}}}", "8", answer_type)


def test_results_are_in_the_order_of_the_calls(pool):
    values = [{"index": index, "text": "\x00\ud800" * (index % 7)} for index in range(200)]
    assert pool.run([_hostile("echo", value) for value in values], failed=None) == values
    answers = [7 + index % 2 for index in range(101)]
    assert pool.run([_answer(value) for value in answers], failed=None) == [value == 8 for value in answers]
    assert (pool.timeouts, pool.crashes) == (0, 0)


def test_every_answer_type_and_claims_run_in_workers(pool):
    calls = [
        _answer(r"\frac{16}{2}", "math"),
        _answer("8.0"),
        answer_call(r"\boxed{(c)}", "C", "choice"),
        answer_call(r"\boxed{8.0}", "8", "exact"),
        claims_call("left 3, right 5", r"(?P<name>left|right) (?P<value>\d)"),
    ]
    assert pool.run(calls, failed=None) == [True, True, True, False, [["left", "3"], ["right", "5"]]]


def test_a_hang_fails_one_check_and_the_others_go_on(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    with VerifierPool(3, TIMEOUT) as pool:
        before = set(process_ids(pool))
        hangs = [_hostile(name) for name in ("busy_loop", "catastrophic_regex", "huge_power", "stop_itself")]
        start = time.perf_counter()
        results = pool.run([_answer(8), *hangs, *[_answer(8)] * 20, hangs[0]], failed=False)
        assert results == [True, *[False] * 4, *[True] * 20, False]
        assert (pool.timeouts, pool.crashes) == (5, 0)
        assert time.perf_counter() - start < 10 * TIMEOUT
        assert len(set(process_ids(pool))) == 3, "a worker that was ended must be replaced"
        assert not any(_is_alive(process_id) for process_id in before - set(process_ids(pool)))
        assert pool.run([_answer(8)] * 6, failed=False) == [True] * 6


@pytest.mark.parametrize(
    "crash", ["exit_at_once", "segfault", "take_all_memory", "raise_error", "recurse", "kill_itself"]
)
def test_a_crash_fails_one_check_and_the_others_go_on(pool, crash):
    calls = [_hostile(crash), *[_answer(8)] * 20, _hostile(crash), _answer(8), _hostile(crash)]
    assert pool.run(calls, failed=False) == [False, *[True] * 20, False, True, False]
    assert (pool.timeouts, pool.crashes) == (0, 3)


def test_real_answers_that_hang_math_verify(pool):
    calls = [_answer("9^{9^{9}}", "math"), _answer("8", "math"), _answer("10!!!!", "math"), _answer("9**9**9", "math")]
    assert pool.run(calls, failed=False) == [False, True, False, False]
    assert (pool.timeouts, pool.crashes) == (2, 0)


def test_a_megabyte_with_unbalanced_boxes_is_only_wrong(pool):
    texts = ["\\boxed{" * 200_000, "{" * 1_000_000, "\x00" * 1_000_000 + r"\boxed{8", r"\boxed{8}" + "}" * 1_000_000]
    results = pool.run([answer_call(text, "8", "numeric") for text in texts], failed=None)
    assert results == [False, False, False, True]
    assert (pool.timeouts, pool.crashes) == (0, 0)


def test_workers_import_neither_torch_nor_math_verify_before_they_need_it(pool):
    pool.run([_answer(8)] * 10, failed=None)
    for modules in pool.run([_hostile("loaded_modules")] * 4, failed=None):
        loaded = {name.partition(".")[0] for name in modules}
        assert not loaded & {"torch", "megatron", "numpy", "transformers", "math_verify", "sympy"}
        assert "megatron_r1v2.rewards.verifier_worker" in modules or "__main__" in modules


def test_importing_what_a_check_needs_is_not_part_of_its_time(monkeypatch, tmp_path):
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(1.5)\n\ndef answer():\n    return 8\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with VerifierPool(1, 0.5) as pool:
        assert pool.run([Call("slow_import", "answer", ())], failed=None) == [8]
        assert pool.timeouts == 0


def test_a_package_that_is_missing_is_an_error_and_not_a_wrong_answer(pool, capfd):
    with pytest.raises(
        RuntimeError, match=r"ended before they started a check \(exit code 1\).*Is math-verify installed"
    ):
        pool.run([_answer(8), Call("broken_import", "check", ())], failed=False)
    assert "no_such_module_anywhere" in capfd.readouterr().err
    assert pool.run([_answer(8)], failed=False) == [True]


def test_a_worker_that_died_while_idle_costs_no_check(pool):
    pool.run([_answer(8)] * 4, failed=None)
    for process_id in process_ids(pool):
        os.kill(process_id, signal.SIGKILL)
    assert pool.run([_answer(8)] * 20, failed=False) == [True] * 20
    assert pool.crashes == 0


def test_signals_to_the_whole_job_do_not_reach_a_check(pool):
    pool.run([_answer(8)] * 4, failed=None)

    def signal_workers():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            for process_id in process_ids(pool):
                os.kill(process_id, number)

    timer = threading.Timer(0.2, signal_workers)
    timer.start()
    before = process_ids(pool)
    assert set(pool.run([_hostile("sleep", 0.6)] * 2, failed=None)) == set(before)
    timer.join()


def test_an_interrupt_leaves_no_stale_answer(pool):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR2, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run([_hostile("interrupt_trainer", 0.8), _hostile("sleep", 0.8)], failed=None)
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert pool.run([_hostile("echo", 1), _hostile("echo", 2)], failed=None) == [1, 2]


def test_the_workers_work_at_the_same_time(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(HERE)
    with VerifierPool(2, 60.0) as pool:
        assert len(set(pool.run([_hostile("meet", str(tmp_path), 2)] * 2, failed=None))) == 2
        assert pool.timeouts == 0, "each has waited for the other"


def test_many_small_checks_are_quick():
    with VerifierPool(2, 5.0) as pool:
        calls = [_answer(8)] * 128
        pool.run(calls, failed=False)
        times, end = [], time.perf_counter() + 60
        while len(times) < 5 or (min(times) >= 0.1 and time.perf_counter() < end):  # others may keep the cores busy
            start = time.perf_counter()
            assert all(pool.run(calls, failed=False))
            times.append(time.perf_counter() - start)
        assert min(times) < 0.1


def test_a_process_with_over_a_thousand_open_files_can_check():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2048:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2048), hard))
    with ExitStack() as held:
        for _ in range(1100):
            held.enter_context(open(os.devnull))
        with VerifierPool(1, TIMEOUT) as pool:
            assert pool.run([_answer("8"), _answer("9")], failed=None) == [True, False]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_close_leaves_no_process():
    with VerifierPool(3, TIMEOUT) as pool:
        workers = process_ids(pool)
        assert all(_is_alive(process_id) for process_id in workers)
    assert not any(_is_alive(process_id) for process_id in workers)
    with pytest.raises(RuntimeError, match="closed"):
        pool.run([_answer(8)], failed=False)


def test_workers_end_when_their_trainer_is_killed():
    # One worker is stuck in Python, one inside C, one is idle while a forked child of the trainer, as a data loader
    # makes them, keeps its socket open.
    program = """
import os, time
from megatron_r1v2.rewards.verifiers import Call, VerifierPool
pool = VerifierPool(3, 1.0)
pool.run([Call("hostile_checks", "sleep", (0.1,))] * 3, failed=0)
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print(*(worker.process.pid for worker in pool._workers), flush=True)
pool.run([Call("hostile_checks", name, ()) for name in ("busy_loop", "catastrophic_regex")], failed=0)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, ROOT])}
    trainer = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    workers = [int(word) for word in trainer.stdout.readline().split()]
    assert len(workers) == 3
    time.sleep(0.3)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 40
    while any(_is_alive(process_id) for process_id in workers):
        assert time.monotonic() < deadline, "a worker outlived its trainer"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("workers", "seconds", "message"),
    [
        (0, 1.0, "workers=0 check nothing"),
        (2, 0.0, "timeout_seconds=0.0"),
        (2, float("nan"), "timeout_seconds=nan"),
    ],
)
def test_impossible_settings_are_named(workers, seconds, message):
    with pytest.raises(ValueError, match=message):
        VerifierPool(workers, seconds)


def test_an_unknown_answer_type_is_refused_before_any_worker_sees_it():
    with pytest.raises(ValueError, match="'number' is unknown"):
        answer_call("8", "8", "number")


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(1, 1, 1), (2, 1, 1), (8, 1, 4), (8, 2, 2), (64, 1, 8), (64, 8, 4)]
)
def test_checks_take_half_of_the_cores_of_a_rank(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert worker_count() == workers


def test_crashes_that_end_no_worker_are_counted_too(pool):
    pool.count_crashes(3)
    assert (pool.timeouts, pool.crashes) == (0, 3)


def test_a_pinned_file_may_not_change(pool):
    pool.pin("a.py", "1")
    pool.pin("b.py", "2")
    pool.pin("a.py", "1")
    with pytest.raises(RuntimeError, match=r"a.py has changed since the run began"):
        pool.pin("a.py", "2")
