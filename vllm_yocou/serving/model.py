"""YOCO-U for vLLM: every weight exists once, every (iteration, layer) has a KV cache of its own.

The self-decoder's linear layers are built once and called T times, so quantization, tensor parallelism and loading see
an ordinary model of S + C layers. Only the attention layers, which hold no weights, exist T times.

Shapes: N tokens of this step (all requests, one row a token), D hidden_size.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import _encode_layer_name

from vllm_yocou.checkpoints.format import verified
from vllm_yocou.config import YocoUConfig
from vllm_yocou.options import Options
from vllm_yocou.rows.selection import why_all_rows
from vllm_yocou.serving.backend import smallest_block
from vllm_yocou.serving.caches import GlobalAttention, WindowAttention
from vllm_yocou.serving.compilation import (
    compiled_unit,
    prepare_cuda_graphs,
    warmed_up_by_one_pass,
    without_piecewise_graphs,
)
from vllm_yocou.serving.experts import MixtureOfExperts
from vllm_yocou.serving.lora import adapters_of, spare_rows_without_adapter
from vllm_yocou.serving.packing import Packing
from vllm_yocou.serving.rope import rotary_embedding

logger = logging.getLogger("vllm.plugins.yocou")


class HeadNorm(RMSNorm):
    """RMSNorm of every head of a projection: (N, heads · d) -> (N, heads · d)."""

    def forward(self, x_NX: torch.Tensor) -> torch.Tensor:
        return super().forward(x_NX.unflatten(-1, (-1, self.hidden_size)).contiguous()).flatten(-2)


def head_norm(config: YocoUConfig, head_dim: int, wanted: bool) -> nn.Module:
    return HeadNorm(head_dim, eps=config.rms_norm_eps) if wanted else nn.Identity()


class LoopedWindowAttention(nn.Module):
    """Self-decoder attention of one stored layer: one set of projections, one window cache for each iteration."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str, cache_prefix: str):
        super().__init__()
        config: YocoUConfig = vllm_config.model_config.hf_config
        quant, d = vllm_config.quant_config, config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            d,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.sizes = [heads * d, kv_heads * d, kv_heads * d]
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * d,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = head_norm(config, d, config.qk_norm in ("self", "all"))
        self.k_norm = head_norm(config, d, config.qk_norm in ("self", "all"))
        self.rotary_emb = rotary_embedding(vllm_config, d)
        self.windows = nn.ModuleList(
            WindowAttention(
                vllm_config,
                heads,
                d,
                kv_heads,
                window=config.sliding_window,
                quant_config=quant,
                # vLLM wants exactly one number in the name of a cached layer, different for each. Those that a compiled
                # unit names, iteration 0 and the global cache, have the same whatever T is.
                prefix=f"{cache_prefix}.{1 + iteration * config.num_self_decoder_layers + layer}",
            )
            for iteration in range(config.num_iterations)
        )
        self.windows[0].iterations = [window.layer_name for window in self.windows]
        if self.windows[0].by_kernel:
            from vllm_yocou.serving.fused_attention import NormAndRotation, step_in_window

            before = NormAndRotation(self.rotary_emb, self.q_norm, self.k_norm)
            self.windows[0].step = partial(step_in_window, before)
        self.layer_name = _encode_layer_name(self.windows[0].layer_name)
        self.query_shape, self.key_shape = (-1, heads, d), (-1, kv_heads, d)

    def forward(self, positions_N: torch.Tensor, h_ND: torch.Tensor, iteration: torch.Tensor) -> torch.Tensor:
        qkv_NX, _ = self.qkv_proj(h_ND)
        q_NX, k_NX, v_NX = qkv_NX.split(self.sizes, dim=-1)
        if not self.windows[0].by_kernel:
            q_NX, k_NX = self.rotary_emb(positions_N, self.q_norm(q_NX), self.k_norm(k_NX))
        q_NHd, k_NKd, v_NKd = q_NX.view(self.query_shape), k_NX.view(self.key_shape), v_NX.view(self.key_shape)
        out_NHd = torch.empty_like(q_NHd, memory_format=torch.contiguous_format)
        torch.ops.vllm.yocou_attend_windows(q_NHd, k_NKd, v_NKd, out_NHd, iteration, self.layer_name)
        out_ND, _ = self.o_proj(out_NHd.flatten(1))
        return out_ND


class GlobalKV(nn.Module):
    """The one writer of the global KV cache; nothing attends here."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, cache_prefix: str):
        super().__init__()
        config: YocoUConfig = vllm_config.model_config.hf_config
        dc = config.cross_head_dim
        ranks = get_tensor_model_parallel_world_size()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # No query heads: this layer then shards the KV heads, and replicates them where ranks outnumber them.
        self.kv_proj = QKVParallelLinear(
            config.hidden_size,
            dc,
            total_num_heads=0,
            total_num_kv_heads=config.cross_num_key_value_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.kv_proj",
        )
        self.k_norm = head_norm(config, dc, config.qk_norm == "all")
        self.rotary_emb = rotary_embedding(vllm_config, dc) if config.cross_decoder_rope else None
        self.cache = GlobalAttention(
            vllm_config,
            config.cross_num_attention_heads // ranks,
            dc,
            self.kv_proj.num_kv_heads,
            quant_config=vllm_config.quant_config,
            prefix=f"{cache_prefix}.0",
        )
        self.write: Callable[..., torch.Tensor] | None = None
        if self.cache.by_kernel:
            from vllm_yocou.serving.fused_attention import NormAndRotation, write_global

            before = NormAndRotation(self.rotary_emb, nn.Identity(), self.k_norm)
            self.write = partial(write_global, before, self.cache.layer_name)

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        """Project and store; returns the token that the readers take."""
        kv_NX, _ = self.kv_proj(self.norm(x_ND))
        k_NX, v_NX = kv_NX.chunk(2, dim=-1)
        if self.write is not None:
            return self.write(positions_N, k_NX, v_NX)
        k_NX = self.k_norm(k_NX)
        if self.rotary_emb is not None:
            # vLLM's rotary embedding turns queries in place; here there are none, so the keys take their part.
            k_NX, _ = self.rotary_emb(positions_N, k_NX.contiguous(), None)
        return self.cache.write(k_NX, v_NX)


class CrossAttention(nn.Module):
    """Cross-decoder attention: queries of its own over the global cache."""

    def __init__(self, vllm_config: VllmConfig, cache: GlobalAttention, prefix: str):
        super().__init__()
        config: YocoUConfig = vllm_config.model_config.hf_config
        dc, width = config.cross_head_dim, config.cross_num_attention_heads * config.cross_head_dim
        quant = vllm_config.quant_config
        self.q_proj = ColumnParallelLinear(
            config.hidden_size, width, bias=False, quant_config=quant, prefix=f"{prefix}.q_proj"
        )
        self.o_proj = RowParallelLinear(
            width, config.hidden_size, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = head_norm(config, dc, config.qk_norm == "all")
        self.rotary_emb = rotary_embedding(vllm_config, dc) if config.cross_decoder_rope else None
        self.read = cache.attend  # a bound method: the cache stays a submodule of its writer alone

    def forward(self, positions_N: torch.Tensor, h_ND: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        q_NX, _ = self.q_proj(h_ND)
        q_NX = self.q_norm(q_NX)
        if self.rotary_emb is not None:
            q_NX, _ = self.rotary_emb(positions_N, q_NX, None)
        out_ND, _ = self.o_proj(self.read(q_NX, written))
        return out_ND


class DecoderLayer(nn.Module):
    """Norms, feed-forward and residual stream; the subclasses bring the attention, named as in the checkpoint."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: YocoUConfig = vllm_config.model_config.hf_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.is_moe:
            self.mlp = MixtureOfExperts(vllm_config, f"{prefix}.mlp")
        else:
            self.mlp = LlamaMLP(
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.mlp",
            )

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`source` is what the attention reads: the iteration in the self-decoder, the written token in the other."""
        x_ND = x_ND + self.attention(positions_N, self.input_layernorm(x_ND), source)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))


class SelfDecoderLayer(DecoderLayer):
    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str, cache_prefix: str):
        super().__init__(vllm_config, prefix)
        self.self_attn = LoopedWindowAttention(vllm_config, layer, f"{prefix}.self_attn", cache_prefix)

    @property
    def attention(self) -> nn.Module:
        return self.self_attn


class CrossDecoderLayer(DecoderLayer):
    def __init__(self, vllm_config: VllmConfig, cache: GlobalAttention, prefix: str):
        super().__init__(vllm_config, prefix)
        self.cross_attn = CrossAttention(vllm_config, cache, f"{prefix}.cross_attn")

    @property
    def attention(self) -> nn.Module:
        return self.cross_attn


class Decoder(nn.Module):
    """A stack of layers, so that the checkpoint's names read `self_decoder.layers.0` and `cross_decoder.layers.0`."""

    def __init__(self, layers: Iterable[DecoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_ND = layer(positions_N, x_ND, source)
        return x_ND


@compiled_unit(positions_N=0, x_ND=0)
class SelfDecoder(Decoder):
    """One pass through the looped stack: the unit that is compiled once and called T times."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, cache_prefix: str):
        super().__init__(
            SelfDecoderLayer(vllm_config, i, f"{prefix}.layers.{i}", cache_prefix)
            for i in range(vllm_config.model_config.hf_config.num_self_decoder_layers)
        )

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor, iteration: torch.Tensor) -> torch.Tensor:
        # Not the inherited one: vLLM's compiler looks at this class's own code.
        return super().forward(positions_N, x_ND, iteration)


@compiled_unit(positions_M=0, x_MD=0)
class CrossDecoder(Decoder):
    """The stack that reads the global KV cache, on the M rows whose logits someone wants."""

    def __init__(self, *, vllm_config: VllmConfig, cache: GlobalAttention, prefix: str):
        super().__init__(
            CrossDecoderLayer(vllm_config, cache, f"{prefix}.layers.{j}")
            for j in range(vllm_config.model_config.hf_config.num_cross_decoder_layers)
        )

    def forward(self, positions_M: torch.Tensor, x_MD: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        return super().forward(positions_M, x_MD, written)


class YocoUModel(nn.Module):
    """Embedding, T times the self-decoder, the global KV, the cross-decoder, the final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: YocoUConfig = vllm_config.model_config.hf_config
        prepare_cuda_graphs(vllm_config.compilation_config)
        self.embedding_multiplier = config.embedding_multiplier
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
        self.global_kv = GlobalKV(vllm_config, f"{prefix}.global_kv", cache_prefix)
        with set_model_tag("cross_decoder"):  # vLLM keeps one folder of compiled code a tag
            self.cross_decoder = CrossDecoder(
                vllm_config=vllm_config, cache=self.global_kv.cache, prefix=f"{prefix}.cross_decoder"
            )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._pack_caches(vllm_config)

    def _pack_caches(self, vllm_config: VllmConfig) -> None:
        windows = [window for layer in self.self_decoder.layers for window in layer.self_attn.windows]
        global_cache = self.global_kv.cache
        packing = Packing.choose(
            window_caches=len(windows),
            block=smallest_block(global_cache.attn_backend),
            window_bytes=windows[0].token_bytes,
            global_bytes=global_cache.token_bytes,
            max_global_block=Options.of(vllm_config.additional_config).max_global_block,
        )
        for cache in (*windows, global_cache):
            cache.packing = packing
        if get_tensor_model_parallel_rank() == 0:
            logger.info("%s Attention backend %s.", packing, global_cache.attn_backend.get_name())
            ours = ["window steps"] * windows[0].by_kernel
            ours += ["global writes and cross attention of at most one row a request"] * global_cache.by_kernel
            if ours:
                logger.info("This plugin's Triton kernels, not measured on any GPU yet, take %s.", ", ".join(ours))
            logger.info("%s", packing.cost(vllm_config, windows[0].sliding_window))
            if reason := why_all_rows(vllm_config):
                logger.info("The cross-decoder runs on every prompt row: %s.", reason)

    def embed_input_ids(self, input_ids_N: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids_N) * self.embedding_multiplier

    def forward(
        self,
        input_ids_N: torch.Tensor | None,
        positions_N: torch.Tensor,
        x_ND: torch.Tensor | None,
        lora_manager: LoRAModelManager | None,
    ) -> torch.Tensor:
        if x_ND is None:
            x_ND = self.embed_input_ids(input_ids_N)
        warms_up = self.warmed_up_by_one_pass and get_forward_context().attn_metadata is None
        for iteration in self.iterations[:1] if warms_up else self.iterations:
            x_ND = self.self_decoder(positions_N, x_ND, iteration)
        written = self.global_kv(positions_N, x_ND)
        rows_M = self.global_kv.cache.selected_rows()
        if rows_M is None:
            return self.norm(self.cross_decoder(positions_N, x_ND, written))
        # The rows left out stay zero: nobody reads them (row_selection.py).
        out_ND = torch.zeros_like(x_ND)
        if len(rows_M):
            with without_piecewise_graphs(), adapters_of(rows_M, lora_manager):
                out_ND[rows_M] = self.norm(self.cross_decoder(positions_N[rows_M], x_ND[rows_M], written))
        return out_ND


class YocoUForCausalLM(nn.Module, SupportsLoRA):
    """The architecture that vLLM's registry names."""

    packed_modules_mapping = {
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
        self.config: YocoUConfig = vllm_config.model_config.hf_config
        self._lora_manager: LoRAModelManager | None = None
        if vllm_config.lora_config is not None:
            # vLLM has adapters for a QKVParallelLinear of three parts; the queries' part of the global KV is empty.
            # Not on the class, where quantization methods read it: they look for every part in the checkpoint.
            self.packed_modules_mapping = self.packed_modules_mapping | {"kv_proj": ["q_proj", "k_proj", "v_proj"]}
        # Quantized on disk, not on the way in (`--quantization` on a plain checkpoint).
        self.quantized = getattr(self.config, "quantization_config", None) is not None
        self.model = YocoUModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    @property
    def lora_manager(self) -> LoRAModelManager | None:
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: LoRAModelManager) -> None:
        """vLLM sets it once it has put its adapters around the linear layers."""
        spare_rows_without_adapter(manager)
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
        return self.model(input_ids, positions, inputs_embeds, self.lora_manager)

    def get_model_state_cls(self) -> type:
        """The V2 runner's hook; V1's is named by the engine config."""
        # The V1 runner of a machine without Triton never imports V2's modules.
        from vllm_yocou.rows.v2_runner import YocoUModelState

        return YocoUModelState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        fitting = verified(weights, self.config, self.quantized)
        return AutoWeightsLoader(self).load_weights(fitting, mapper=self.hf_to_vllm_mapper)
