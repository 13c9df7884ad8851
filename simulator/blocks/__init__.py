"""Building blocks that families share: norms, rotary embedding, attention interfaces, MLPs, the loss head.

Each follows the Python of transformers 5.23 (file named per function): which intermediate has a name,
and therefore lives until its function returns, is part of what is modelled.
"""

from simulator.blocks.attention import attention as attention
from simulator.blocks.attention import causal_flash as causal_flash
from simulator.blocks.attention import eager_attention as eager_attention
from simulator.blocks.attention import flash_attention_2 as flash_attention_2
from simulator.blocks.attention import repeat_kv as repeat_kv
from simulator.blocks.attention import rotary_attention as rotary_attention
from simulator.blocks.attention import sdpa_attention as sdpa_attention
from simulator.blocks.experts import Router as Router
from simulator.blocks.experts import chosen_softmax_router as chosen_softmax_router
from simulator.blocks.experts import experts_and_shared_mlp as experts_and_shared_mlp
from simulator.blocks.experts import experts_mlp as experts_mlp
from simulator.blocks.experts import experts_or_gated_mlp as experts_or_gated_mlp
from simulator.blocks.experts import gated_shared_mlp as gated_shared_mlp
from simulator.blocks.experts import grouped_experts as grouped_experts
from simulator.blocks.experts import grouped_sigmoid_router as grouped_sigmoid_router
from simulator.blocks.experts import scaled_softmax_router as scaled_softmax_router
from simulator.blocks.experts import sigmoid_router as sigmoid_router
from simulator.blocks.experts import softmax_router as softmax_router
from simulator.blocks.feed_forward import GELU as GELU
from simulator.blocks.feed_forward import SILU as SILU
from simulator.blocks.feed_forward import activation as activation
from simulator.blocks.feed_forward import check_feed_forward as check_feed_forward
from simulator.blocks.feed_forward import dropout_add as dropout_add
from simulator.blocks.feed_forward import fused_gated_mlp as fused_gated_mlp
from simulator.blocks.feed_forward import gated_mlp as gated_mlp
from simulator.blocks.feed_forward import plain_mlp as plain_mlp
from simulator.blocks.heads import PROJECTIONS as PROJECTIONS
from simulator.blocks.heads import Norm as Norm
from simulator.blocks.heads import fused_states as fused_states
from simulator.blocks.heads import head_dims as head_dims
from simulator.blocks.heads import separate_states as separate_states
from simulator.blocks.latent_attention import complex_rotary_table as complex_rotary_table
from simulator.blocks.latent_attention import latent_attention as latent_attention
from simulator.blocks.layers import AFTER as AFTER
from simulator.blocks.layers import AROUND as AROUND
from simulator.blocks.layers import BEFORE as BEFORE
from simulator.blocks.layers import NONE as NONE
from simulator.blocks.layers import decoder_layer as decoder_layer
from simulator.blocks.linear import layer_inputs as layer_inputs
from simulator.blocks.linear import module_input as module_input
from simulator.blocks.linear import projection as projection
from simulator.blocks.norms import cohere_layer_norm as cohere_layer_norm
from simulator.blocks.norms import gemma_rms_norm as gemma_rms_norm
from simulator.blocks.norms import layer_norm as layer_norm
from simulator.blocks.norms import layer_norm_1p as layer_norm_1p
from simulator.blocks.norms import llama_rms_norm as llama_rms_norm
from simulator.blocks.rotary import apply_rotary as apply_rotary
from simulator.blocks.rotary import rotary_tables as rotary_tables
from simulator.blocks.rotary import rotate as rotate
from simulator.blocks.rotary import rotate_in as rotate_in
from simulator.blocks.rotary import rotate_part as rotate_part
from simulator.blocks.state_space import STATE_SPACE as STATE_SPACE
from simulator.blocks.state_space import mamba2_mixer as mamba2_mixer
from simulator.blocks.vocabulary import look_up as look_up
from simulator.blocks.vocabulary import scaled_embeddings as scaled_embeddings
from simulator.blocks.vocabulary import token_embeddings as token_embeddings
from simulator.blocks.vocabulary import vocabulary_head as vocabulary_head
from simulator.blocks.vocabulary import vocabulary_table as vocabulary_table
