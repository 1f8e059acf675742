"""The plugin's own settings: read from vLLM's additional_config, and refused by name when they are none of them."""

import pytest

from vllm_yocou.options import Options


def test_defaults_and_what_is_given():
    assert Options.of({}) == Options.of({"other_plugin": {"max_global_block": "x"}}) == Options()
    assert Options.of({"yocou": {"max_global_block": 64, "skip_rows": False}}) == Options(
        max_global_block=64, skip_rows=False
    )
    assert Options.of(object()) == Options()  # vLLM allows any hashable object there


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"yocou": 7}, r'additional_config\["yocou"\] is 7: give an object'),
        (
            {"yocou": {"block": 7}},
            "has no option 'block': choose from kernels, lower_chunk, max_global_block, skip_rows",
        ),
        ({"yocou": {"max_global_block": "many"}}, "is 'many': give int"),
        ({"yocou": {"max_global_block": True}}, "is True: give int"),
        ({"yocou": {"kernels": None}}, "is None: give bool"),
        ({"yocou": {"skip_rows": 1}}, "is 1: give bool"),
        ({"yocou": {"max_global_block": 0}}, "is 0: give at least 1"),
    ],
)
def test_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Options.of(given)


@pytest.mark.parametrize("window, longest", [(1, 256), (256, 256), (300, 300), (512, 512), (4096, 512)])
def test_the_longest_global_block_follows_the_window(window, longest):
    assert Options.of({"yocou": {"max_global_block": None}}).longest_global_block(window) == longest
    assert Options(max_global_block=96).longest_global_block(window) == 96
