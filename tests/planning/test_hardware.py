"""The GPUs that are known, by what their vendors say."""

from megatron_r1v2.planning.hardware import HARDWARE, Host


def test_gpus_are_what_their_vendors_say():
    assert list(HARDWARE) == ["a100", "h100", "h200", "b200"]
    assert not HARDWARE["a100"].fp8_flops
    assert all(gpu.fp8_flops == 2 * gpu.bf16_flops for name, gpu in HARDWARE.items() if name in ("b200",))
    assert all(round(gpu.fp8_flops / gpu.bf16_flops) == 2 for name, gpu in HARDWARE.items() if name != "a100")
    # An H200 is an H100 with more and faster memory, of which the driver shows a little less than the name says.
    h100, h200 = HARDWARE["h100"], HARDWARE["h200"]
    assert h100.bf16_flops == h200.bf16_flops
    assert h100.bandwidth < h200.bandwidth
    assert (h100.memory_gib, h200.memory_gib) == (79.6, 139.8)


def test_attained_parts_are_parts():
    for gpu in HARDWARE.values():
        parts = (gpu.matmul_efficiency, gpu.fp8_efficiency, gpu.bandwidth_efficiency, gpu.link_efficiency)
        assert all(0 < part < 1 for part in parts)
        assert gpu.host == Host()


def test_graphs_save_launches():
    host = Host()
    # 64 layers: 29 ms without graphs, by counting.
    assert 0.028 < 64 * host.launches_per_layer * host.launch_seconds < 0.030
    assert host.graph_launches_per_layer < host.launches_per_layer / 10
