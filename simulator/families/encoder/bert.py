"""BERT (Devlin et al., arXiv:1810.04805): an encoder with norms behind each half, for masked tokens or for classes."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from hardware.dtypes import INT64
from hardware.errors import UnsupportedError
from simulator import blocks, decoder, encoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_even_heads, read_hidden
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_VOCAB, LARGEST_WIDTH, shown
from simulator.model import AttentionSpec, ClassifierSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Frame, Trace

MASKED_LM, CLASSIFICATION = "BertForMaskedLM", "BertForSequenceClassification"


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a BERT config; defaults are those of BertConfig in transformers 5.23.0.

    The first of ``architectures`` decides the head: `BertForMaskedLM`, the default, or
    `BertForSequenceClassification`.
    """
    config.refuse("is_decoder", (False, None), "set it to false")
    config.refuse("add_cross_attention", (False, None), "set it to false")
    config.refuse("chunk_size_feed_forward", (0, None), "set it to 0")
    hidden = read_hidden(config, 768)
    heads, head_dim = read_even_heads(config, hidden, 12)
    dropout = config.rate("attention_probs_dropout_prob", 0.1)
    attention = AttentionSpec(heads, heads, head_dim, bias=True, dropout=dropout, causal=False)
    width = config.required_size("intermediate_size", 3072, LARGEST_WIDTH)
    feed_forward = FeedForwardSpec(width, config.activation("hidden_act", "gelu"), gated=False, bias=True)
    rate = config.rate("hidden_dropout_prob", 0.1)
    layers = [LayerSpec(attention, feed_forward)] * read_depth(config, 12)
    spec = read_decoder(config, hidden, layers, vocab=30522, positions=512, tied=True, residual_dropout=rate)
    return attrs.evolve(
        spec,
        embedding_dropout=rate,
        norm_first=False,
        final_norm=False,
        token_types=config.size("type_vocab_size", 2, LARGEST_VOCAB),
        classifier=_read_classifier(config, rate) if _classifies(config) else None,
    )


def _classifies(config: ConfigReader) -> bool:
    """Whether the head is a classifier's."""
    given = config.values.get("architectures") or [MASKED_LM]
    head = given[0] if isinstance(given, list) else given
    if head == CLASSIFICATION:
        return True
    if head != MASKED_LM:
        way_out = f'set it to ["{MASKED_LM}"] or ["{CLASSIFICATION}"]'
        config.problems.append(UnsupportedError(f"architectures {shown(head)} is not modelled: {way_out}"))
    config.refuse("tie_word_embeddings", (True,), "set it to true: the head would have a bias that is never used")
    return False


def _read_classifier(config: ConfigReader, rate: float) -> ClassifierSpec:
    """Its classes are those of ``id2label``, or else ``num_labels`` (configuration_utils.py `PreTrainedConfig`)."""
    names = config.values.get("id2label")
    named = len(names) if isinstance(names, Mapping) and names else 2
    classes = config.size("num_labels", named, LARGEST_VOCAB)
    if config.given("id2label"):
        same = f"num_labels must be the number of names in id2label, not {classes} and {named}"
        config.check(classes == named, same, "num_labels")
    config.check(classes > 1, "num_labels must be at least 2: regression is not modelled", "num_labels")
    config.refuse("problem_type", (None, "single_label_classification"), "set it to null")
    given = config.given("classifier_dropout")
    return ClassifierSpec(classes, config.rate("classifier_dropout", rate) if given else rate)


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`BertForMaskedLM` and `BertForSequenceClassification` (transformers models/bert/modeling_bert.py)."""
    ids, labels = decoder.batch(t, labelled="sequences" if spec.classifier else "tokens")
    with t.call("") as outer:
        vocabulary = t.matrix("bert.embeddings.word_embeddings.weight", ("V",), ("h",))
        with t.call("bert") as local:
            hidden = local("embedding_output", _embeddings(t, ids, spec, vocabulary))
            mask = masks.bidirectional_mask(t, hidden)
            if mask is not None:
                local("attention_mask", mask)
            with t.call("encoder", hidden) as inner:
                for slot, layer in layers:
                    with t.layer(slot, hidden, mask):
                        hidden = inner("hidden", _layer(t, hidden, mask, spec, layer))
            outer("sequence_output", local("sequence_output", hidden))
            if spec.classifier is not None:
                hidden = outer("pooled_output", _pooler(t, hidden))
        if spec.classifier is not None:
            logits = _classifier(t, hidden, spec.classifier, outer)
        else:
            logits = outer("logits", _masked_lm_head(t, hidden, spec, vocabulary))
        loss = encoder.cross_entropy(t, logits, labels)
    decoder.leave_with(t, logits, loss)


def _embeddings(t: Trace, ids: Tensor, spec: ModelSpec, vocabulary: Tensor) -> Tensor:
    """`BertEmbeddings`: of words, of kinds of tokens, of positions; the last two from buffers."""
    assert spec.token_types is not None
    positions, kinds = t.dim("P", spec.max_positions), t.dim("T", spec.token_types)
    row = ((), ("s",))
    with t.call("embeddings", ids) as local:
        place_table = t.matrix("position_embeddings.weight", (positions,), ("h",))
        kind_table = t.matrix("token_type_embeddings.weight", (kinds,), ("h",))
        places = t.view(t.buffer("position_ids", positions, dtype=INT64), row)
        t.buffer("token_type_ids", positions, dtype=INT64)
        token_types = local("token_type_ids", ops.constant(t, "gather.default", places, shape=row))
        words = local("inputs_embeds", t.embedded(ops.embedding(t, vocabulary, ids)))
        by_sequence = t.view(token_types, ids.shape)
        kind = local("token_type_embeddings", ops.embedding(t, kind_table, by_sequence))
        total = local("embeddings", ops.add(t, words, kind))
        place = local("position_embeddings", ops.embedding(t, place_table, places))
        total = local("embeddings", ops.add(t, total, place))
        total = local("embeddings", blocks.layer_norm(t, "LayerNorm", total))
        with t.call("dropout"):
            return ops.dropout(t, total, spec.embedding_dropout)


def _layer(t: Trace, x: Tensor, mask: Tensor | None, spec: ModelSpec, layer: LayerSpec) -> Tensor:
    """`BertLayer`."""
    with t.call("layer", x) as local:
        with t.call("attention", x) as inner:
            attended, weights = _self_attention(t, x, mask, layer.attention)
            inner("attention_output", attended)
            if weights is not None:
                local("_", weights)
            attended = _output(t, attended, x, spec.residual_dropout)
        local("attention_output", attended)
        with t.call("", attended) as inner:
            mixed = inner("intermediate_output", _intermediate(t, attended, layer.feed_forward))
            return inner("layer_output", _output(t, mixed, attended, spec.residual_dropout))


def _self_attention(t: Trace, x: Tensor, mask: Tensor | None, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """`BertSelfAttention`."""
    heads, _, d = blocks.head_dims(t, spec)
    with t.call("self", x) as local:
        states = []
        for name in ("query", "key", "value"):
            one = blocks.projection(t, name, x, (*heads, d), spec.bias)
            one = ops.reshape(t, one, (*x.shape[:-1], heads, (d,)))
            states.append(local(name, ops.transpose(t, one, 1, 2)))
        query, key, value = states
        out, weights = blocks.attention(t, query, key, value, mask, spec, blocks.Softmax.PLAIN)
        if weights is not None:
            local("weights", weights)
        return local("attn_output", ops.reshape(t, out, (*x.shape[:-1], (*heads, d)))), weights


def _intermediate(t: Trace, x: Tensor, spec: FeedForwardSpec) -> Tensor:
    """`BertIntermediate`."""
    with t.call("intermediate", x) as local:
        hidden = local("hidden", blocks.projection(t, "dense", x, (t.dim("f", spec.width),), spec.bias))
        with t.call("intermediate_act_fn", hidden):
            return blocks.activation(t, spec.activation, hidden)


def _output(t: Trace, x: Tensor, residual: Tensor, rate: float) -> Tensor:
    """`BertSelfOutput` and `BertOutput`: the residual is added before the norm."""
    with t.call("output", x, residual) as local:
        hidden = local("hidden", blocks.projection(t, "dense", x, ("h",), bias=True))
        with t.call("dropout"):
            hidden = local("hidden", ops.dropout(t, hidden, rate))
        with t.call("") as inner:
            return blocks.layer_norm(t, "LayerNorm", inner("sum", ops.add(t, hidden, residual)))


def _masked_lm_head(t: Trace, x: Tensor, spec: ModelSpec, vocabulary: Tensor) -> Tensor:
    """`BertOnlyMLMHead`: a dense layer and a norm, and the words' embeddings with a bias of their own."""
    with t.loss_head(), t.call("cls.predictions", x) as local:
        bias = t.vector("bias", ("V",))
        with t.call("transform", x) as inner:
            hidden = inner("hidden", blocks.projection(t, "dense", x, ("h",), bias=True))
            with t.call("transform_act_fn", hidden):
                hidden = inner("hidden", blocks.activation(t, spec.layers[0].feed_forward.activation, hidden))
            hidden = blocks.layer_norm(t, "LayerNorm", hidden)
        local("hidden", hidden)
        with t.call("decoder", hidden):
            return ops.linear(t, hidden, vocabulary, bias)


def _pooler(t: Trace, x: Tensor) -> Tensor:
    """`BertPooler`: what the first token has become."""
    with t.loss_head(), t.call("pooler", x) as local:
        pooled = local("pooled_output", blocks.projection(t, "dense", ops.select(t, x, 1), ("h",), bias=True))
        with t.call("activation", pooled):
            return ops.tanh(t, pooled)


def _classifier(t: Trace, pooled: Tensor, spec: ClassifierSpec, local: Frame) -> Tensor:
    """Dropout and the classifier: logits ``[b, classes]``."""
    with t.loss_head():
        with t.call("dropout"):
            pooled = local("pooled_output", ops.dropout(t, pooled, spec.dropout))
        return local("logits", blocks.projection(t, "classifier", pooled, (t.dim("C", spec.classes),), bias=True))


families.add("bert", Family("bert", read, forward=forward, config_class="BertConfig", bounded_positions=True))
