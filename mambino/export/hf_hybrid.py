"""Our hybrids as the classes of transformers that compute the same, for to_hf.py.

    convert = class_of(net.config)          # None if there is none: then the modelling file it is
    keys, weights = convert(net.config, weights, attention_keys)

    FalconH1            SSM and attention side by side in each layer, then an MLP
    GraniteMoeHybrid    one of both, layer by layer, then an MLP; no experts
    Qwen3_5             Gated DeltaNet or attention, layer by layer, then an MLP

None scales its residual steps by channel, nor norms its embeddings: the scales go into the rows of
the matrices before them, the norm into the table of the embeddings, which is then no longer that of
the head.
"""
import torch

from mambino.weights.families.gpt import turned_first


def class_of(c):
    """The function that converts a hybrid of this config; None if no class computes the same."""
    if c.branch_norm or c.window or c.low_rank or c.layout != 'sequential':
        return None
    # its attention always norms queries and keys; its cache needs one layer of each kind
    if set(c.kinds) == {'a', 'd'} and c.qk_norm and c.rope_theta and c.delta_max == 1:
        return as_qwen3_5
    if c.qk_norm or c.rope_dim or c.attention_gate or c.version != 2:
        return None
    if set(c.kinds) == {'b'} and not c.gate and c.rope_theta:
        return as_falcon_h1
    # its cache needs a layer with attention, its inner width is a multiple of D
    of_its_width = c.ssm_inner_size == c.expand * c.n_embd
    if 'a' in c.kinds and set(c.kinds) <= {'a', 'm'} and c.gated_norm and of_its_width:
        return as_granite
    return None


def folded(c, weights, names):
    """The weights without scales and norm of embeddings, which go into others. names: {part of a
    name: theirs}."""
    share = 2 if set(c.kinds) == {'b'} else 1       # our layers take the mean of their branches
    result = {}
    for name, tensor in weights.items():
        layer = name.rpartition('.layers.')[2].partition('.')[0]
        if name.endswith(('residual_scale', 'embed_norm.weight')):
            continue
        if name.endswith(('out_proj.weight', 'o_proj.weight')):
            tensor = tensor * (weights[f'model.layers.{layer}.residual_scale'] / share)[:, None]
        elif name.endswith('down_proj.weight'):
            tensor = tensor * weights[f'model.layers.{layer}.mlp_residual_scale'][:, None]
        elif name == 'model.embed_tokens.weight' and c.embed_norm:
            rms = torch.rsqrt(tensor.square().mean(-1, keepdim=True) + c.norm_eps)
            tensor = tensor * rms * weights['model.embed_norm.weight']
        for part, theirs in names.items():
            name = name.replace(part, theirs)
        result[name] = tensor
    if c.tie_embeddings and c.embed_norm:
        result['lm_head.weight'] = weights['model.embed_tokens.weight']
    return result


def mamba_keys(c):
    return dict(
        tie_word_embeddings=c.tie_embeddings and not c.embed_norm,
        mamba_expand=c.expand, mamba_n_heads=c.ssm_inner_size // c.ssm_head_dim,
        mamba_d_head=c.ssm_head_dim, mamba_n_groups=c.n_groups, mamba_d_state=c.state_size, mamba_d_conv=c.conv_kernel,
        mamba_chunk_size=c.chunk_size, mamba_conv_bias=True, mamba_proj_bias=False)


def as_falcon_h1(c, weights, keys):
    multipliers = 'lm_head embedding key attention_in attention_out ssm_in ssm_out'.split()
    keys = keys | mamba_keys(c) | dict(
        architectures=['FalconH1ForCausalLM'], model_type='falcon_h1', mamba_d_ssm=c.ssm_inner_size,
        projectors_bias=False, mamba_rms_norm=c.gated_norm, mamba_norm_before_gate=False,
        mlp_multipliers=[1.0, 1.0], ssm_multipliers=[1.0] * 5)
    names = {
        '.mlp.': '.feed_forward.',
        '.pre_mlp_layernorm.': '.pre_ff_layernorm.',
        'model.norm.': 'model.final_layernorm.',
    }
    return keys | {f'{name}_multiplier': 1.0 for name in multipliers}, folded(c, weights, names)


def as_granite(c, weights, keys):
    letters = dict(m='linear_attention', a='full_attention')
    keys = keys | mamba_keys(c) | dict(
        architectures=['GraniteMoeHybridForCausalLM'], model_type='granitemoehybrid',
        num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=c.intermediate_size,
        layer_types=[letters[kind] for kind in c.kinds],
        position_embedding_type='rope' if c.rope_theta else 'nope',
        attention_multiplier=c.head_dim ** -0.5, embedding_multiplier=1.0, logits_scaling=1.0,
        residual_multiplier=1.0)
    if not c.rope_theta:
        del keys['rope_theta'], keys['rope_parameters']
    weights = folded(c, weights, {
        '.pre_mlp_layernorm.': '.post_attention_layernorm.',
        '.mlp.down_proj.': '.shared_mlp.output_linear.',
    })
    for name in [name for name in weights if name.endswith('.mlp.gate_proj.weight')]:
        prefix = name.removesuffix('.mlp.gate_proj.weight')
        gate_up = weights.pop(name), weights.pop(f'{prefix}.mlp.up_proj.weight')
        weights[f'{prefix}.shared_mlp.input_linear.weight'] = torch.cat(gate_up)
    return keys, weights


def as_qwen3_5(c, weights, keys):
    """Its attention is gated: without a gate here that of zeros halves what comes, and its last matrix is
    doubled. Its norms multiply by 1 + weight."""
    P = c.head_dim
    share = (c.rope_dim or P) / P
    keys = keys | dict(
        tie_word_embeddings=c.tie_embeddings and not c.embed_norm, partial_rotary_factor=share,
        architectures=['Qwen3_5ForCausalLM'], model_type='qwen3_5_text', linear_conv_kernel_dim=c.conv_kernel,
        linear_key_head_dim=c.state_size, linear_value_head_dim=c.ssm_head_dim, linear_num_key_heads=c.key_heads,
        linear_num_value_heads=c.ssm_inner_size // c.ssm_head_dim,
        layer_types=[dict(d='linear_attention', a='full_attention')[kind] for kind in c.kinds])
    keys['rope_parameters'] = keys['rope_parameters'] | dict(partial_rotary_factor=share)
    weights = folded(c, weights, {'.pre_mlp_layernorm.': '.post_attention_layernorm.', '.mamba.': '.linear_attn.'})
    order = turned_first(P, c.rope_dim or P).argsort()
    for name, tensor in list(weights.items()):
        if name.endswith(('.q_proj.weight', '.k_proj.weight', '.q_norm.weight', '.k_norm.weight')):
            tensor = weights[name] = tensor.unflatten(0, (-1, P))[:, order].flatten(0, 1)
        if name.endswith(('layernorm.weight', '.q_norm.weight', '.k_norm.weight')) or name == 'model.norm.weight':
            weights[name] = tensor - 1
        elif name.endswith('.q_proj.weight'):
            gate = weights.pop(name.replace('q_proj', 'g_proj'), torch.zeros_like(tensor))
            heads = tensor.unflatten(0, (-1, P)), gate.unflatten(0, (-1, P))    # (H, P, D) each
            weights[name] = torch.stack(heads, 1).flatten(0, 2)
        elif name.endswith('.o_proj.weight') and not c.attention_gate:
            weights[name] = 2 * tensor
        elif name.endswith('.in_proj.weight'):
            E, H = c.ssm_inner_size, c.ssm_inner_size // c.ssm_head_dim
            rows = weights.pop(name).split((E, E + 2 * c.key_heads * c.state_size, H, H))
            for part, of_part in zip(('z', 'qkv', 'b', 'a'), rows):
                weights[name.replace('in_proj', f'in_proj_{part}')] = of_part
    return keys, weights
