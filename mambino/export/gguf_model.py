"""Our models in llama.cpp's terms. It has no models of its own design, only those of others; ours are
written as those that compute the same:

    GPT      llama, also with experts; qwen3, qwen3moe with QK-norm; mimo2 with a sliding window;
             qwen2, olmo2, olmoe, smollm3
    Mamba    mamba, mamba2; of a Mamba-3, and of an MLP after each mixer, it has nothing
    hybrid   falcon-h1: SSM and attention side by side, then an MLP; granitehybrid: one of both in
             each layer; scales and the embedding's norm are folded into weights

    model = to_llama_cpp(net)       # its architecture, settings, tensors; ValueError if there is none

Letters of the shapes: D model width, E inner width, H heads, P head size, N state size, G groups, K
taps of the convolution, I inner width of an MLP, V vocabulary.
"""
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn

from mambino.export.classes import check_classes, check_modules, look_up, look_up_alike
from mambino.export.peers import Peer, features, peer_of
from mambino.language_model import Gate, SwiGLU
from model_gpt import GPT, Layer, MoE, NormAfterLayer, rope_frequencies
from model_hybrid import Hybrid, LowRank
from model_mamba import Mamba, Mamba1Mixer, Mamba2Mixer, Mamba3Mixer

TOOL = 'llama.cpp'
ANY_LENGTH = 1 << 20     # the context that its converter writes for a Mamba; its server stops at what is said there


class LlamaCpp(NamedTuple):
    """A model in llama.cpp's terms."""
    architecture: str
    settings: dict          # without the architecture in front of their names
    tensors: Callable       # () → (name, tensor), one after another
    note: str = ''          # what its user should know


# --- our parts in llama.cpp's terms ---------------------------------------------------------------

def full_matrix(linear):
    return linear.weight


def low_rank_matrix(linear):
    return linear.up.weight @ linear.down.weight


MATRICES = {nn.Linear: full_matrix, LowRank: low_rank_matrix}


def matrix(linear):
    """The weight of a projection, multiplied out where it is the product of two thin ones."""
    return look_up(MATRICES, linear, TOOL)(linear)


def in_pairs(weight, P):
    """Rows of heads of P (H P, D) from our order of rotary pairs, (i, i + P/2), to (2i, 2i + 1),
    llama.cpp's `normal` one."""
    return weight.unflatten(0, (-1, 2, P // 2)).transpose(1, 2).flatten(0, 2)


def attention_tensors(prefix, attention, rope_in_pairs):
    def ordered(rows):
        return in_pairs(rows, attention.head_dim) if rope_in_pairs else rows
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    yield prefix + 'attn_q.weight', ordered(matrix(q))
    yield prefix + 'attn_k.weight', ordered(matrix(k))
    yield prefix + 'attn_v.weight', matrix(v)
    if getattr(q, 'bias', None) is not None:                    # a thin product has none
        yield prefix + 'attn_q.bias', ordered(q.bias)
        yield prefix + 'attn_k.bias', ordered(k.bias)
        yield prefix + 'attn_v.bias', v.bias
    if attention.qk_norm:
        yield prefix + 'attn_q_norm.weight', attention.q_norm.weight
        yield prefix + 'attn_k_norm.weight', attention.k_norm.weight


def mamba2_tensors(prefix, mixer):
    yield prefix + 'ssm_in.weight', matrix(mixer.in_proj)
    yield prefix + 'ssm_conv1d.weight', mixer.conv1d.weight[:, 0]               # (E + 2GN, K)
    yield prefix + 'ssm_conv1d.bias', mixer.conv1d.bias
    yield prefix + 'ssm_dt.bias', mixer.dt_bias
    yield prefix + 'ssm_a', -torch.exp(mixer.A_log)[:, None]                    # (H, 1)
    yield prefix + 'ssm_d', mixer.D[:, None]
    if type(mixer.norm) is not Gate:
        yield prefix + 'ssm_norm.weight', mixer.norm.weight.view(mixer.groups, -1)  # (G, E/G)


def mamba1_tensors(prefix, mixer):
    yield prefix + 'ssm_in.weight', matrix(mixer.in_proj)
    yield prefix + 'ssm_conv1d.weight', mixer.conv1d.weight[:, 0]               # (E, K)
    yield prefix + 'ssm_conv1d.bias', mixer.conv1d.bias
    yield prefix + 'ssm_x.weight', matrix(mixer.x_proj)
    yield prefix + 'ssm_dt.weight', mixer.dt_proj.weight
    yield prefix + 'ssm_dt.bias', mixer.dt_proj.bias
    yield prefix + 'ssm_a', -torch.exp(mixer.A_log)                             # (E, N)
    yield prefix + 'ssm_d', mixer.D


def swiglu_tensors(prefix, mlp):
    yield prefix + 'ffn_gate.weight', matrix(mlp.gate_proj)
    yield prefix + 'ffn_up.weight', matrix(mlp.up_proj)
    if getattr(mlp.gate_proj, 'bias', None) is not None:
        yield prefix + 'ffn_gate.bias', mlp.gate_proj.bias
        yield prefix + 'ffn_up.bias', mlp.up_proj.bias
        yield prefix + 'ffn_down.bias', mlp.down_proj.bias


def moe_tensors(prefix, moe):
    gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)  # (experts, I, D) each
    yield prefix + 'ffn_gate_inp.weight', moe.gate.weight
    yield prefix + 'ffn_gate_exps.weight', gate
    yield prefix + 'ffn_up_exps.weight', up
    yield prefix + 'ffn_down_exps.weight', moe.experts.down_proj


MLPS = {SwiGLU: swiglu_tensors, MoE: moe_tensors}


def outer_tensors(net, norm, untied=False):
    """The tensors outside the layers."""
    yield 'token_embd.weight', net.embedding().weight
    yield 'output_norm.weight', norm.weight
    if untied or net.lm_head.weight is not net.embedding().weight:
        yield 'output.weight', net.lm_head.weight


# --- our models in llama.cpp's terms --------------------------------------------------------------

def to_llama_cpp(net):
    """→ LlamaCpp. ValueError if llama.cpp has no model that computes the same."""
    check_modules(net, TOOL)
    return look_up(CONVERT, net, TOOL)(net)


def window_of(config):
    """The sliding window; 0 if there is none, or none that a sequence of block_size tokens
    notices."""
    return config.window if config.window < config.block_size else 0


def attention_settings(c):
    return {
        'block_count': c.n_layer,
        'context_length': max(c.block_size, c.window),  # attention sees all of it
        'embedding_length': c.n_embd,
        'vocab_size': c.vocab_size,
        'feed_forward_length': c.intermediate_size,
        'attention.layer_norm_rms_epsilon': float(c.norm_eps),
        'attention.head_count': c.n_head,
        'attention.head_count_kv': c.n_kv_head,
        'attention.key_length': c.head_dim,
        'attention.value_length': c.head_dim,
        'rope.dimension_count': c.head_dim,
        'rope.freq_base': float(c.rope_theta),
    }


def ssm_settings(c, inner, rank):
    return {
        'ssm.conv_kernel': c.conv_kernel,
        'ssm.inner_size': inner,
        'ssm.state_size': c.state_size,
        'ssm.time_step_rank': rank,
    }


# by llama.cpp's name: what of a GPT its models have. Of RoPE, llama alone has any frequencies
ARCHITECTURES = (
    Peer('qwen2', '', 'qkv_bias', 'rope_scaling'),
    Peer('llama', '', '', 'qkv_bias o_bias mlp_bias rope_scaling rope_amplitude rope_dim n_expert'),
    Peer('qwen3', '', 'qk_norm', 'rope_scaling'),
    Peer('qwen3moe', '', 'qk_norm n_expert', 'rope_scaling'),
    Peer('olmo2', '', 'norm_after qk_norm qk_norm_whole', 'rope_scaling'),
    Peer('olmoe', '', 'qk_norm qk_norm_whole n_expert norm_topk=False', 'rope_scaling'),
    Peer('smollm3', '', 'rope_layers', ''),
)
IN_PAIRS = 'llama', 'smollm3'       # rotary pairs are neighbours there
NORMS = {   # of a layer: their names there
    Layer: dict(input_layernorm='attn_norm', post_attention_layernorm='ffn_norm'),
    NormAfterLayer: dict(post_attention_layernorm='post_attention_norm',
                         post_feedforward_layernorm='post_ffw_norm'),
}


def gpt_architecture(c, window):
    if window and features(c) == {'window'}:
        return 'mimo2'
    if c.rope_scaling == 'llama3' and not features(c) - {'window', 'qkv_bias', 'rope_scaling'}:
        return 'llama'
    name = peer_of(c, ARCHITECTURES, TOOL, but=['window']).name
    if name == 'smollm3' and c.rope_layers != '1110':
        raise ValueError(f'{TOOL} leaves RoPE out in each fourth layer (arch smollm3), not by '
                         f'rope_layers={c.rope_layers}; --format=hf takes any')
    if name == 'olmoe' and c.n_kv_head != c.n_head:
        raise ValueError(f'{TOOL} has as many key heads as heads in such a model (arch olmoe), not '
                         f'n_kv_head={c.n_kv_head}; --format=hf takes any')
    if name != 'llama' and c.rope_scaling == 'llama3':
        raise ValueError(f'{TOOL} has no rope_scaling=llama3 in such a model (arch {name}); '
                         '--format=hf takes it')
    return name


def rope_settings(c):
    """How llama.cpp stretches RoPE by itself, where it has no table of frequencies."""
    settings = {'rope.scaling.type': c.rope_scaling, 'rope.scaling.factor': float(c.rope_factor)}
    if c.rope_scaling == 'yarn':
        grown = 0.1 * math.log(c.rope_factor) + 1       # by so much it raises cos and sin itself
        settings |= {
            'rope.scaling.original_context_length': c.rope_length,
            'rope.scaling.attn_factor': float(c.rope_amplitude / grown),
            'rope.scaling.yarn_beta_fast': float(c.rope_fast),
            'rope.scaling.yarn_beta_slow': float(c.rope_slow),
        }
    return settings


def rope_factors(c):
    """By how much longer each pair (P/2) takes for a turn than theta^(-2i/P) says; what does not turn
    takes long."""
    plain = rope_frequencies(replace(c, rope_scaling='', rope_dim=0))
    return plain / rope_frequencies(c).clamp(min=1e-30)


def convert_gpt(net):
    c = net.config
    window = window_of(c)
    architecture = gpt_architecture(c, window)
    settings = attention_settings(c)
    note = ''
    if architecture == 'mimo2':
        settings |= {
            'context_length': ANY_LENGTH,       # beyond the window nothing is seen
            'attention.sliding_window': window,
            'attention.sliding_window_pattern': [1] * c.n_layer,
            'rope.freq_base_swa': float(c.rope_theta),
            'expert_feed_forward_length': 0,
        }
    elif window:
        settings['context_length'] = window
        note = (f'llama.cpp has sliding windows for no such model (arch {architecture}), so its '
                f'context ends at the window of {window} tokens; beyond, it would compute something '
                'else' + (' (one that is trained with --qk_norm=False goes on)' if architecture == 'qwen3' else ''))
    if c.n_expert:
        settings |= {
            'expert_count': c.n_expert,
            'expert_used_count': c.n_expert_active,
            'expert_feed_forward_length': c.intermediate_size,
        }
    has_table = architecture == 'llama' and bool(c.rope_scaling or c.rope_dim)
    if has_table or c.rope_amplitude != 1:
        settings['rope.scaling.attn_factor'] = float(c.rope_amplitude)
    if c.rope_scaling and not has_table:
        settings |= rope_settings(c)
    mlp_tensors = look_up_alike(MLPS, [layer.mlp for layer in net.model.layers], TOOL)
    norms = look_up_alike(NORMS, list(net.model.layers), TOOL)

    def tensors():
        yield from outer_tensors(net, net.model.norm, untied=architecture == 'mimo2')
        if has_table:
            yield 'rope_freqs.weight', rope_factors(c)
        for i, layer in enumerate(net.model.layers):
            prefix = f'blk.{i}.'
            for ours, theirs in norms.items():
                yield f'{prefix}{theirs}.weight', getattr(layer, ours).weight
            yield from attention_tensors(prefix, layer.self_attn, architecture in IN_PAIRS)
            yield prefix + 'attn_output.weight', layer.self_attn.o_proj.weight
            if c.o_bias:
                yield prefix + 'attn_output.bias', layer.self_attn.o_proj.bias
            yield from mlp_tensors(prefix, layer.mlp)
            if not c.n_expert:
                yield prefix + 'ffn_down.weight', layer.mlp.down_proj.weight
    return LlamaCpp(architecture, settings, tensors, note)


def mamba1_settings(c):
    """→ (architecture, settings of its mixers)."""
    if c.expand != 2:
        raise ValueError(f'llama.cpp computes Mamba-1 only with expand=2, not {c.expand}; --format=hf '
                         'takes any')
    settings = ssm_settings(c, c.inner_size, c.time_step_rank)
    if not c.part_norm_eps:
        return 'mamba', settings
    if c.part_norm_eps != c.norm_eps:
        raise ValueError(f'llama.cpp norms dt, B and C with the eps of all norms, {c.norm_eps}, and this model with '
                         f'{c.part_norm_eps}; --format=hf takes both')
    return 'mamba', settings | {'ssm.dt_b_c_rms': True}


def mamba2_settings(c):
    if not c.gated_norm:
        raise ValueError('llama.cpp has no Mamba-2 without the norm after its gate')
    inner = c.inner_size
    return 'mamba2', ssm_settings(c, inner, inner // c.head_dim) | {'ssm.group_count': c.n_groups}


def mamba3_settings(c):
    raise ValueError('llama.cpp has no Mamba-3; --format=hf writes one with its own modelling file, '
                     '--format=onnx for onnxruntime')


def convert_mamba(net):
    c = net.config
    mixers = [block.mixer for block in net.backbone.layers]
    mixer_settings, mixer_tensors = look_up_alike(MAMBA_MIXERS, mixers, TOOL)
    architecture, own_settings = mixer_settings(c)
    if c.intermediate_size:
        raise ValueError('llama.cpp has no MLP after the mixers of a Mamba, this one has, of '
                         f'intermediate_size={c.intermediate_size}; --format=onnx takes it')
    settings = {
        'block_count': c.n_layer,
        'context_length': ANY_LENGTH,           # its state does not grow
        'embedding_length': c.n_embd,
        'vocab_size': c.vocab_size,
        'feed_forward_length': 0,
        'attention.head_count': 0,
        'attention.layer_norm_rms_epsilon': float(c.norm_eps),
    }

    def tensors():
        yield from outer_tensors(net, net.backbone.norm_f)
        for i, block in enumerate(net.backbone.layers):
            prefix = f'blk.{i}.'
            yield prefix + 'attn_norm.weight', block.norm.weight
            yield from mixer_tensors(prefix, block.mixer)
            yield prefix + 'ssm_out.weight', matrix(block.mixer.out_proj)
    return LlamaCpp(architecture, settings | own_settings, tensors)


def convert_hybrid(net):
    """FalconH1, or Granite's hybrid where each layer has one branch, if branches are only added up:
    then their scale is one of the rows of their last matrices."""
    c = net.config
    if 'd' in c.kinds:
        raise ValueError(f'layers={c.layers}: Gated DeltaNet is not written for llama.cpp; --format=hf, onnx and '
                         'torchscript take it')
    alternates = 'a' in c.kinds and 'b' not in c.kinds
    lacking = {
        f'layout={c.layout}': c.layout != 'sequential',
        'gate=True': c.gate and not alternates,
        'branch_norm=True': c.branch_norm,
        'qk_norm=True': c.qk_norm,
        'attention_gate=True': c.attention_gate,
        f'window={c.window}': window_of(c),
        f'layers={c.layers}': not alternates and set(c.kinds) != {'b'},
        'rope_theta=0': not c.rope_theta and not alternates,
        f'rope_dim={c.rope_dim}': c.rope_dim,
        'gated_norm=False and one branch a layer': alternates and 'm' in c.kinds and not c.gated_norm,
    }
    if any(lacking.values()):
        names = ', '.join(name for name, is_there in lacking.items() if is_there)
        raise ValueError(f'llama.cpp has no hybrid with {names}; --format=hf writes this one with its '
                         'own modelling file')
    layers = net.model.layers
    check_classes([layer.mamba for layer in layers if layer.mamba is not None], {Mamba2Mixer}, TOOL)
    check_classes([layer.mlp for layer in layers], {SwiGLU}, TOOL)
    inner = c.ssm_inner_size
    settings = attention_settings(c) | ssm_settings(c, inner, inner // c.ssm_head_dim)
    settings['ssm.group_count'] = c.n_groups
    if alternates:
        settings['attention.head_count_kv'] = [c.n_kv_head * (kind == 'a') for kind in c.kinds]
        settings['rope.freq_base'] = float(c.rope_theta or 1e4)
        settings['rope.scaling.finetuned'] = c.rope_theta > 0               # where False, it turns none

    def tensors():
        for name, tensor in outer_tensors(net, net.model.norm, untied=True):
            is_normed = name == 'token_embd.weight' and c.embed_norm
            yield name, net.model.embed_norm(tensor) if is_normed else tensor
        for i, layer in enumerate(layers):
            prefix = f'blk.{i}.'
            scale = layer.residual_scale[:, None] / (1 if alternates else 2)
            mlp_scale = layer.mlp_residual_scale[:, None]
            yield prefix + 'attn_norm.weight', layer.input_layernorm.weight
            if layer.self_attn is not None:
                yield from attention_tensors(prefix, layer.self_attn, alternates)
                yield prefix + 'attn_output.weight', scale * matrix(layer.self_attn.o_proj)
            if layer.mamba is not None:
                yield from mamba2_tensors(prefix, layer.mamba)
                yield prefix + 'ssm_out.weight', scale * matrix(layer.mamba.out_proj)
            # in FalconH1 without .weight: so llama.cpp calls it there
            yield prefix + 'ffn_norm' + '.weight' * alternates, layer.pre_mlp_layernorm.weight
            yield from swiglu_tensors(prefix, layer.mlp)
            yield prefix + 'ffn_down.weight', mlp_scale * matrix(layer.mlp.down_proj)
    return LlamaCpp('granitehybrid' if alternates else 'falcon-h1', settings, tensors)


CONVERT = {GPT: convert_gpt, Mamba: convert_mamba, Hybrid: convert_hybrid}
MAMBA_MIXERS = {
    Mamba1Mixer: (mamba1_settings, mamba1_tensors),
    Mamba2Mixer: (mamba2_settings, mamba2_tensors),
    Mamba3Mixer: (mamba3_settings, None),
}
