"""Mamba-2 (Dao and Gu, arXiv:2405.21060): state space layers alone, residuals in fp32."""

from __future__ import annotations

from functools import partial

import attrs

from hardware.dtypes import FP32
from simulator import blocks, decoder, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_hidden
from simulator.families.hybrid.reading import read_state_space
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Mamba-2 config; defaults are those of Mamba2Config in transformers 5.23.0."""
    hidden = read_hidden(config, 4096)
    mixer = read_state_space(
        config,
        heads=("num_heads", 128),
        head_dim=("head_dim", 64),
        state=("state_size", 128),
        groups=("n_groups", 8),
        kernel=("conv_kernel", 4),
        chunk=("chunk_size", 256),
        conv_bias="use_conv_bias",
        activation="hidden_act",
    )
    mixer = attrs.evolve(mixer, bias=config.flag("use_bias", False))
    expand = config.size("expand", 2, 1024)
    rule = f"hidden_size x expand must equal num_heads x head_dim, not {hidden} x {expand} and {mixer.inner}"
    config.check(hidden * expand == mixer.inner, rule, "hidden_size", "expand", "num_heads", "head_dim")
    layers = [LayerSpec(mixer, None)] * read_depth(config, 64)
    spec = read_decoder(config, hidden, layers, vocab=32768, positions=None)
    return attrs.evolve(spec, fp32_residual=config.flag("residual_in_fp32", True))


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`Mamba2ForCausalLM` (transformers models/mamba2/modeling_mamba2.py)."""
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "backbone.embeddings")
    with t.call("backbone") as local:
        embeds = local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "embeddings"))
        hidden = local("hidden_states", embeds)
        for slot, layer in layers:
            with t.layer(slot, hidden):
                hidden = local("hidden_states", _block(t, hidden, spec, layer))
        hidden = local("hidden_states", blocks.llama_rms_norm(t, "norm_f", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary, partial(ops.to, dtype=FP32), low_input=True)
    t.order_layer_parameters(*blocks.STATE_SPACE, "mixer")


def _block(t: Trace, x: Tensor, spec: ModelSpec, layer: LayerSpec) -> Tensor:
    """`Mamba2Block`."""
    with t.call("layer", x) as local:
        with t.call("") as inner:
            low = inner("input", ops.to(t, x, t.regime.weights))
            hidden = local("hidden_states", blocks.llama_rms_norm(t, "norm", low))
        residual = local("residual", ops.to(t, x, FP32) if spec.fp32_residual else x)
        hidden = local("hidden_states", blocks.mamba2_mixer(t, hidden, layer.state_space))
        return ops.add(t, residual, hidden)


families.add("mamba2", Family("mamba2", read, forward=forward, config_class="Mamba2Config"))
