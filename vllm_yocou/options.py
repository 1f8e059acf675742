"""The settings that vLLM has no option for: `--additional-config '{"yocou": {"max_global_block": 1024}}'`."""

from dataclasses import dataclass
from typing import get_args, get_type_hints

KEY = "yocou"


@dataclass(frozen=True)
class Options:
    """The plugin's own settings.

    Attributes:
        max_global_block: tokens of the longest global block that packing may choose; None for the window's tokens, but
            256 at least and 512 at most. Longer blocks make fewer KV cache groups, but prefix-cache hits then come in
            multiples of a larger number.
        lower_chunk: whether vLLM's default of max_num_batched_tokens is replaced by a smaller one.
        skip_rows: whether prompt rows whose logits nobody needs skip the cross-decoder; False runs every row, for
            comparison.
        kernels: whether the plugin's Triton kernels replace vLLM's; on an H100 decoding is slower with them.
    """

    max_global_block: int | None = None
    lower_chunk: bool = True
    skip_rows: bool = True
    kernels: bool = False

    @classmethod
    def of(cls, additional_config: object) -> "Options":
        """The options in vLLM's `additional_config`.

        Raises:
            ValueError: an unknown name, or a value of the wrong type or out of range.
        """
        given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
        if not isinstance(given, dict):
            raise ValueError(
                f'additional_config["{KEY}"] is {given!r}: give an object like {{"max_global_block": 1024}}.'
            )
        types = get_type_hints(cls)
        for name, value in given.items():
            if name not in types:
                raise ValueError(
                    f'additional_config["{KEY}"] has no option {name!r}: choose from {", ".join(sorted(types))}.'
                )
            kinds = get_args(types[name]) or (types[name],)
            if type(value) not in kinds:
                raise ValueError(f'additional_config["{KEY}"]["{name}"] is {value!r}: give {kinds[0].__name__}.')
        options = cls(**given)
        if options.max_global_block is not None and options.max_global_block < 1:
            raise ValueError(
                f'additional_config["{KEY}"]["max_global_block"] is {options.max_global_block}: give at least 1.'
            )
        return options

    def longest_global_block(self, window: int) -> int:
        """Tokens that `max_global_block` allows a model whose window is so long (benchmarks/, prefix_caching)."""
        return self.max_global_block or min(max(window, 256), 512)
