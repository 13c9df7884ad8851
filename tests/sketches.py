"""How small configs of every simulated family are drawn: sizes that may grow, choices that go together, fixed keys."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen
class Sketch:
    """How small configs of a family are drawn: every combination is legal."""

    sizes: dict[str, int]
    """Keys whose values are a small multiple of the number given; whatever the others are, they may grow."""
    choices: tuple[dict[str, Any], ...] = ({},)
    """Keys that only go together, one of each set."""
    fixed: dict[str, Any] = attrs.field(factory=dict)


_GPT = Sketch({"n_embd": 24, "n_layer": 1, "vocab_size": 1}, ({"n_head": 1}, {"n_head": 2}, {"n_head": 4}))
_HEADS = tuple({"num_attention_heads": q, "num_key_value_heads": k} for q, k in ((1, 1), (2, 1), (4, 2), (3, 3)))
_DECODER = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 1}
_ROTARY = Sketch(_DECODER | {"head_dim": 8}, _HEADS)
_EVEN = Sketch(_DECODER, _HEADS)
_EVEN_ALONE = Sketch(_DECODER, tuple({"num_attention_heads": heads} for heads in (1, 2, 3)))
_LOCAL = Sketch(_ROTARY.sizes | {"num_local_experts": 4}, tuple(h | {"num_experts_per_tok": 3} for h in _HEADS))
_MANY = Sketch(
    _DECODER | {"head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4},
    tuple(heads | {"num_experts_per_tok": chosen} for heads in _HEADS for chosen in (1, 4)),
)
_LATENT = Sketch(
    _DECODER | {"moe_intermediate_size": 8, "kv_lora_rank": 1, "v_head_dim": 1, "qk_nope_head_dim": 1},
    tuple({"q_lora_rank": rank, "n_shared_experts": shared} for rank in (None, 5) for shared in (1, 2)),
    {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_rope_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
)
_GLM = Sketch(
    _DECODER | {"head_dim": 8, "moe_intermediate_size": 8, "n_routed_experts": 4},
    tuple(heads | {"use_qk_norm": norm, "n_shared_experts": 1 + norm} for heads in _HEADS for norm in (False, True)),
    {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_mtp_layers": 0},
)
_FALCON = Sketch(
    {"hidden_size": 24, "num_hidden_layers": 1, "vocab_size": 1},
    (
        {"num_attention_heads": 3, "multi_query": True},
        {"num_attention_heads": 2, "multi_query": False, "parallel_attn": False, "bias": True},
        {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
        {"num_attention_heads": 2, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
)
_POSITIONS = {"max_position_embeddings": 64}
_ENCODER = Sketch(
    _DECODER | _POSITIONS,
    tuple(
        {"num_attention_heads": heads, "architectures": [f"BertFor{head}"]}
        for heads in (1, 3)
        for head in ("MaskedLM", "SequenceClassification")
    ),
)
_DELTA = Sketch(
    {key: size for key, size in _MANY.sizes.items() if key != "num_hidden_layers"}
    | {"head_dim": 32, "shared_expert_intermediate_size": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    tuple(
        heads | {"linear_num_key_heads": keys, "linear_num_value_heads": 4, "num_experts_per_tok": 2}
        for heads in _HEADS
        for keys in (1, 4)
    ),
    {"num_hidden_layers": 4},
)
#: One for every family that is simulated.
SKETCHES: dict[str, Sketch] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT),
    **dict.fromkeys(("cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral"), _ROTARY),
    **dict.fromkeys(("qwen3", "smollm3"), _ROTARY),
    **dict.fromkeys(("olmo2", "phi3", "qwen2"), _EVEN),
    "nemotron": attrs.evolve(_EVEN, sizes=_DECODER | {"hidden_size": 48}),
    "bloom": Sketch({"hidden_size": 24, "n_layer": 1, "vocab_size": 1}, ({"n_head": 1}, {"n_head": 3}, {"n_head": 4})),
    "opt": Sketch(
        {"hidden_size": 24, "ffn_dim": 1, "num_hidden_layers": 1, "vocab_size": 1, "word_embed_proj_dim": 7},
        ({"num_attention_heads": 3}, {"num_attention_heads": 4, "do_layer_norm_before": False}),
    ),
    "gpt_neox": attrs.evolve(_EVEN_ALONE, fixed={"rotary_pct": 0.5, "hidden_act": "gelu"}),
    "falcon": _FALCON,
    "bert": _ENCODER,
    "biogpt": attrs.evolve(_EVEN_ALONE, sizes=_DECODER | _POSITIONS),
    "codegen": Sketch({"n_embd": 48, "n_layer": 1, "vocab_size": 1, **_POSITIONS}, ({"n_head": 4},), {"rotary_dim": 4}),
    "gpt_neo": Sketch(
        {"hidden_size": 24, "vocab_size": 1, **_POSITIONS},
        tuple({"num_heads": heads, "num_layers": 2, "attention_types": [[["global", "local"], 1]]} for heads in (1, 2)),
    ),
    "mpt": Sketch({"d_model": 24, "n_layers": 1, "vocab_size": 1, "max_seq_len": 64}, ({"n_heads": 1}, {"n_heads": 3})),
    **dict.fromkeys(("mixtral", "minimax_m2", "gpt_oss"), _LOCAL),
    "minimax": attrs.evolve(_LOCAL, fixed={"block_size": 5}),
    "llama4_text": attrs.evolve(_LOCAL, sizes=_LOCAL.sizes | {"intermediate_size_mlp": 8}),
    "olmoe": Sketch(_DECODER | {"num_experts": 4}, tuple(heads | {"num_experts_per_tok": 3} for heads in _HEADS)),
    "qwen2_moe": Sketch(
        _DECODER | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4},
        tuple(heads | {"num_experts_per_tok": 2} for heads in _HEADS),
    ),
    "qwen3_moe": _MANY,
    "glm4_moe": _GLM,
    "deepseek_v2": attrs.evolve(_LATENT, fixed=_LATENT.fixed | {"topk_method": "group_limited_greedy"}),
    **dict.fromkeys(("deepseek_v3", "kimi_k2"), _LATENT),
    "mamba2": Sketch(
        {"state_size": 5, "num_hidden_layers": 1, "vocab_size": 1},
        tuple({"hidden_size": 12, "num_heads": 4, "head_dim": 6, "n_groups": groups} for groups in (1, 2)),
        {"chunk_size": 8},
    ),
    "nemotron_h": Sketch(
        {"hidden_size": 8, "ssm_state_size": 5, "mamba_head_dim": 3, "intermediate_size": 3, "vocab_size": 1}
        | {"moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 3},
        tuple({"num_attention_heads": 4, "num_key_value_heads": heads, "n_groups": heads} for heads in (1, 2)),
        {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"], "mamba_num_heads": 4}
        | {"head_dim": 6, "chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoehybrid": Sketch(
        {"hidden_size": 8, "intermediate_size": 8, "shared_intermediate_size": 3, "mamba_d_state": 5, "vocab_size": 1},
        tuple({"num_key_value_heads": heads, "mamba_n_groups": heads} for heads in (1, 2)),
        {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"mamba_n_heads": 4, "mamba_chunk_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), _DELTA),
    "qwen3_5_text": attrs.evolve(_DELTA, sizes={key: _DELTA.sizes[key] for key in _DELTA.sizes if "expert" not in key}),
}

#: Head dimensions of a family are multiples of this: what it rotates must be even.
HEAD_STEPS = {"codegen": 4, "falcon": 2, "gpt_neox": 8}
#: Keys of dropout rates.
DROPOUT_KEYS = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "biogpt": ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout"),
    "bloom": ("hidden_dropout", "attention_dropout"),
    "codegen": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "falcon": ("hidden_dropout",),
    "gpt_bigcode": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neo": ("resid_dropout", "embed_dropout", "attention_dropout"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "mpt": (),
    "opt": ("dropout", "attention_dropout"),
}
#: Keys that are true or false.
FLAG_KEYS = {
    "biogpt": ("tie_word_embeddings", "scale_embedding"),
    "codegen": ("tie_word_embeddings",),
    "falcon": ("multi_query", "parallel_attn", "bias"),
    "gpt_bigcode": ("multi_query", "tie_word_embeddings"),
    "gpt_neo": ("tie_word_embeddings",),
    "gpt_neox": ("use_parallel_residual", "attention_bias", "tie_word_embeddings"),
    "opt": ("do_layer_norm_before", "enable_bias", "tie_word_embeddings"),
}
