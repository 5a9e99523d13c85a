"""A GPT in transformers' terms: the class that computes the same, its settings, its weights.

    keys, weights = convert_gpt(net, weights)       # ValueError if there is none
"""
import torch

from mambino.export.peers import Peer, peer_of
from mambino.weights.families.gpt import EXPERTS, turned_first

PEERS = (       # the first that suits is taken
    Peer('Qwen2', 'qwen2', 'qkv_bias', 'window rope_scaling'),
    Peer('Llama', 'llama', '', 'qkv_bias o_bias mlp_bias rope_scaling'),
    Peer('Mistral', 'mistral', 'window', 'rope_scaling'),
    Peer('Qwen3', 'qwen3', 'qk_norm', 'window qkv_bias o_bias rope_scaling'),
    Peer('SmolLM3', 'smollm3', 'rope_layers', 'qkv_bias o_bias mlp_bias rope_scaling'),
    Peer('Olmo2', 'olmo2', 'norm_after qk_norm qk_norm_whole', 'qkv_bias o_bias rope_scaling'),
    Peer('Phi3', 'phi3', 'rope_dim', 'window'),
    Peer('Mixtral', 'mixtral', 'n_expert', 'window rope_scaling'),
    Peer('Qwen3Moe', 'qwen3_moe', 'n_expert qk_norm',
         'window qkv_bias o_bias rope_scaling norm_topk=False'),
    Peer('Olmoe', 'olmoe', 'n_expert qk_norm qk_norm_whole',
         'qkv_bias o_bias rope_scaling norm_topk=False'),
)


def convert_gpt(net, weights):
    """→ (config.json's keys, {name: tensor})."""
    c = net.config
    peer = peer_of(c, PEERS, 'transformers')
    keys = attention_keys(c) | dict(
        architectures=[peer.name + 'ForCausalLM'], model_type=peer.model_type)
    has_bias = c.qkv_bias or c.o_bias
    if peer.name == 'Qwen2':                    # whose biases are not a choice
        del keys['attention_bias'], keys['mlp_bias']
    elif has_bias:
        keys['attention_bias'] = True
        weights = with_zero_biases(weights, c)
    if peer.name not in ('Llama', 'Olmo2', 'Olmoe', 'SmolLM3'):
        keys['sliding_window'] = c.window or None
    if peer.name in ('Qwen2', 'Qwen3', 'Qwen3Moe', 'SmolLM3'):
        layer_type = 'sliding_attention' if c.window else 'full_attention'
        keys |= dict(use_sliding_window=c.window > 0, max_window_layers=0,
                     layer_types=[layer_type] * c.n_layer)
    if peer.name == 'SmolLM3':
        keys['no_rope_layers'] = [int(c.turns(i)) for i in range(c.n_layer)]
    if peer.name == 'Phi3':
        keys |= dict(partial_rotary_factor=c.rope_dim / c.head_dim,
                     original_max_position_embeddings=c.block_size)
        keys['rope_parameters']['partial_rotary_factor'] = c.rope_dim / c.head_dim
        weights = fused(weights, c)
    if c.n_expert:
        keys |= dict(num_experts_per_tok=c.n_expert_active, router_aux_loss_coef=c.aux_loss,
                     num_local_experts=c.n_expert)
        weights = split_experts(weights, *EXPERTS[peer.model_type])
    if peer.name in ('Qwen3Moe', 'Olmoe'):
        keys |= dict(num_experts=c.n_expert, moe_intermediate_size=c.intermediate_size,
                     norm_topk_prob=c.norm_topk, decoder_sparse_step=1, mlp_only_layers=[])
    return keys, weights


def attention_keys(c):
    rope = rope_keys(c)
    keys = dict(
        hidden_size=c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
        intermediate_size=c.intermediate_size, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, hidden_act='silu', attention_bias=False,
        mlp_bias=getattr(c, 'mlp_bias', False),
        rope_theta=c.rope_theta, rope_parameters=rope | dict(rope_theta=c.rope_theta))
    if rope['rope_type'] != 'default':
        keys['rope_scaling'] = rope                             # as transformers 4 has it
    return keys


def rope_keys(c):
    """What is said of RoPE beside its base."""
    kind = getattr(c, 'rope_scaling', '')                       # a hybrid has none
    if not kind:
        return dict(rope_type='default')
    keys = dict(rope_type=kind, factor=c.rope_factor)
    if kind != 'linear':
        keys['original_max_position_embeddings'] = c.rope_length
    if kind == 'llama3':
        keys |= dict(low_freq_factor=c.rope_slow, high_freq_factor=c.rope_fast)
    if kind == 'yarn':
        keys |= dict(beta_slow=c.rope_slow, beta_fast=c.rope_fast, attention_factor=c.rope_amplitude)
    return keys


def with_zero_biases(weights, c):
    """Weights with those biases of attention that transformers cannot leave out beside the others."""
    rows = dict(q_proj=c.n_head, k_proj=c.n_kv_head, v_proj=c.n_kv_head)
    rows = {name: heads * c.head_dim for name, heads in rows.items()} | dict(o_proj=c.n_embd)
    zeros = {f'model.layers.{i}.self_attn.{name}.bias': torch.zeros(size)
             for i in range(c.n_layer) for name, size in rows.items()}
    return zeros | weights


def fused(weights, c):
    """Weights as Phi-3 has them: what reads the same input in one matrix, the numbers of a head that
    turn first."""
    order = turned_first(c.head_dim, c.rope_dim).argsort()
    fused = dict(weights)
    for i in range(c.n_layer):
        layer = f'model.layers.{i}.'
        q, k, v, gate, up = (fused.pop(f'{layer}{name}.weight') for name in (
            'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'mlp.gate_proj', 'mlp.up_proj'))
        q, k = (u.unflatten(0, (-1, c.head_dim))[:, order].flatten(0, 1) for u in (q, k))
        fused[f'{layer}self_attn.qkv_proj.weight'] = torch.cat((q, k, v))
        fused[f'{layer}mlp.gate_up_proj.weight'] = torch.cat((gate, up))
    return fused


def split_experts(weights, block, gate, up, down):
    """Our stacks of experts as a matrix each, which is how transformers' classes have them on the
    disk: in this block of a layer, and under these names."""
    split = {}
    for name, tensor in weights.items():
        layer, _, part = name.partition('.mlp.')
        experts = f'{layer}.{block}.experts'
        if part == 'experts.gate_up_proj':
            for e, gate_up in enumerate(tensor):                                # (2 I, D)
                gate_matrix, up_matrix = gate_up.chunk(2)
                split[f'{experts}.{e}.{gate}.weight'] = gate_matrix
                split[f'{experts}.{e}.{up}.weight'] = up_matrix
        elif part == 'experts.down_proj':
            for e, matrix in enumerate(tensor):                                 # (D, I)
                split[f'{experts}.{e}.{down}.weight'] = matrix
        elif part:
            split[f'{layer}.{block}.{part}'] = tensor
        else:
            split[name] = tensor
    return split
