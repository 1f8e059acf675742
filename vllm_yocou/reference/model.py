"""The reference model computes YOCO-U as it is defined, in plain torch, in whatever dtype its weights have.

It is a Hugging Face model: it trains (labels, gradient checkpointing), generates and saves. It shares no code with the
served model, because it is what that is compared with.

Shapes: B sequences, N tokens of this call, L keys (cached and of this call), D hidden_size, H heads that o_proj reads,
Q query heads (2 H with differential attention, else H) and K key/value heads, all of size d.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.feed_forward import MLP, MoE, has_shared_expert_gate
from vllm_yocou.reference.norm import StreamRMSNorm, head_norm
from vllm_yocou.reference.precision import at_least_float32
from vllm_yocou.reference.rope import Rotation, rotate


class WindowCacheLayer(DynamicSlidingWindowLayer):
    """KV cache of one (iteration, layer): the last W - 1 tokens. transformers' own keeps everything at W = 1."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values (B, K, N, d); return those that this call attends to, (B, K, L, d) each."""
        keys_BKLd, values_BKLd = super().update(key_states, value_states, *args, **kwargs)
        if self.sliding_window == 1:
            self.keys, self.values = keys_BKLd[:, :, :0], values_BKLd[:, :, :0]
        return keys_BKLd, values_BKLd


class YocoUCache(Cache):
    """T·S window caches, iteration-major (entry t·S + i), followed by the one global cache (entry T·S)."""

    def __init__(self, config: YocoUConfig):
        windows = config.num_iterations * config.num_self_decoder_layers
        super().__init__(layers=[*(WindowCacheLayer(config.sliding_window) for _ in range(windows)), DynamicLayer()])


class Attention(nn.Module):
    """What both decoders' attentions share: queries, the call of the configured attention function, the output.

    Differential attention subtracts from each even query head's output the next one's: heads 2i and 2i + 1 make head i.
    """

    is_causal = True

    def __init__(self, config: YocoUConfig, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, rope: bool):
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        queries = 2 * heads if config.is_differential else heads
        self.num_key_value_groups = queries // kv_heads
        self.rope = rope
        self.q_proj = nn.Linear(config.hidden_size, queries * head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=config.attention_bias)
        self.q_norm = head_norm(config, head_dim) if qk_norm else None
        self.lambda_proj = self.gate_proj = None
        if config.is_differential:
            gates = queries if config.differential_attention == "v3" else heads
            self.lambda_proj = nn.Linear(config.hidden_size, gates, bias=False)
        if config.headwise_glu:
            self.gate_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def attend(
        self,
        h_BND: torch.Tensor,
        k_BKLd: torch.Tensor,
        v_BKLd: torch.Tensor,
        rotation: Rotation | None,
        mask: Any,
        sliding_window: int | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        q_BQNd = heads_of(self.q_proj(h_BND), self.head_dim, self.q_norm, rotation if self.rope else None)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out_BNQd, _ = attend(
            self, q_BQNd, k_BKLd, v_BKLd, mask, scaling=self.head_dim**-0.5, sliding_window=sliding_window, **kwargs
        )
        return self.o_proj(self.combined(out_BNQd, h_BND).flatten(-2))

    def combined(self, out_BNQd: torch.Tensor, h_BND: torch.Tensor) -> torch.Tensor:
        """The heads (B, N, H, d) that o_proj reads, from those of attention (B, N, Q, d) and the gates that h gives.

        Gates and differences are computed in float32 at least, and rounded once.
        """
        projection = self.lambda_proj or self.gate_proj
        if projection is None:
            return out_BNQd
        wide = at_least_float32(out_BNQd)
        heads, gates = out_BNQd.to(wide), projection(h_BND).to(wide).sigmoid()[..., None]
        if self.config.differential_attention == "v2":
            heads = heads[:, :, 0::2] - gates * heads[:, :, 1::2]
        else:
            heads = gates * heads
        if self.config.differential_attention == "v3":
            heads = heads[:, :, 0::2] - heads[:, :, 1::2]
        return heads.to(out_BNQd.dtype)


class WindowAttention(Attention):
    """Self-decoder attention: a token sees W keys, itself included, of its own iteration."""

    def __init__(self, config: YocoUConfig, layer: int):
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        super().__init__(config, H, K, d, qk_norm=config.qk_norm != "none", rope=True)
        self.layer = layer
        self.k_proj = nn.Linear(config.hidden_size, K * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, K * d, bias=config.attention_bias)
        self.k_norm = head_norm(config, d) if config.qk_norm != "none" else None

    def forward(
        self,
        h_BND: torch.Tensor,
        iteration: int,
        rotation: Rotation,
        mask: Any,
        cache: YocoUCache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        k_BKLd = heads_of(self.k_proj(h_BND), self.head_dim, self.k_norm, rotation)
        v_BKLd = heads_of(self.v_proj(h_BND), self.head_dim)
        if cache is not None:
            slot = iteration * self.config.num_self_decoder_layers + self.layer
            k_BKLd, v_BKLd = cache.update(k_BKLd, v_BKLd, slot)
        return self.attend(h_BND, k_BKLd, v_BKLd, rotation, mask, self.config.sliding_window, **kwargs)


class CrossAttention(Attention):
    """Cross-decoder attention: its own queries over the global keys and values."""

    def __init__(self, config: YocoUConfig):
        H, K, d = config.cross_num_attention_heads, config.cross_num_key_value_heads, config.cross_head_dim
        super().__init__(config, H, K, d, qk_norm=config.qk_norm == "all", rope=config.cross_decoder_rope)

    def forward(
        self,
        h_BND: torch.Tensor,
        k_BKLd: torch.Tensor,
        v_BKLd: torch.Tensor,
        rotation: Rotation | None,
        mask: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        return self.attend(h_BND, k_BKLd, v_BKLd, rotation, mask, None, **kwargs)


class GlobalKV(nn.Module):
    """The one global KV: g = RMSNorm(x), K = Wk g, V = Wv g, once per token, for every cross layer."""

    def __init__(self, config: YocoUConfig):
        super().__init__()
        self.head_dim = config.cross_head_dim
        self.rope = config.cross_decoder_rope
        width = config.cross_num_key_value_heads * config.cross_head_dim
        self.norm = StreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_norm = head_norm(config, self.head_dim) if config.qk_norm == "all" else None

    def forward(self, x_BND: torch.Tensor, rotation: Rotation | None) -> tuple[torch.Tensor, torch.Tensor]:
        g_BND = self.norm(x_BND)
        k_BKNd = heads_of(self.k_proj(g_BND), self.head_dim, self.k_norm, rotation if self.rope else None)
        return k_BKNd, heads_of(self.v_proj(g_BND), self.head_dim)


class DecoderLayer(GradientCheckpointingLayer):
    """The half of a layer that both decoders have: two norms, and the feed-forward with its residual.

    `stored` counts layers through both decoders.
    """

    def __init__(self, config: YocoUConfig, stored: int):
        super().__init__()
        self.input_layernorm = StreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = StreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.has_experts(stored):
            self.mlp: nn.Module = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.swiglu_limit)

    def feed_forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        return x_BND + self.mlp(self.post_attention_layernorm(x_BND))


class SelfDecoderLayer(DecoderLayer):
    """A layer of the self-decoder. Its attention has the checkpoint's name, `self_attn`."""

    def __init__(self, config: YocoUConfig, layer: int):
        super().__init__(config, layer)
        self.self_attn = WindowAttention(config, layer)

    def forward(self, x_BND: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.feed_forward(x_BND + self.self_attn(self.input_layernorm(x_BND), *args, **kwargs))


class CrossDecoderLayer(DecoderLayer):
    """A layer of the cross-decoder. Its attention has the checkpoint's name, `cross_attn`."""

    def __init__(self, config: YocoUConfig, layer: int):
        super().__init__(config, config.num_self_decoder_layers + layer)
        self.cross_attn = CrossAttention(config)

    def forward(self, x_BND: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.feed_forward(x_BND + self.cross_attn(self.input_layernorm(x_BND), *args, **kwargs))


class Decoder(nn.Module):
    """Holds a decoder's layers under the checkpoint's name for them; YocoUModel calls them one by one."""

    def __init__(self, layers: list[DecoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class YocoUPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of both model classes, and how a checkpoint says that its gate exists."""

    config_class = YocoUConfig
    config: YocoUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SelfDecoderLayer", "CrossDecoderLayer"]  # noqa: RUF012  # as transformers declares it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  # as transformers declares it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DecoderLayer}  # noqa: RUF012  # as transformers declares it

    @classmethod
    def from_pretrained(  # type: ignore[override]  # only a YocoUConfig fits
        cls, pretrained_model_name_or_path: str, *args: Any, config: YocoUConfig | None = None, **kwargs: Any
    ) -> Any:
        if config is None:
            config, kwargs = YocoUConfig.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        if config.leaves_gate_to_weights:
            config.shared_expert_gate = has_shared_expert_gate(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Do nothing: for a registered class transformers saves a copy of its module, where ours names the package."""


class YocoUModel(YocoUPreTrainedModel):
    """Embedding, T times the self-decoder, the global KV, the cross-decoder, the final norm."""

    def __init__(self, config: YocoUConfig):
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_decoder = Decoder([SelfDecoderLayer(config, i) for i in range(config.num_self_decoder_layers)])
        self.global_kv = GlobalKV(config)
        self.cross_decoder = Decoder([CrossDecoderLayer(config, j) for j in range(config.num_cross_decoder_layers)])
        self.norm = StreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: YocoUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, N), attention_mask (B, past + N), position_ids (B, N) -> last_hidden_state (B, N, D).

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, or a cache of another model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds: they are two forms of the same thing.")
        if past_key_values is not None and not isinstance(past_key_values, YocoUCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: YOCO-U keeps one window cache per iteration "
                "and layer and one global cache, leave it out or pass a YocoUCache."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = YocoUCache(self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]

        cfg, cache = self.config, past_key_values
        x_BND = inputs_embeds
        if cfg.residual_in_fp32:  # what layers add is then added in float32 too: torch widens it
            x_BND = x_BND.to(at_least_float32(x_BND))
        x_BND = x_BND * cfg.embedding_multiplier
        mask_arguments = (cfg, inputs_embeds, attention_mask, cache, position_ids)
        window_mask = create_sliding_window_causal_mask(*mask_arguments)
        global_mask = create_causal_mask(*mask_arguments)
        dtype = at_least_float32(x_BND)
        rotation, cross_rotation = Rotation.of(cfg, cfg.head_dim, position_ids, dtype), None
        if cfg.cross_decoder_rope:
            cross_rotation = Rotation.of(cfg, cfg.cross_head_dim, position_ids, dtype)

        for iteration in range(cfg.num_iterations):
            for layer in self.self_decoder.layers:
                x_BND = layer(x_BND, iteration, rotation, window_mask, cache, **kwargs)
        k_BKLd, v_BKLd = self.global_kv(x_BND, cross_rotation)
        if cache is not None:
            k_BKLd, v_BKLd = cache.update(k_BKLd, v_BKLd, cfg.num_iterations * cfg.num_self_decoder_layers)
        for layer in self.cross_decoder.layers:
            x_BND = layer(x_BND, k_BKLd, v_BKLd, cross_rotation, global_mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BND), past_key_values=cache)


class YocoUForCausalLM(YocoUPreTrainedModel, GenerationMixin):
    """YocoUModel with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # as transformers declares it

    def __init__(self, config: YocoUConfig):
        super().__init__(config)
        self.model = YocoUModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() would make one cache per stored layer; the model makes its own on the first forward pass.
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: YocoUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, N or the last `logits_to_keep`, vocab_size), and the next-token loss when labels are given."""
        training = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.config.logit_scale
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **training)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def heads_of(
    x_BNX: torch.Tensor, head_dim: int, norm: nn.Module | None = None, rotation: Rotation | None = None
) -> torch.Tensor:
    """Split a projection (B, N, heads · d) into (B, heads, N, d); norm and rotate it where these are given."""
    x_BHNd = x_BNX.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    if norm is not None:
        x_BHNd = norm(x_BHNd)
    return x_BHNd if rotation is None else rotate(x_BHNd, rotation)


def eager_attention(
    module: Attention,
    q_BHNd: torch.Tensor,
    k_BKLd: torch.Tensor,
    v_BKLd: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out, for `attn_implementation="eager"`, with an additive mask (B, 1, N, L).

    Returns the output (B, N, H, d) and the weights (B, H, N, L).
    """
    k_BHLd = repeat_kv(k_BKLd, module.num_key_value_groups)
    v_BHLd = repeat_kv(v_BKLd, module.num_key_value_groups)
    scores_BHNL = q_BHNd @ k_BHLd.transpose(-1, -2) * scaling
    if mask is not None:
        scores_BHNL = scores_BHNL + mask
    weights_BHNL = scores_BHNL.to(at_least_float32(q_BHNd)).softmax(-1).to(q_BHNd.dtype)
    return (weights_BHNL @ v_BHLd).transpose(1, 2), weights_BHNL
