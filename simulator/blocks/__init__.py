"""Building blocks that families share: norms, rotary embedding, attention interfaces, MLPs, the loss head.

Each follows the Python of transformers 5.23 (file named per function): which intermediate has a name,
and therefore lives until its function returns, is part of what is modelled.
"""

from simulator.blocks.attention import attention as attention
from simulator.blocks.attention import causal_flash as causal_flash
from simulator.blocks.attention import eager_attention as eager_attention
from simulator.blocks.attention import flash_attention_2 as flash_attention_2
from simulator.blocks.attention import head_dims as head_dims
from simulator.blocks.attention import repeat_kv as repeat_kv
from simulator.blocks.attention import rotary_attention as rotary_attention
from simulator.blocks.attention import sdpa_attention as sdpa_attention
from simulator.blocks.feed_forward import GELU as GELU
from simulator.blocks.feed_forward import SILU as SILU
from simulator.blocks.feed_forward import activation as activation
from simulator.blocks.feed_forward import check_feed_forward as check_feed_forward
from simulator.blocks.feed_forward import dropout_add as dropout_add
from simulator.blocks.feed_forward import gated_mlp as gated_mlp
from simulator.blocks.feed_forward import plain_mlp as plain_mlp
from simulator.blocks.latent_attention import complex_rotary_table as complex_rotary_table
from simulator.blocks.latent_attention import latent_attention as latent_attention
from simulator.blocks.linear import layer_inputs as layer_inputs
from simulator.blocks.linear import module_input as module_input
from simulator.blocks.linear import projection as projection
from simulator.blocks.norms import gemma_rms_norm as gemma_rms_norm
from simulator.blocks.norms import layer_norm as layer_norm
from simulator.blocks.norms import llama_rms_norm as llama_rms_norm
from simulator.blocks.rotary import apply_rotary as apply_rotary
from simulator.blocks.rotary import partial_rotary as partial_rotary
from simulator.blocks.rotary import rotary_tables as rotary_tables
from simulator.blocks.vocabulary import look_up as look_up
from simulator.blocks.vocabulary import vocabulary_head as vocabulary_head
from simulator.blocks.vocabulary import vocabulary_table as vocabulary_table
