import torch
from torch.nn import functional as F
from sparsetrain.ops.routing import choose_blocks as choose_blocks, group_by_block
from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS as ACTIVATIONS
from sparsetrain.ops.routed_ffn.cpu import grouped_ffn
from sparsetrain.ops.routed_ffn.problem import Problem

def routed_ffn(x_td, up_fd, down_df, choice_tk, gate_tk, *, gate_proj_fd=None, up_bias_f=None, gate_bias_f=None, down_bias_d=None,
   num_shared=0, num_blocks, activation, gate_mode="output", up_lora=None, gate_lora=None, down_lora=None, lora_dropout=0.0, block_shift_gd=None, valid_t=None, backend="auto"):
    f=up_fd.shape[0]
    w=(f-num_shared)//num_blocks
    weights=(up_fd,) if gate_proj_fd is None else (gate_proj_fd,up_fd)
    biases=(up_bias_f,) if gate_proj_fd is None else (gate_bias_f,up_bias_f)
    loras=(up_lora,) if gate_proj_fd is None else (gate_lora,up_lora)
    low=None
    if any(l is not None for l in loras):
        low=F.linear(x_td,torch.cat([l[0] for l in loras if l]))
    groups=group_by_block(choice_tk,num_blocks,valid_t)
    start=down_bias_d
    if block_shift_gd is not None:
        start=block_shift_gd.sum(0) if start is None else start+block_shift_gd.sum(0)
    p=Problem(x_td,weights,biases,tuple(l[1] if l else None for l in loras),low,down_df,down_lora[0] if down_lora else None,None,start,block_shift_gd,gate_tk,groups,down_lora[1] if down_lora else None,num_shared,w,activation,gate_mode=="spt")
    return grouped_ffn(p)
