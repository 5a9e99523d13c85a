"""Our models in llama.cpp's terms. It has no models of its own design, only those of others; ours are
written as those that compute the same:

    GPT      llama, also with experts; qwen3, qwen3moe with QK-norm; mimo2 with a sliding window
    Mamba    mamba, mamba2; of a Mamba-3, and of an MLP after each mixer, it has nothing
    hybrid   falcon-h1: SSM and attention side by side, then an MLP; granitehybrid: one of both in
             each layer; scales and the embedding's norm are folded into weights

    model = to_llama_cpp(net)       # its architecture, settings, tensors; ValueError if there is none

Letters of the shapes: D model width, E inner width, H heads, P head size, N state size, G groups, K
taps of the convolution, I inner width of an MLP, V vocabulary.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn

from mambino.export.classes import check_classes, check_modules, look_up, look_up_alike
from mambino.language_model import Gate, SwiGLU
from model_gpt import GPT, MoE
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
    q, k = matrix(attention.q_proj), matrix(attention.k_proj)
    if rope_in_pairs:
        q, k = in_pairs(q, attention.head_dim), in_pairs(k, attention.head_dim)
    yield prefix + 'attn_q.weight', q
    yield prefix + 'attn_k.weight', k
    yield prefix + 'attn_v.weight', matrix(attention.v_proj)
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


def gpt_architecture(c, window):
    if c.qk_norm:
        return 'qwen3moe' if c.n_expert else 'qwen3'
    return 'mimo2' if window and not c.n_expert else 'llama'


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
                'else')
    if c.n_expert:
        settings |= {
            'expert_count': c.n_expert,
            'expert_used_count': c.n_expert_active,
            'expert_feed_forward_length': c.intermediate_size,
        }
    mlp_tensors = look_up_alike(MLPS, [layer.mlp for layer in net.model.layers], TOOL)

    def tensors():
        yield from outer_tensors(net, net.model.norm, untied=architecture == 'mimo2')
        for i, layer in enumerate(net.model.layers):
            prefix = f'blk.{i}.'
            yield prefix + 'attn_norm.weight', layer.input_layernorm.weight
            yield from attention_tensors(prefix, layer.self_attn, architecture == 'llama')
            yield prefix + 'attn_output.weight', layer.self_attn.o_proj.weight
            yield prefix + 'ffn_norm.weight', layer.post_attention_layernorm.weight
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
    alternates = 'a' in c.kinds and 'b' not in c.kinds
    lacking = {
        f'layout={c.layout}': c.layout != 'sequential',
        'gate=True': c.gate and not alternates,
        'branch_norm=True': c.branch_norm,
        'qk_norm=True': c.qk_norm,
        f'window={c.window}': window_of(c),
        f'layers={c.layers}': not alternates and set(c.kinds) != {'b'},
        'rope_theta=0': not c.rope_theta and not alternates,
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
