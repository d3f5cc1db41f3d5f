"""The conversion benchmark runs end to end on a checkpoint of a few hundred kilobytes."""

import json

import pytest

from benchmarks import conversion


@pytest.mark.slow
def test_it_measures_both_ways(tmp_path):
    size = ["--tiny", "--vision-layers", "1", "--language-layers", "1", "--vocabulary", "300"]
    conversion.main(["--work", str(tmp_path), "--output", str(tmp_path / "out.json"), "--repeats", "1", *size])
    found = json.loads((tmp_path / "out.json").read_text())
    for way in ("hf_to_megatron", "megatron_to_hf"):
        assert found[way]["bytes"] > 200_000
        assert found[way]["peak_anonymous_GB"] > 0
        assert 0 < found[way]["cp_cpu_seconds_per_GB"] < found[way]["cpu_seconds_per_GB"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
