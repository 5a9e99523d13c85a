"""Which of another tool's models computes what a GPT of ours does.

    PEERS = (Peer('Qwen2', 'qwen2', 'qkv_bias', 'window rope_scaling'), …)
    peer = peer_of(net.config, PEERS, 'transformers')       # ValueError if there is none
"""
from typing import NamedTuple

PLAIN = ('window', 'qkv_bias', 'o_bias', 'mlp_bias', 'rope_scaling', 'qk_norm', 'qk_norm_whole',
         'norm_after', 'attention_gate', 'n_expert')      # fields that are 0, False or '' of a plain Llama


class Peer(NamedTuple):
    """A model of another tool, by what of a GPT it always has, and what it may have."""
    name: str
    model_type: str
    has: str
    may: str


def features(c):
    """The names of what a GPT of this config has beside a plain Llama."""
    names = {name for name in PLAIN if getattr(c, name)}
    if '0' in c.rope_layers[:c.n_layer]:
        names.add('rope_layers')
    if 0 < c.rope_dim < c.head_dim:
        names.add('rope_dim')
    if c.rope_amplitude != 1 and c.rope_scaling != 'yarn':
        names.add('rope_amplitude')
    if c.n_expert and not c.norm_topk:
        names.add('norm_topk=False')
    return names


def peer_of(c, peers, tool, but=()):
    """The first of the peers that computes what a GPT of this config does, but for some features.
    ValueError if there is none."""
    names = features(c) - set(but)
    for peer in peers:
        has, may = set(peer.has.split()), set(peer.may.split())
        if has <= names <= has | may:
            return peer
    raise ValueError(f'{tool} has no model with {", ".join(sorted(names))} together; '
                     '--format=native keeps it as it is')
