"""The one home of hypothesis strategies that several test modules share."""

from __future__ import annotations

from typing import Any

import attrs
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP16, FP32
from simulator.liger import FAMILIES as LIGER_FAMILIES
from simulator.liger import default_kernels, liger
from simulator.mesh import Mesh
from simulator.model import (
    AttentionSpec,
    DeltaNetSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    LightningSpec,
    ModelSpec,
    StateSpaceSpec,
)
from simulator.reading import spec_from_config
from simulator.schedules import SCHEDULES, schedule
from simulator.schedules.schedule import Schedule
from simulator.units import WRAPS
from simulator.workload import IMPLEMENTATIONS, OPTIONS, SCALE_TYPES, Optimizer, Training
from strategies.fsdp2 import Fsdp2
from strategies.pipeline_schedule import LOOPS, PipelineSchedule
from tests.sketches import DROPOUT_KEYS, FLAG_KEYS, HEAD_STEPS, SKETCHES

DENSE = ("cohere2", "exaone4", "gemma", "gemma3_text", "granite", "mistral", "nemotron", "olmo2", "phi3")
DENSE += ("qwen2", "qwen3", "smollm3")
#: Families whose models are drawn as configs and read: what their layers have follows from a few keys.
EARLY = ("bert", "biogpt", "bloom", "codegen", "falcon", "gpt_bigcode", "gpt_neo", "gpt_neox", "mpt", "opt")
FAMILIES = ("gpt2", "llama", "gemma2", *DENSE, *EARLY)
HYBRID = ("granitemoehybrid", "mamba2", "nemotron_h")
ACTIVATIONS = {"gpt2": ("gelu_new", "relu"), "nemotron": ("relu2", "gelu")}
ACTIVATIONS |= dict.fromkeys(("gemma", "gemma2", "gemma3_text"), ("gelu_pytorch_tanh",))
#: Families by what their layers can have.
PLAIN_MLP = ("gpt2", "nemotron")
MLP_BIAS = ("granite", "llama", "nemotron", "smollm3")
NO_ATTENTION_BIAS = ("exaone4", "mistral", "phi3")
WINDOWS = ("cohere2", "exaone4", "gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
ROTATED_IN_WINDOWS = ("cohere2", "exaone4")
PARTLY_ROTATED = ("nemotron", "phi3")
RATES = st.sampled_from((0.0, 0.1, 0.5))


@st.composite
def model_specs(
    draw: st.DrawFn, families: tuple[str, ...] = FAMILIES, max_layers: int = 12, irregular: bool = True
) -> ModelSpec:
    """Small legal models; with `irregular` the layers of one model differ in width, heads and window."""
    family = draw(st.sampled_from(families))
    if family in EARLY:
        return spec_from_config(draw(early_configs((family,), max_layers)), f"random-{family}")
    hidden = draw(st.integers(1, 16)) * 4
    plain = family == "gpt2"
    kinds = draw(st.lists(layer_specs(family, hidden), min_size=1, max_size=3 if irregular else 1, unique=True))
    return ModelSpec(
        name=f"random-{family}",
        family=family,
        hidden=hidden,
        vocab=draw(st.integers(1, 300)),
        max_positions=draw(st.integers(64, 512)),
        layers=tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=max_layers))),
        tied_embeddings=draw(st.booleans()),
        embedding_dropout=draw(RATES) if plain else 0.0,
        residual_dropout=draw(RATES) if plain or family == "phi3" else 0.0,
        final_softcap=draw(st.sampled_from((None, 30.0))) if family in ("gemma2", "gemma3_text") else None,
    )


@st.composite
def layer_specs(draw: st.DrawFn, family: str, hidden: int) -> LayerSpec:
    """One legal layer of a `family`, for a residual stream of `hidden` channels."""
    attention = draw(attention_specs(family, hidden))
    return LayerSpec(
        token_mixer=attention,
        channel_mixer=FeedForwardSpec(
            width=draw(st.integers(1, 200)),
            activation=draw(st.sampled_from(ACTIVATIONS.get(family, ("silu",)))),
            gated=family not in PLAIN_MLP,
            bias=family == "gpt2" or (family in MLP_BIAS and draw(st.booleans())),
        ),
    )


@st.composite
def attention_specs(draw: st.DrawFn, family: str, hidden: int) -> AttentionSpec:
    """Attention that `family` can build: GPT-2 splits hidden evenly, the others choose a head_dim."""
    if family == "gpt2":
        heads = draw(st.sampled_from([each for each in (1, 2, 4) if hidden % each == 0]))
        return AttentionSpec(heads, heads, hidden // heads, bias=True, dropout=draw(RATES))
    kv_heads = draw(st.integers(1, 4))
    window = draw(st.none() | st.integers(1, 256)) if family in WINDOWS else None
    # one set of rotary tables serves all layers, so the heads of a model that cuts them are equally wide
    head_dim = hidden // 2 if family in PARTLY_ROTATED else 2 * draw(st.integers(1, 16))
    return AttentionSpec(
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        bias=family == "qwen2" or (family not in NO_ATTENTION_BIAS and draw(st.booleans())),
        dropout=draw(RATES),
        window=window,
        softcap=draw(st.sampled_from((None, 50.0))) if family == "gemma2" else None,
        output_bias=False if family == "qwen2" else None,
        rotary=window is not None if family in ROTATED_IN_WINDOWS else family != "smollm3" or draw(st.booleans()),
        rotary_dim=hidden // 4 if family in PARTLY_ROTATED and hidden % 8 == 0 else None,
    )


@st.composite
def hybrid_specs(draw: st.DrawFn, max_layers: int = 6) -> ModelSpec:
    """Small legal models with state space layers, alone or among others."""
    family = draw(st.sampled_from(HYBRID))
    hidden = draw(st.integers(1, 8)) * 8
    attention = AttentionSpec(4, draw(st.sampled_from((1, 2, 4))), 2 * draw(st.integers(1, 8)), rotary=False)
    plain = FeedForwardSpec(draw(st.integers(1, 100)), gated=family != "nemotron_h")
    experts = ExpertsSpec(
        8 * draw(st.integers(1, 8)), gated=plain.gated, experts=8, per_token=draw(st.integers(1, 8)), shared_width=40
    )
    mixer = draw(state_space_specs())
    kinds = {
        "mamba2": [LayerSpec(mixer, None)],
        "nemotron_h": [LayerSpec(mixer, None), *(LayerSpec(None, each) for each in (plain, experts))],
        "granitemoehybrid": [LayerSpec(mixer, experts), LayerSpec(attention, plain)],
    }
    kinds["nemotron_h"].append(LayerSpec(attention, None))
    return ModelSpec(
        name=f"random-{family}",
        family=family,
        hidden=hidden,
        vocab=draw(st.integers(1, 300)),
        max_positions=512,
        layers=tuple(draw(st.lists(st.sampled_from(kinds[family]), min_size=1, max_size=max_layers))),
        tied_embeddings=family != "nemotron_h" and draw(st.booleans()),
        fp32_residual=family == "mamba2" and draw(st.booleans()),
    )


@st.composite
def state_space_specs(draw: st.DrawFn) -> StateSpaceSpec:
    """A Mamba-2 mixer whose chunks may be longer than the sequence."""
    groups = draw(st.integers(1, 3))
    return StateSpaceSpec(
        heads=groups * draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 16)),
        state=draw(st.integers(1, 16)),
        groups=groups,
        kernel=draw(st.integers(1, 4)),
        chunk=draw(st.integers(1, 24)),
        bias=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
    )


@st.composite
def delta_models(draw: st.DrawFn) -> ModelSpec:
    """Small models of delta nets and at least one layer of gated attention."""
    key_heads = draw(st.integers(1, 3))
    delta = DeltaNetSpec(
        key_heads=key_heads,
        value_heads=key_heads * draw(st.integers(1, 3)),
        key_dim=draw(st.integers(1, 20)),
        value_dim=draw(st.integers(1, 20)),
        kernel=draw(st.integers(1, 4)),
    )
    attention = AttentionSpec(draw(st.sampled_from((2, 4))), 2, head_dim=8, rotary_dim=draw(st.sampled_from((None, 4))))
    mixers = draw(st.permutations([attention, *draw(st.lists(st.sampled_from((delta, attention)), max_size=5))]))
    layers = tuple(LayerSpec(mixer, FeedForwardSpec(width=24)) for mixer in mixers)
    family = draw(st.sampled_from(("qwen3_next", "qwen3_5_text")))
    return ModelSpec("random-delta", family, hidden=16, vocab=40, max_positions=2**20, layers=layers)


@st.composite
def lightning_models(draw: st.DrawFn, max_layers: int = 8) -> ModelSpec:
    """Small models of lightning attention, at least one layer of softmax attention, and experts."""
    heads, head_dim = draw(st.sampled_from((1, 2, 4))), 2 * draw(st.integers(1, 10))
    linear = LightningSpec(heads=heads, head_dim=head_dim, block=draw(st.integers(1, 24)))
    attention = AttentionSpec(heads, 1, head_dim)
    mixers = draw(st.lists(st.sampled_from((linear, attention)), max_size=max_layers - 1))
    mixers.insert(draw(st.integers(0, len(mixers))), attention)
    experts = ExpertsSpec(8 * draw(st.integers(1, 4)), experts=4, per_token=draw(st.integers(1, 4)))
    layers = tuple(LayerSpec(mixer, experts) for mixer in mixers)
    balanced = draw(st.booleans())
    return ModelSpec("random", "minimax", 16, vocab=40, max_positions=2**20, layers=layers, load_balancing=balanced)


@st.composite
def balanced_models(draw: st.DrawFn, max_layers: int = 8) -> ModelSpec:
    """Small models whose routers' logits make a loss of their own."""
    family = draw(st.sampled_from(("mixtral", "gpt_oss", "qwen2_moe", "granitemoehybrid", "minimax")))
    config = {**draw(family_configs(family)), "output_router_logits": True}
    depth = draw(st.integers(1, max_layers))
    if "layer_types" in config:  # in an order without a period, too
        config["layer_types"] = draw(st.lists(st.sampled_from(config["layer_types"]), min_size=depth, max_size=depth))
    return spec_from_config({**config, "num_hidden_layers": depth}, "random-balanced")


@st.composite
def optimizers(draw: st.DrawFn) -> Optimizer:
    """Every optimizer in every implementation, with the options it takes."""
    name = draw(st.sampled_from(sorted(IMPLEMENTATIONS)))
    options: dict[str, Any] = {"weight_decay": draw(st.sampled_from([0.0, 0.1]))}
    if name in OPTIONS["momentum"] and draw(st.booleans()):
        options |= {"momentum": 0.9, "nesterov": name == "sgd" and draw(st.booleans())}
    options |= {"rank": draw(st.integers(1, 70))} if name in OPTIONS["rank"] else {}
    options |= {"scale_type": draw(st.sampled_from(SCALE_TYPES))} if name in OPTIONS["scale_type"] else {}
    switches = [option for option in ("amsgrad", "centered", "maximize") if name in OPTIONS[option]]
    options |= {option: draw(st.booleans()) for option in switches}
    return Optimizer(name=name, implementation=draw(st.sampled_from(IMPLEMENTATIONS[name])), **options)


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    """Small workloads in every regime; some do not go with some models (`UnsupportedError`)."""
    weights, autocast = draw(st.sampled_from([(FP32, None), (BF16, None), (FP32, BF16), (FP32, FP16)]))
    return Training(
        micro_batch=draw(st.integers(1, 4)),
        seq_len=draw(st.integers(1, 64)),
        gradient_accumulation=draw(st.integers(1, 4)),
        weights=weights,
        autocast=autocast,
        optimizer=draw(optimizers()),
        attention=draw(st.sampled_from(["eager", "sdpa", "flash_attention_2"])),
        sdpa_backend=draw(st.sampled_from(["auto", "flash", "efficient", "math"])),
        attention_mask=draw(st.sampled_from(["none", "full", "padded"])),
        keep_outputs=draw(st.booleans()),
        clip=draw(st.sampled_from([None, 1.0])),
        zero_grad=draw(st.sampled_from(["none", "zero"])),
        kernel_workspace=draw(st.booleans()),
    )


@st.composite
def liger_runs(draw: st.DrawFn) -> tuple[ModelSpec, Training]:
    """Models that Liger patches, in every regime, with some of its kernels."""
    model = draw(model_specs(tuple(family for family in sorted(LIGER_FAMILIES) if family in FAMILIES), max_layers=5))
    known = LIGER_FAMILIES[model.family]
    chosen = draw(st.just(default_kernels(model.family)) | st.lists(st.sampled_from(known), unique=True).map(tuple))
    if {"cross_entropy", "fused_linear_cross_entropy"} <= set(chosen):
        chosen = tuple(name for name in chosen if name != "cross_entropy")
    switches = liger(chosen, multiprocessors=draw(st.integers(1, 200)))
    return model, attrs.evolve(draw(trainings()), liger=switches, items_in_batch=draw(st.booleans()))


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """Small data-parallel meshes; degrees need not divide anything."""
    return Mesh(dp_replicate=draw(st.integers(1, 3)), dp_shard=draw(st.integers(1, 7)))


@st.composite
def fsdp2_options(draw: st.DrawFn, shards: int) -> Fsdp2:
    """Every option of FSDP2 that goes with `shards`."""
    fewer = [ranks for ranks in range(2, shards) if shards % ranks == 0]
    return Fsdp2(
        reshard_after_forward=draw(st.sampled_from([True, False, *fewer])),
        root_reshard_after_forward=draw(st.booleans()),
        param_dtype=draw(st.sampled_from([None, BF16])),
        reduce_dtype=draw(st.sampled_from([None, BF16, FP32])),
        wrap=draw(st.sampled_from(WRAPS)),
        prefetch=draw(st.integers(0, 3)),
        sync=draw(st.sampled_from(["last", "every"])),
        offload=draw(st.booleans()),
    )


def uniform_llama(layers: int) -> ModelSpec:
    """A small Llama of `layers` equal layers."""
    attention = AttentionSpec(heads=4, kv_heads=2, head_dim=8)
    layer = LayerSpec(attention, FeedForwardSpec(width=48))
    return ModelSpec("uniform", "llama", hidden=32, vocab=128, max_positions=64, layers=(layer,) * layers)


@st.composite
def configs(draw: st.DrawFn, families: tuple[str, ...] = FAMILIES) -> dict[str, Any]:
    """Legal config.json contents: the required keys, and some of the optional ones."""
    family = draw(st.sampled_from(families))
    if family in EARLY:
        return draw(early_configs((family,)))
    required, optional = (_gpt2_keys if family == "gpt2" else _rotary_keys)(draw)
    if family == "gemma2":
        optional |= _gemma2_keys(draw, required["num_hidden_layers"])
    if family in DENSE:
        optional |= _dense_keys(draw, required["num_hidden_layers"])
    chosen = draw(st.sets(st.sampled_from(sorted(optional))))
    # Class defaults of these two need not divide the drawn number of heads.
    needed = {"num_key_value_heads", "head_dim"} if family not in ("gpt2", "llama") else set()
    return {"model_type": family, **required, **{key: optional[key] for key in sorted(chosen | needed)}}


def _gpt2_keys(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    heads = draw(st.integers(1, 32))
    required = {
        "n_embd": heads * draw(st.integers(1, 128)),
        "n_layer": draw(st.integers(1, 12)),
        "n_head": heads,
        "vocab_size": draw(st.integers(1, 10**6)),
    }
    rates = {key: draw(st.floats(0, 1)) for key in ("attn_pdrop", "resid_pdrop", "embd_pdrop")}
    inner = draw(st.none() | st.integers(1, 10**5))
    return required, {**rates, "n_inner": inner, "n_positions": 64, "tie_word_embeddings": draw(st.booleans())}


def _rotary_keys(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    kv_heads = draw(st.integers(1, 8))
    heads = kv_heads * draw(st.integers(1, 8))
    required = {
        "hidden_size": 2 * heads * draw(st.integers(1, 64)),
        "num_hidden_layers": draw(st.integers(1, 12)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 10**5)),
        "vocab_size": draw(st.integers(1, 10**6)),
    }
    flags = {key: draw(st.booleans()) for key in ("attention_bias", "mlp_bias", "tie_word_embeddings")}
    return required, {
        **flags,
        "num_key_value_heads": kv_heads,
        "head_dim": 4 * draw(st.integers(1, 64)),
        "attention_dropout": draw(st.floats(0, 1)),
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "rope_theta": 10000.0,
    }


def _gemma2_keys(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    kinds = st.sampled_from(("sliding_attention", "full_attention"))
    return {
        "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers)),
        "sliding_window": draw(st.integers(1, 10**6)),
        "attn_logit_softcapping": draw(st.none() | st.floats(1, 100)),
        "final_logit_softcapping": draw(st.none() | st.floats(1, 100)),
    }


def _dense_keys(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """Keys that some of the dense families read and the others ignore."""
    return {
        "layer_types": ["full_attention"] * layers,
        "sliding_window": draw(st.integers(1, 10**6)),
        "use_sliding_window": draw(st.booleans()),
        "max_window_layers": draw(st.integers(0, 20)),
        "no_rope_layers": draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers)),
        "resid_pdrop": draw(st.floats(0, 1)),
        "final_logit_softcapping": draw(st.none() | st.floats(1, 100)),
    }


@st.composite
def family_configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """A small config.json of `family`."""
    sketch = SKETCHES[family]
    sizes = {key: step * draw(st.integers(1, 3)) for key, step in sketch.sizes.items()}
    return {"model_type": family, **sketch.fixed, **sizes, **draw(st.sampled_from(sketch.choices))}


@st.composite
def early_configs(draw: st.DrawFn, families: tuple[str, ...] = EARLY, max_layers: int = 12) -> dict[str, Any]:
    """Small legal config.json contents of the early decoders and encoders; dropout rates and flags are optional."""
    family = draw(st.sampled_from(families))
    heads = draw(st.integers(1, 3)) * (4 if family == "codegen" else 1)
    depth, head_dim = draw(st.integers(1, max_layers)), draw(st.integers(1, 4)) * HEAD_STEPS.get(family, 1)
    required = {
        "hidden_size": heads * head_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "vocab_size": draw(st.integers(1, 300)),
        "max_seq_len" if family == "mpt" else "max_position_embeddings": draw(st.integers(64, 512)),
    }
    required |= _early_keys(draw, family, depth, head_dim)
    optional: dict[str, Any] = {key: draw(RATES) for key in DROPOUT_KEYS[family]}
    optional |= {key: draw(st.booleans()) for key in FLAG_KEYS.get(family, ())}
    chosen = draw(st.sets(st.sampled_from(sorted(optional)))) if optional else set()
    return {"model_type": family, **required, **{key: optional[key] for key in sorted(chosen)}}


def _early_keys(draw: st.DrawFn, family: str, depth: int, head_dim: int) -> dict[str, Any]:
    """Keys that a family has to have, or has alone."""
    width = draw(st.integers(1, 200))
    if family == "bert":
        heads = (["BertForMaskedLM"], ["BertForSequenceClassification"])
        return {"intermediate_size": width, "architectures": draw(st.sampled_from(heads)), "type_vocab_size": 3}
    if family == "codegen":
        return {"rotary_dim": 2 * draw(st.integers(1, head_dim // 2)), "n_inner": width}
    if family == "gpt_neo":
        kinds = draw(st.lists(st.sampled_from(("global", "local")), min_size=depth, max_size=depth))
        return {"attention_types": [[kinds, 1]], "window_size": draw(st.integers(1, 64)), "intermediate_size": width}
    if family == "mpt":
        return {"attn_config": {"clip_qkv": draw(st.sampled_from((None, 8.0)))}}
    names = {"biogpt": "intermediate_size", "gpt_bigcode": "n_inner", "gpt_neox": "intermediate_size", "opt": "ffn_dim"}
    return {names[family]: width} if family in names else {}


@st.composite
def schedules(draw: st.DrawFn, names: tuple[str, ...] = tuple(SCHEDULES)) -> Schedule:
    """Legal pipeline schedules, with groups of any legal size where chunks take turns."""
    name = draw(st.sampled_from(names))
    pp, micro_batches = draw(st.integers(1, 16)), draw(st.integers(1, 64))
    chunks = draw(st.integers(2, 4)) if name == "interleaved_1f1b" else None
    chunks = draw(st.integers(1, 4)) if name == "zb_h1" else chunks
    if name == "dualpipe":
        pp, micro_batches = pp + pp % 2, micro_batches + micro_batches % 2
    if name.startswith("dualpipe"):
        micro_batches = max(2 * pp, micro_batches)
    if chunks is None or chunks == 1:
        return schedule(name, pp, micro_batches, chunks)
    if micro_batches < pp:
        return schedule(name, pp, micro_batches, chunks, micro_batches)
    whole = [g for g in range(pp, micro_batches + 1) if micro_batches % g == 0 or micro_batches % g >= pp]
    return schedule(name, pp, micro_batches, chunks, draw(st.sampled_from(whole)))


@st.composite
def pipeline_ranks(draw: st.DrawFn, layers: int, most: int = 64) -> tuple[PipelineSchedule, int, int]:
    """A rank of a pipeline that torch runs, its ranks, and its micro-batches; at most `layers` stages."""
    name = draw(st.sampled_from(sorted(LOOPS)))
    single = name in ("gpipe", "1f1b")
    pp = draw(st.integers(2, layers if single else layers // 2))
    chunks = 2 if single or name in ("zbv", "dualpipev") else draw(st.integers(2, layers // pp))
    micro_batches = draw(st.integers(2 * pp if name == "dualpipev" else pp, most))
    if name in ("interleaved_1f1b", "zb_h1"):
        micro_batches -= micro_batches % (micro_batches // pp)
    virtual = None if single else chunks
    return PipelineSchedule(schedule=name, virtual_stages=virtual, rank=draw(st.integers(0, pp - 1))), pp, micro_batches
