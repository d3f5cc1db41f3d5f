"""The waits of the host for the device in a step that only decodes: by our code one, two where responses end.

On a CPU nobody waits, but the calls that would are the same ones.
"""

from __future__ import annotations

from megatron_r1v2.generation.context import UnpaddedContext
from megatron_r1v2.generation.features import FeatureCache
from tests.device_reads import CountReads
from tests.generation.worlds import make_engine, make_requests

ON_THE_HOST = {("sampling.py", "draw"): "which of its steps are needed: by temperatures that are on the host"}
WITHOUT_FLASH_ATTN = {"paged_attention.py"}
"""The stand-in for flash-attn, which a GPU has."""


def count_reads(phase) -> CountReads:
    with CountReads() as reads:
        phase.step()
    for place in list(reads.ours):
        if place in ON_THE_HOST or place[0] in WITHOUT_FLASH_ATTN:
            del reads.ours[place]
    return reads


def test_a_decode_step_reads_at_most_two_values(one_rank, monkeypatch):
    monkeypatch.setattr(UnpaddedContext, "_plan_decode", lambda self: None)  # made on a CPU only
    model, context = one_rank
    engine = make_engine(model, context)
    engine.stop_ids = frozenset()
    requests = make_requests(model, 6, tokens=30)
    with engine.open_phase(30, FeatureCache(0)) as phase:
        engine.add(phase, requests, FeatureCache(0))
        phase.step()
        steps = []
        while phase.num_in_flight:
            in_flight = phase.num_in_flight
            reads = count_reads(phase)
            steps.append((in_flight - phase.num_in_flight, reads))
    decoding = [reads.ours for ended, reads in steps if not ended]
    ending = [reads.ours for ended, reads in steps if ended]
    assert len(decoding) > 20
    assert all(reads == {("controller.py", "_read_step"): 1} for reads in decoding)
    assert ending
    for reads in ending:
        assert reads == {("controller.py", "_read_step"): 1, ("blocks.py", "release_memory_blocks"): 1}
    # megatron-core's own: a list to look at when it is upgraded.
    assert {name for name, _ in steps[0][1].theirs} <= {
        "dynamic_context.py",
        "dynamic_engine.py",
        "mha_metadata.py",
        "text_generation_controller.py",
    }
