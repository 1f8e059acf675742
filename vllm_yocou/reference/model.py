"""The reference model computes YOCO-U as it is defined, in plain torch, in whatever dtype its weights have.

It is a Hugging Face model: it trains (labels, gradient checkpointing), generates and saves. It shares no code with the
served model, because it is what that is compared with.

Shapes: B sequences, N tokens of this call, L keys (cached and of this call), D hidden_size, H heads that o_proj reads,
Q query heads (2 H with differential attention, else H) and K key/value heads, all of size d.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.output_capturing import capture_outputs

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.attention import Attention, CrossAttention, GlobalKV, WindowAttention
from vllm_yocou.reference.cache import YocoUCache
from vllm_yocou.reference.feed_forward import MLP, MoE
from vllm_yocou.reference.generation import YocoUGenerationMixin
from vllm_yocou.reference.norm import StreamRMSNorm
from vllm_yocou.reference.precision import at_least_float32
from vllm_yocou.reference.rope import Rotation
from vllm_yocou.reference.shared_expert_gate import decide, left_to_weights, weights_follow


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

    def feed_forward(self, x_BND: torch.Tensor, routed_BNk: torch.Tensor | None) -> torch.Tensor:
        h_BND = self.post_attention_layernorm(x_BND)
        return x_BND + (self.mlp(h_BND, routed_BNk) if isinstance(self.mlp, MoE) else self.mlp(h_BND))


class SelfDecoderLayer(DecoderLayer):
    """A layer of the self-decoder. Its attention has the checkpoint's name, `self_attn`."""

    def __init__(self, config: YocoUConfig, layer: int):
        super().__init__(config, layer)
        self.self_attn = WindowAttention(config, layer)

    def forward(
        self, x_BND: torch.Tensor, *args: Any, routed_BNk: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        attended_BND, _ = self.self_attn(self.input_layernorm(x_BND), *args, **kwargs)
        return self.feed_forward(x_BND + attended_BND, routed_BNk)


class CrossDecoderLayer(DecoderLayer):
    """A layer of the cross-decoder. Its attention has the checkpoint's name, `cross_attn`."""

    def __init__(self, config: YocoUConfig, layer: int):
        super().__init__(config, config.num_self_decoder_layers + layer)
        self.cross_attn = CrossAttention(config)

    def forward(
        self, x_BND: torch.Tensor, *args: Any, routed_BNk: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        attended_BND, _ = self.cross_attn(self.input_layernorm(x_BND), *args, **kwargs)
        return self.feed_forward(x_BND + attended_BND, routed_BNk)


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
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: YocoUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        routed_experts: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, N), attention_mask (B, past + N), position_ids (B, N) -> last_hidden_state (B, N, D).

        attention_mask may also map "sliding_attention" and "full_attention" to the masks that the attention function
        takes, as transformers' mask functions make them.

        routed_experts (B, N, T·S + C, k) replays experts that another computation has chosen, for each pass through a
        layer in the order in which they run. The model chooses where they are negative, and layers without experts
        ignore theirs.

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
        x_BND = inputs_embeds
        if cfg.residual_in_fp32:  # what layers add is then added in float32 too: torch widens it
            x_BND = x_BND.to(at_least_float32(x_BND))
        x_BND = x_BND * cfg.embedding_multiplier
        if isinstance(attention_mask, dict):
            if missing := {"sliding_attention", "full_attention"} - attention_mask.keys():
                raise ValueError(f"attention_mask has no '{missing.pop()}': give a mask for each kind of attention.")
            window_mask, global_mask = attention_mask["sliding_attention"], attention_mask["full_attention"]
        else:
            mask_arguments = (cfg, inputs_embeds, attention_mask, cache, position_ids)
            window_mask = create_sliding_window_causal_mask(*mask_arguments)
            global_mask = create_causal_mask(*mask_arguments)
        dtype = at_least_float32(x_BND)
        rotation, cross_rotation = Rotation.of(cfg, cfg.head_dim, position_ids, dtype), None
        if cfg.cross_decoder_rope:
            cross_rotation = Rotation.of(cfg, cfg.cross_head_dim, position_ids, dtype)

        routed = iter(() if routed_experts is None else routed_experts.unbind(2))
        for iteration in range(cfg.num_iterations):
            for layer in self.self_decoder.layers:
                x_BND = layer(x_BND, iteration, rotation, window_mask, cache, routed_BNk=next(routed, None), **kwargs)
        k_BKLd, v_BKLd = self.global_kv(x_BND, cross_rotation)
        if cache is not None:
            k_BKLd, v_BKLd = cache.update(k_BKLd, v_BKLd, cfg.num_iterations * cfg.num_self_decoder_layers)
        for layer in self.cross_decoder.layers:
            x_BND = layer(x_BND, k_BKLd, v_BKLd, cross_rotation, global_mask, routed_BNk=next(routed, None), **kwargs)
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
        logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.config.logit_scale
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
