"""One rank of a cluster: groups without other processes, and what the others say."""

import json
import subprocess
import sys

from megatron_r1v2.rehearsal.cluster import OTHERS_SAY_NOTHING

_PROGRAM = """
import json, torch, torch.distributed as dist
from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups, objects
from megatron_r1v2.rehearsal import fake_cuda
from megatron_r1v2.rehearsal.cluster import Place, install_fake_groups, note_object_collectives
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors

fake_cuda.install_for_fakes()
mode = FakeTensors("cpu")
install_fake_groups(mode)
note_object_collectives(mode)
Place(13, 16, 8).enter()
with mode, mode.phase("test"):
    context = groups.initialize(ParallelConfig(tensor=4, pipeline=2), seed=1)
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=context.groups.tp)
    said = objects.all_gather("mine", context.groups.dp)
    exchanged = objects.exchange([["a"], ["b"]], context.groups.dp, context.device)
    store = context.store
    store.set("watch/place/13", "here")
    arrived = store.has(["watch/place/13", "watch/place/2"])
    written = store.has(["commands/0"])
    backend = dist.get_backend(context.groups.tp)
place = [context.tensor_rank, context.pipeline_rank, context.data_rank, context.data_size]
calls = [[call.kind, list(call.ranks), call.count] for call in mode.collectives.calls]
print(json.dumps([place, said, exchanged, arrived, written, backend, calls, [rule for rule, _ in mode.questions]]))
"""


def test_a_rank_has_its_place_and_others_answer():
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    place, said, exchanged, arrived, written, backend, calls, rules = json.loads(result.stdout.splitlines()[-1])
    assert place == [1, 1, 1, 2]
    assert said == ["mine", "mine"]
    assert exchanged == [[], ["b"]], "the second of two replicas: what it sends itself, nothing from the other"
    assert arrived
    assert not written, "commands are written by a rank, not awaited from all"
    assert backend == "nccl"
    assert calls[-3:] == [
        ["allreduce_", [12, 13, 14, 15], 3],
        ["object:all_gather_object", [9, 13], 0],
        ["object:exchange", [9, 13], 0],
    ]
    assert any("the same as this one" in rule for rule in rules)


def test_functions_where_others_say_nothing_exist():
    from megatron_r1v2.evaluation.evaluator import Evaluator
    from megatron_r1v2.stages import reference_log_probs
    from megatron_r1v2.stages.grpo import selection
    from megatron_r1v2.stages.grpo.segments import GroupsInFlight
    from megatron_r1v2.stages.pairs import PairMaker
    from megatron_r1v2.training import mismatch, policy

    owners = (Evaluator, reference_log_probs, selection, PairMaker, mismatch, policy, GroupsInFlight)
    assert all(any(hasattr(owner, name) for owner in owners) for name in OTHERS_SAY_NOTHING)
