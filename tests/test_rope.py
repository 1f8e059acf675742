"""RoPE settings are gathered from every spelling, merged and checked; the frequencies are those of the definition."""

import subprocess
import sys

import pytest
import torch
from harness import naive, tiny

from vllm_yocou import rope

SETTINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "yoco2024": {"rope_type": "yoco2024", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3},
    "llama3": tiny.LLAMA3_ROPE,
}


def test_every_type_is_tested_here():
    assert SETTINGS.keys() == rope.ROPE_TYPES.keys()


@pytest.mark.parametrize("rope_type", SETTINGS)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_frequencies_are_the_definition(rope_type, head_dim):
    frequencies_r = rope.inverse_frequencies(head_dim, SETTINGS[rope_type], torch.float64)
    expected = [naive.radians_per_position(r, head_dim, **SETTINGS[rope_type]) for r in range(head_dim // 2)]
    torch.testing.assert_close(frequencies_r, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_no_two_types_have_the_same_frequencies():
    tables = [rope.inverse_frequencies(64, settings, torch.float64) for settings in SETTINGS.values()]
    for i, table in enumerate(tables):
        assert all((table - other).abs().max() > 1e-3 for other in tables[:i])


def test_gathering_takes_every_spelling_out_of_the_keys():
    keys = {
        "rope_theta": 1.0,
        "rope_scaling": {"factor": 2, "rope_theta": 2.0},
        "rope_parameters": {"factor": 3},
        "sliding_window": 16,
    }
    assert rope.gathered(keys) == {"factor": 3, "rope_theta": 2.0}
    assert keys == {"sliding_window": 16}
    assert rope.gathered({"rope_theta": 5.0, "rope_scaling": None}) == {"rope_theta": 5.0}
    assert rope.gathered({}) == {}
    with pytest.raises(ValueError, match="rope_scaling is 'linear': give a mapping with rope_theta and rope_type"):
        rope.gathered({"rope_scaling": "linear"})


def test_merging_leaves_both_mappings_as_they_are():
    present, given = dict(SETTINGS["linear"]), {"type": "default"}
    assert rope.merged(present, given) == SETTINGS["default"]
    assert (present, given) == (SETTINGS["linear"], {"type": "default"})


@pytest.mark.parametrize("rope_type", SETTINGS)
def test_every_setting_of_a_type_is_needed_and_no_other_is_taken(rope_type):
    rope.check(SETTINGS[rope_type])
    for key in rope.ROPE_TYPES[rope_type]:
        with pytest.raises(ValueError, match=f"rope_parameters has {key} None: RoPE of type {rope_type} needs"):
            rope.check({name: value for name, value in SETTINGS[rope_type].items() if name != key})
    with pytest.raises(ValueError, match=f"rope_parameters has 'beta_fast': RoPE of type {rope_type} is set by"):
        rope.check(SETTINGS[rope_type] | {"beta_fast": 32})


def test_settings_are_checked_without_torch():
    code = "import sys; from vllm_yocou import rope; rope.merged({}, {}); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
