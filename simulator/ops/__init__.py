"""The op library: what each dispatcher-level op allocates, saves for backward, and allocates in backward.

One kind of op is declared once; families, strategies and formulas all build on these.
Saved sets follow torch tools/autograd/derivatives.yaml; kernels and their order were checked
op by op against real PyTorch code on fake CUDA tensors.
"""

from simulator.ops.attention import flash_attention_2 as flash_attention_2
from simulator.ops.attention import pad_last as pad_last
from simulator.ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
from simulator.ops.collective import all_gather as all_gather
from simulator.ops.collective import all_reduce as all_reduce
from simulator.ops.collective import gather_output as gather_output
from simulator.ops.collective import reduce_scatter as reduce_scatter
from simulator.ops.collective import replicated_input as replicated_input
from simulator.ops.dropout import dropout as dropout
from simulator.ops.elementwise import add as add
from simulator.ops.elementwise import add_scalar as add_scalar
from simulator.ops.elementwise import constant as constant
from simulator.ops.elementwise import div_constant as div_constant
from simulator.ops.elementwise import div_scalar as div_scalar
from simulator.ops.elementwise import gelu as gelu
from simulator.ops.elementwise import mul as mul
from simulator.ops.elementwise import mul_scalar as mul_scalar
from simulator.ops.elementwise import neg as neg
from simulator.ops.elementwise import power as power
from simulator.ops.elementwise import recomputed_gelu as recomputed_gelu
from simulator.ops.elementwise import relu as relu
from simulator.ops.elementwise import rsqrt as rsqrt
from simulator.ops.elementwise import silu as silu
from simulator.ops.elementwise import sub as sub
from simulator.ops.elementwise import tanh as tanh
from simulator.ops.elementwise import to as to
from simulator.ops.embedding import embedding as embedding
from simulator.ops.embedding import vocabulary_embedding as vocabulary_embedding
from simulator.ops.fused_loss import liger_linear_cross_entropy as liger_linear_cross_entropy
from simulator.ops.liger import liger_rms_norm as liger_rms_norm
from simulator.ops.liger import liger_rotary as liger_rotary
from simulator.ops.liger import liger_silu_mul as liger_silu_mul
from simulator.ops.loss import log_softmax as log_softmax
from simulator.ops.loss import nll_loss as nll_loss
from simulator.ops.loss import parallel_cross_entropy as parallel_cross_entropy
from simulator.ops.matmul import addmm as addmm
from simulator.ops.matmul import baddbmm as baddbmm
from simulator.ops.matmul import bmm as bmm
from simulator.ops.matmul import linear as linear
from simulator.ops.matmul import matmul as matmul
from simulator.ops.normalisation import layer_norm as layer_norm
from simulator.ops.normalisation import mean as mean
from simulator.ops.normalisation import mean_all as mean_all
from simulator.ops.normalisation import rms_norm as rms_norm
from simulator.ops.shape import as_complex as as_complex
from simulator.ops.shape import as_real as as_real
from simulator.ops.shape import cat as cat
from simulator.ops.shape import clone as clone
from simulator.ops.shape import contiguous as contiguous
from simulator.ops.shape import expand as expand
from simulator.ops.shape import filled as filled
from simulator.ops.shape import narrow as narrow
from simulator.ops.shape import reshape as reshape
from simulator.ops.shape import select as select
from simulator.ops.shape import slices as slices
from simulator.ops.shape import split as split
from simulator.ops.shape import split_with_sizes as split_with_sizes
from simulator.ops.shape import transpose as transpose
from simulator.ops.shape import view as view
from simulator.ops.softmax import softmax as softmax
