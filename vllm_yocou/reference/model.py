"""The reference model computes YOCO-U as it is defined, in plain torch, in whatever dtype its weights have.

It is a Hugging Face model: it trains (labels, gradient checkpointing), generates and saves. It shares no code with the
served model, because it is what that is compared with.

Shapes: B sequences, N tokens of this call, L keys (cached and of this call), D hidden_size, H query and K key/value
heads of size d.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.output_capturing import capture_outputs

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.cache import YocoUCache
from vllm_yocou.reference.feed_forward import MLP, MoE
from vllm_yocou.reference.generation import YocoUGenerationMixin
from vllm_yocou.reference.rope import Rotation, rotate
from vllm_yocou.reference.shared_expert_gate import decide, left_to_weights, weights_follow


class Attention(nn.Module):
    """What both decoders' attentions share: queries, the call of the configured attention function, the output."""

    is_causal = True

    def __init__(self, config: YocoUConfig, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, rope: bool):
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.num_key_value_groups = heads // kv_heads
        self.rope = rope
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None

    def query(self, h_BND: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        return heads_of(self.q_proj(h_BND), self.head_dim, self.q_norm, rotation if self.rope else None)

    def attend(
        self,
        q_BHNd: torch.Tensor,
        k_BKLd: torch.Tensor,
        v_BKLd: torch.Tensor,
        mask: Any,
        sliding_window: int | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output (B, N, D), and the weights (B, H, N, L) if the attention function has them."""
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out_BNHd, weights_BHNL = attend(
            self, q_BHNd, k_BKLd, v_BKLd, mask, scaling=self.head_dim**-0.5, sliding_window=sliding_window, **kwargs
        )
        return self.o_proj(out_BNHd.flatten(-2)), weights_BHNL


class WindowAttention(Attention):
    """Self-decoder attention: a token sees W keys, itself included, of its own iteration."""

    def __init__(self, config: YocoUConfig, layer: int):
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        super().__init__(config, H, K, d, qk_norm=config.qk_norm != "none", rope=True)
        self.layer = layer
        self.k_proj = nn.Linear(config.hidden_size, K * d, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, K * d, bias=False)
        self.k_norm = nn.RMSNorm(d, config.rms_norm_eps) if config.qk_norm != "none" else None

    def forward(
        self,
        h_BND: torch.Tensor,
        iteration: int,
        rotation: Rotation,
        mask: Any,
        cache: YocoUCache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        k_BKLd = heads_of(self.k_proj(h_BND), self.head_dim, self.k_norm, rotation)
        v_BKLd = heads_of(self.v_proj(h_BND), self.head_dim)
        if cache is not None:
            slot = iteration * self.config.num_self_decoder_layers + self.layer
            k_BKLd, v_BKLd = cache.update(k_BKLd, v_BKLd, slot)
        q_BHNd = self.query(h_BND, rotation)
        return self.attend(q_BHNd, k_BKLd, v_BKLd, mask, self.config.sliding_window, **kwargs)


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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attend(self.query(h_BND, rotation), k_BKLd, v_BKLd, mask, None, **kwargs)


class GlobalKV(nn.Module):
    """The one global KV: g = RMSNorm(x), K = Wk g, V = Wv g, once per token, for every cross layer."""

    def __init__(self, config: YocoUConfig):
        super().__init__()
        self.head_dim = config.cross_head_dim
        self.rope = config.cross_decoder_rope
        width = config.cross_num_key_value_heads * config.cross_head_dim
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm == "all" else None

    def forward(self, x_BND: torch.Tensor, rotation: Rotation | None) -> tuple[torch.Tensor, torch.Tensor]:
        g_BND = self.norm(x_BND)
        k_BKNd = heads_of(self.k_proj(g_BND), self.head_dim, self.k_norm, rotation if self.rope else None)
        return k_BKNd, heads_of(self.v_proj(g_BND), self.head_dim)


class DecoderLayer(GradientCheckpointingLayer):
    """The half of a layer that both decoders have: two norms, and the feed-forward with its residual."""

    def __init__(self, config: YocoUConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe else MLP(config.hidden_size, config.intermediate_size)

    def feed_forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        return x_BND + self.mlp(self.post_attention_layernorm(x_BND))


class SelfDecoderLayer(DecoderLayer):
    """A layer of the self-decoder. Its attention has the checkpoint's name, `self_attn`."""

    def __init__(self, config: YocoUConfig, layer: int):
        super().__init__(config)
        self.self_attn = WindowAttention(config, layer)

    def forward(self, x_BND: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attended_BND, _ = self.self_attn(self.input_layernorm(x_BND), *args, **kwargs)
        return self.feed_forward(x_BND + attended_BND)


class CrossDecoderLayer(DecoderLayer):
    """A layer of the cross-decoder. Its attention has the checkpoint's name, `cross_attn`."""

    def __init__(self, config: YocoUConfig):
        super().__init__(config)
        self.cross_attn = CrossAttention(config)

    def forward(self, x_BND: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attended_BND, _ = self.cross_attn(self.input_layernorm(x_BND), *args, **kwargs)
        return self.feed_forward(x_BND + attended_BND)


class Decoder(nn.Module):
    """Holds a decoder's layers under the checkpoint's name for them; YocoUModel calls them one by one."""

    def __init__(self, layers: list[DecoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class YocoUPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of both model classes, and when it lets weights decide on a gate."""

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
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Attention}  # noqa: RUF012  # as transformers declares it

    def __init__(self, config: YocoUConfig):
        super().__init__(config)
        self.gate_is_left_to_weights = left_to_weights(config)

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list:
        """What transformers enters to build a model whose weights it loads next."""
        return [*super().get_init_context(*args, **kwargs), weights_follow()]

    @staticmethod
    def _finalize_model_loading(
        model: "YocoUPreTrainedModel", load_config: Any, loading_info: LoadStateDictInfo
    ) -> LoadStateDictInfo:
        """What transformers does once weights are loaded, before it initializes those that were missing."""
        decide(model, model.config, model.gate_is_left_to_weights, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

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
        self.cross_decoder = Decoder([CrossDecoderLayer(config) for _ in range(config.num_cross_decoder_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: YocoUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, N), attention_mask (B, past + N), position_ids (B, N) -> last_hidden_state (B, N, D).

        attention_mask may also map "sliding_attention" and "full_attention" to the masks that the attention function
        takes, as transformers' mask functions make them.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, no token, a cache of another model, a mapping of
                masks without one of the two, or output_attentions with an attention function that returns none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds: they are two forms of the same thing.")
        if past_key_values is not None and not isinstance(past_key_values, YocoUCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: YOCO-U keeps one window cache per iteration "
                "and layer and one global cache, leave it out or pass a YocoUCache."
            )
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions cannot be used with attn_implementation='{self.config._attn_implementation}': only "
                "eager attention has weights to return, call set_attn_implementation('eager')."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError(
                "there is no token to compute: give at least one (in generate(), prefill_chunk_size needs input_ids)."
            )
        if use_cache and past_key_values is None:
            past_key_values = YocoUCache(self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]

        cfg, cache = self.config, past_key_values
        x_BND = inputs_embeds * cfg.embedding_multiplier
        if isinstance(attention_mask, dict):
            if missing := {"sliding_attention", "full_attention"} - attention_mask.keys():
                raise ValueError(f"attention_mask has no '{missing.pop()}': give a mask for each kind of attention.")
            window_mask, global_mask = attention_mask["sliding_attention"], attention_mask["full_attention"]
        else:
            mask_arguments = (cfg, x_BND, attention_mask, cache, position_ids)
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


class YocoUForCausalLM(YocoUPreTrainedModel, YocoUGenerationMixin):
    """YocoUModel with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # as transformers declares it

    def __init__(self, config: YocoUConfig):
        super().__init__(config)
        self.model = YocoUModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
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
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **training)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    """The dtype in which angles and softmax are computed for x: its own, or float32 if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


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
