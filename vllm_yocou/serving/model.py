"""YOCO-U for vLLM: every weight exists once, every (iteration, layer) has a KV cache of its own.

The self-decoder's linear layers are built once and called T times, so quantization, tensor parallelism and loading see
an ordinary model of S + C layers. Only the caches, which hold no weights, exist T times.

Shapes: N tokens of this step (all requests, one row a token), M of them in the cross-decoder, D hidden_size.
"""

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.breakable_cudagraph import eager_break_during_capture, is_breakable_cudagraph_enabled
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context, in_piecewise_cudagraph
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from vllm_yocou.checkpoints.verify import verified
from vllm_yocou.config import YocoUConfig
from vllm_yocou.options import Options
from vllm_yocou.rows.ranks import Ranks, RankShares
from vllm_yocou.rows.selection import why_all_rows
from vllm_yocou.serving.batch_invariance import is_fixed
from vllm_yocou.serving.caches import GlobalCache, packing_of, uses_kernels, window_caches
from vllm_yocou.serving.compilation import (
    PieceCapture,
    compiled_unit,
    prepare_cuda_graphs,
    warmed_up_by_one_pass,
    without_piecewise_graphs,
)
from vllm_yocou.serving.feed_forward import decide_gate
from vllm_yocou.serving.layers import CrossDecoderLayer, GlobalKV, SelfDecoderLayer, stream_norm
from vllm_yocou.serving.lora import SelectedRowsAdapters
from vllm_yocou.serving.weight_update import WeightUpdate

logger = logging.getLogger("vllm.plugins.yocou")


@compiled_unit(positions_N=0, x_ND=0)
class SelfDecoder(nn.Module):
    """One pass through the looped stack: the unit that is compiled once and called T times."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, cache_prefix: str):
        super().__init__()
        self.layers = nn.ModuleList(
            SelfDecoderLayer(vllm_config, i, f"{prefix}.layers.{i}", cache_prefix)
            for i in range(vllm_config.model_config.hf_config.num_self_decoder_layers)
        )

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor, iteration: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_ND = layer(positions_N, x_ND, iteration)
        return x_ND


@compiled_unit(positions_M=0, x_MD=0)
class CrossDecoder(nn.Module):
    """The stack that reads the global KV cache, on the M rows whose logits someone wants."""

    def __init__(self, *, vllm_config: VllmConfig, cache: GlobalCache, prefix: str):
        super().__init__()
        self.layers = nn.ModuleList(
            CrossDecoderLayer(vllm_config, j, cache, f"{prefix}.layers.{j}")
            for j in range(vllm_config.model_config.hf_config.num_cross_decoder_layers)
        )

    def forward(self, positions_M: torch.Tensor, x_MD: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_MD = layer(positions_M, x_MD, written)
        return x_MD


class YocoUModel(nn.Module):
    """Embedding, T times the self-decoder, the global KV, the cross-decoder, the final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        prepare_cuda_graphs(vllm_config.compilation_config)
        self.embedding_multiplier = config.embedding_multiplier
        self.dtype = torch.get_default_dtype()
        self.stream_dtype = torch.float32 if config.residual_in_fp32 else self.dtype
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        cache_prefix = f"{prefix}.kv_cache"
        self.self_decoder = SelfDecoder(
            vllm_config=vllm_config, prefix=f"{prefix}.self_decoder", cache_prefix=cache_prefix
        )
        self.iterations = [torch.tensor(t, device="cpu") for t in range(config.num_iterations)]
        self.warmed_up_by_one_pass = warmed_up_by_one_pass(vllm_config)
        self.capture = PieceCapture(vllm_config.compilation_config)
        self.global_kv = GlobalKV(vllm_config, f"{prefix}.global_kv", cache_prefix)
        with set_model_tag("cross_decoder"):  # vLLM keeps one folder of compiled code a tag
            self.cross_decoder = CrossDecoder(
                vllm_config=vllm_config, cache=self.global_kv.cache, prefix=f"{prefix}.cross_decoder"
            )
        self.norm = stream_norm(config)
        self.ranks = Ranks.of(vllm_config)
        self.breaks_for_rows = is_breakable_cudagraph_enabled() and why_all_rows(vllm_config) is None
        self.adapters: SelectedRowsAdapters | None = None
        if get_tensor_model_parallel_rank() == 0:
            for line in self.describe(vllm_config):
                logger.info("%s", line)

    def describe(self, vllm_config: VllmConfig) -> list[str]:
        """What a start says of the caches, the kernels and the rows, a line each."""
        packing, cache, windows = packing_of(vllm_config), self.global_kv.cache, window_caches(vllm_config)
        lines = [f"{packing} Attention backend {cache.attn_backend.get_name()}."]
        ours = ["window steps"] if windows[0].by_kernel else []
        ours += ["global writes and cross attention of at most one row a request"] if cache.by_kernel else []
        if ours:
            lines.append(f"This plugin's Triton kernels, which decode slower on an H100, take {', '.join(ours)}.")
        elif Options.of(vllm_config.additional_config).kernels and not uses_kernels(vllm_config):
            lines.append('The option "kernels" is off: this plugin\'s kernels do not clip queries and keys.')
        lines.append(packing.cost(vllm_config, windows[0].sliding_window))
        hybrid = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        if hybrid and vllm_config.cache_config.enable_prefix_caching:
            lines.append(packing.prefix_cost(windows[0].sliding_window))
        if reason := why_all_rows(vllm_config):
            lines.append(f"The cross-decoder runs on every prompt row: {reason}.")
        elif node := cache.rows.requests.prefill_node:
            lines.append(
                "The engine is a prefill node (kv_role kv_producer): requests for one token without log probabilities "
                f"skip the cross-decoder, and token {node.placeholder} stands for their answer."
            )
        return lines

    def adapt(self, manager: LoRAModelManager) -> None:
        """Serve adapters, which vLLM has put around the linear layers."""
        self.adapters = SelectedRowsAdapters(manager, self.cross_decoder)
        self.global_kv.cache.rows.map_adapters = self.adapters.select

    def is_discarded(self) -> bool:
        """Whether vLLM only compiles or captures in this step, where one pass through the self-decoder does it all."""
        warms_up = self.warmed_up_by_one_pass and get_forward_context().attn_metadata is None
        return warms_up or self.capture.is_running()

    def embed_input_ids(self, input_ids_N: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids_N) * self.embedding_multiplier

    def forward(
        self,
        input_ids_N: torch.Tensor | None,
        positions_N: torch.Tensor,
        x_ND: torch.Tensor | None,
    ) -> torch.Tensor:
        if x_ND is None:
            assert input_ids_N is not None  # vLLM gives one of the two
            x_ND = self.embed_tokens(input_ids_N).to(self.stream_dtype) * self.embedding_multiplier
        x_ND = x_ND.to(self.stream_dtype)
        cache = self.global_kv.cache
        step = cache.step_rows()
        agreement = None if self.ranks is None else self.ranks.agree(cache.wanted_rows(), skips=step is not None)
        for iteration in self.iterations[:1] if self.is_discarded() else self.iterations:
            x_ND = self.self_decoder(positions_N, x_ND, iteration)
        written = self.global_kv(positions_N, x_ND)
        shares = None if agreement is None else agreement.shares()
        if step is None and shares is None and not (self.breaks_for_rows and in_piecewise_cudagraph()):
            return self.norm(self.cross_decoder(positions_N, x_ND, written))
        # The rows left out stay zero: nobody reads them (rows/selection.py).
        out_ND = torch.zeros_like(x_ND, dtype=self.dtype)
        self.cross_decode(positions_N, x_ND, written, shares, out_ND)
        return out_ND

    @eager_break_during_capture
    def cross_decode(
        self,
        positions_N: torch.Tensor,
        x_ND: torch.Tensor,
        written: torch.Tensor,
        shares: RankShares | None,
        out_ND: torch.Tensor,
    ) -> None:
        """Run the rows that somebody reads through the cross-decoder, into `out_ND`.

        A breakable CUDA graph calls it again in every replay. So which rows these are is asked for here: whoever calls
        it answers for the step that was captured.
        """
        cache = self.global_kv.cache
        step, wanted = cache.step_rows(), cache.wanted_rows()
        if shares.nobody_calls if shares else not wanted:
            return
        # Where other ranks wait for this one, a row that nobody reads takes part; padding comes after the real rows.
        rows_M = step.rows_M if step is not None and wanted else slice(max(wanted, 1))
        with (
            without_piecewise_graphs(),
            shares.in_force() if shares else nullcontext(),
            # Which prepares a map for selected rows only where some are left out.
            self.adapters.in_force() if self.adapters and step is not None else nullcontext(),
        ):
            out_ND[rows_M] = self.norm(self.cross_decoder(positions_N[rows_M], x_ND[rows_M], written))


class YocoUForCausalLM(nn.Module, SupportsLoRA):
    """The architecture that vLLM's registry names."""

    packed_modules_mapping = {  # noqa: RUF012  # as vLLM declares it; with LoRA an engine has one of its own
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "kv_proj": ["k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".global_kv.k_proj": (".global_kv.kv_proj", "k"),
            ".global_kv.v_proj": (".global_kv.kv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
            ".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0),
            ".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        self._lora_manager: LoRAModelManager | None = None
        if vllm_config.lora_config is not None:
            # vLLM has adapters for a QKVParallelLinear of three parts; the queries' part of the global KV is empty.
            # Not on the class, where quantization methods read it: they look for every part in the checkpoint.
            self.packed_modules_mapping = self.packed_modules_mapping | {"kv_proj": ["q_proj", "k_proj", "v_proj"]}
        # Quantized on disk, not on the way in (`--quantization` on a plain checkpoint).
        self.quantized = getattr(self.config, "quantization_config", None) is not None
        self.update = WeightUpdate(vllm_config, self.hf_to_vllm_mapper, self.quantized)
        self.model = YocoUModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size, scale=self.config.logit_scale)
        if is_fixed():
            from vllm_yocou.serving.fixed_tiles import fix_tiles

            fix_tiles(self, vllm_config)

    @property
    def lora_manager(self) -> LoRAModelManager | None:
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: LoRAModelManager | None) -> None:
        """vLLM sets it once it has put its adapters around the linear layers."""
        if manager is not None:
            self.model.adapt(manager)
        self._lora_manager = manager

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def get_model_state_cls(self) -> type:
        """The V2 runner's hook; V1's is named by the engine settings."""
        # The V1 runner of a machine without Triton never imports V2's modules.
        from vllm_yocou.rows.v2_runner import YocoUModelState

        return YocoUModelState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits (R, V) of hidden states (R, D); zeros, without a head, where no row of the step has run."""
        slots = self.model.global_kv.cache.rows
        if slots.none_runs:
            # A row may have run for another rank's sake, where ranks share experts.
            hidden_states = torch.zeros_like(hidden_states)
            logits_RV = hidden_states.new_zeros(len(hidden_states), self.config.vocab_size)
        else:
            logits_RV = self.logits_processor(self.lm_head, hidden_states)
        node = slots.requests.prefill_node
        if node is not None and logits_RV is not None:
            node.put(logits_RV, hidden_states)
        return logits_RV

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint of a start, whole; or later a part of one, of any size.

        Raises:
            ValueError: it does not fit. A part that is refused changes nothing.
        """
        # vLLM's loaders put a model into evaluation mode at the end of a start, whatever has loaded it.
        if not self.training:
            return self.update.load(self, weights)
        fitting = self.update.recorded(verified(weights, self.config, self.quantized))
        loaded = AutoWeightsLoader(self).load_weights(fitting, mapper=self.hf_to_vllm_mapper)
        decide_gate(self, self.config, loaded)
        return loaded
