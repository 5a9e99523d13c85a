"""families/mamba.py: the original checkpoints of state-spaces/mamba give the numbers of Mamba-3's paper;
all else is refused in one line."""
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from helpers.models import V, assert_close, tokens

from mambino.weights import checkpoint
from mambino.weights import from_hf as hf
from mambino.weights.fitting import model_of_shapes
from model_mamba import Mamba, MambaConfig

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

# --- an original checkpoint, by its shapes alone ------------------------------------------------------

SSM = dict(layer='Mamba3', d_state=16, headdim=12, expand=2, chunk_size=64)
ORIGINALS = {           # d_model, ssm_cfg
    'siso': (36, SSM),
    'siso-groups-full': (24, dict(SSM, ngroups=2, rope_fraction=1.0, is_mimo=False, mimo_rank=4)),
    'siso-norm': (24, dict(SSM, is_outproj_norm=True, A_floor=1e-4)),
    'mimo': (24, dict(SSM, is_mimo=True)),
    'mimo-2-norm': (24, dict(SSM, is_mimo=True, mimo_rank=2, ngroups=2, is_outproj_norm=True,
                             fuse_pregate_headwise_norm=True)),
    'mimo-1': (24, dict(SSM, is_mimo=True, mimo_rank=1, ngroups=2)),
    'mimo-1-norm': (24, dict(SSM, is_mimo=True, mimo_rank=1, is_outproj_norm=True)),
}


def sizes(D, ssm):
    """E, H, P, N, G, R, A."""
    E, N, f = D * ssm['expand'], ssm['d_state'], ssm.get('rope_fraction', 0.5)
    R = ssm.get('mimo_rank', 4) if ssm.get('is_mimo') else 1
    return E, E // ssm['headdim'], ssm['headdim'], N, ssm.get('ngroups', 1), R, int(N * f) // 2


def layer_shapes(D, inner, ssm):
    """{name: shape} of one layer."""
    E, H, P, N, G, R, A = sizes(D, ssm)
    shapes = {
        'norm.weight': (D,), 'norm2.weight': (D,),
        'mlp.fc1.weight': (2 * inner, D), 'mlp.fc2.weight': (D, inner),
        'mixer.in_proj.weight': (2 * E + 2 * R * G * N + 3 * H + A, D),
        'mixer.out_proj.weight': (D, E), 'mixer.dt_bias': (H,), 'mixer.D': (H,),
        'mixer.B_bias': (H, R, N), 'mixer.C_bias': (H, R, N),
        'mixer.B_norm.weight': (N,), 'mixer.C_norm.weight': (N,)}
    if ssm.get('is_mimo'):
        shapes |= {f'mixer.mimo_{name}': (H, R, P) for name in 'xzo'}
    if ssm.get('is_outproj_norm'):
        shapes['mixer.norm.weight'] = (E,)
    return shapes


def original(D, ssm, n_layer=2, d_intermediate=100, vocab_size=V - 3):
    """→ config.json, {name: bf16 tensor} as MambaLMHeadModel.save_pretrained has them."""
    inner, rows = -(-d_intermediate // 128) * 128, -(-vocab_size // 8) * 8
    shapes = {'backbone.embedding.weight': (rows, D), 'backbone.norm_f.weight': (D,)}
    for i in range(n_layer):
        for name, shape in layer_shapes(D, inner, ssm).items():
            shapes[f'backbone.layers.{i}.{name}'] = shape
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape) * (0.5 if len(shape) == 2 else 0.2)
        if '_proj' in name:
            value *= shape[-1] ** -0.5
        is_scale = 'norm' in name or 'bias' in name or 'mimo' in name or name.endswith('.D')
        weights[name] = (value + is_scale).bfloat16()
    weights['lm_head.weight'] = weights['backbone.embedding.weight']
    config = dict(d_model=D, n_layer=n_layer, d_intermediate=d_intermediate, vocab_size=vocab_size,
                  ssm_cfg=ssm, attn_layer_idx=[], attn_cfg={}, rms_norm=True, residual_in_fp32=True,
                  fused_add_norm=True, pad_vocab_size_multiple=8, tie_embeddings=True)
    return config, weights


def save(folder, config, weights):
    (folder / 'config.json').write_text(json.dumps(config))
    torch.save(weights, folder / 'pytorch_model.bin')


# --- the same model, plainly, in float64 -----------------------------------------------------------------------------

def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def turning(angles, N, is_mimo):
    """(N, N): turns pairs of channels by angles (A,)."""
    R = torch.eye(N, dtype=torch.float64)
    for i, angle in enumerate(angles.tolist()):
        a, b = (i, i + N // 2) if is_mimo else (2 * i, 2 * i + 1)
        R[a, a] = R[b, b] = math.cos(angle)
        R[a, b], R[b, a] = -math.sin(angle), math.sin(angle)
    return R


def mixed(u, w, ssm):
    """A mixer on u (T, D), one token and head after another: the state itself turns, by -δ."""
    E, H, P, N, G, R, A = sizes(u.shape[1], ssm)
    is_mimo = bool(ssm.get('is_mimo'))
    ones = torch.ones(H, R, P, dtype=torch.float64)
    mimo_x, mimo_z, mimo_o = (w.get(f'mimo_{name}', ones) for name in 'xzo')
    h = torch.zeros(H, P, N, dtype=torch.float64)
    before = torch.zeros(H, P, N, dtype=torch.float64)          # x bᵀ of the last token
    out = []
    for row in u @ w['in_proj.weight'].T:
        z, x, B, C, dt, v, trap, angles = row.split([E, E, R * G * N, R * G * N, H, H, H, A])
        dt = F.softplus(dt + w['dt_bias'])
        A_ = -torch.where(v >= 0, 1 + v, 1 / (1 - v.clamp(max=0))).clamp(min=1e-4)
        trap, rate = torch.sigmoid(trap), math.pi * torch.tanh(angles)
        B = norm(B.view(R, G, N), w['B_norm.weight'])
        C = norm(C.view(R, G, N), w['C_norm.weight'])
        y = torch.zeros(H, P, dtype=torch.float64)
        for head in range(H):
            b = B[:, head // (H // G)] + w['B_bias'][head]      # (R, N)
            c = C[:, head // (H // G)] + w['C_bias'][head]
            xs = x.view(H, P)[head] * mimo_x[head]              # (R, P)
            turn = turning(-rate * dt[head], N, is_mimo).T
            decay = torch.exp(dt[head] * A_[head])
            now = xs.T @ b                                      # (P, N)
            h[head] = decay * (h[head] + (1 - trap[head]) * dt[head] * before[head]) @ turn
            h[head] += trap[head] * dt[head] * now
            before[head] = now
            ys = c @ h[head].T + w['D'][head] * xs              # (R, P)
            if 'norm.weight' in w:
                ys = norm(ys, w['norm.weight'].view(H, P)[head])
            y[head] = (mimo_o[head] * ys * F.silu(z.view(H, P)[head] * mimo_z[head])).sum(0)
        out.append(y.flatten())
    return torch.stack(out) @ w['out_proj.weight'].T


def plain_logits(config, weights, ids):
    """(T,) → (T, rows of the embedding), float64."""
    weights = {name: value.double() for name, value in weights.items()}
    x = weights['backbone.embedding.weight'][ids]
    for i in range(config['n_layer']):
        w = {name.removeprefix(f'backbone.layers.{i}.'): value for name, value in weights.items()}
        mixer = {name[6:]: value for name, value in w.items() if name.startswith('mixer.')}
        x = x + mixed(norm(x, w['norm.weight']), mixer, config['ssm_cfg'])
        value, gate = (norm(x, w['norm2.weight']) @ w['mlp.fc1.weight'].T).chunk(2, -1)
        x = x + (value * F.silu(gate)) @ w['mlp.fc2.weight'].T
    return norm(x, weights['backbone.norm_f.weight']) @ weights['lm_head.weight'].T


@torch.no_grad()
@pytest.mark.parametrize('name', ORIGINALS)
def test_an_original_computes_the_papers_recurrence(name, tmp_path, capsys):
    config, weights = original(*ORIGINALS[name])
    save(tmp_path, config, weights)
    for _ in range(2):
        kind, ours, loaded, _ = hf.load_hf(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and '"A_activation": "heavy_tail"' in said[0] and 'softplus' in said[0]
    net = checkpoint.build(kind, ours).eval()
    net.load_state_dict(loaded)
    assert (ours['version'], ours['intermediate_size'], ours['vocab_size']) == (3, 128, 96)
    ids = tokens(21) % 96
    want = plain_logits(config, weights, ids)
    assert want.std() > 0.3
    assert_close(net(ids[None])[0][0].double(), want, 1e-5 * want.abs().max().item())


def test_the_published_sizes():
    """187m of the paper's table, and the same as MIMO, with 128,256 ids; nothing of it is in memory."""
    ssm = dict(layer='Mamba3', d_state=128, headdim=64, expand=2)
    mimo = dict(is_mimo=True, mimo_rank=4)
    for more, inner, count in (({}, 1500, 186_849_600), (mimo, 1264, 187_291_968)):
        theirs = dict(d_model=768, n_layer=12, d_intermediate=inner, vocab_size=128_256,
                      ssm_cfg=ssm | more)
        net = model_of_shapes(*hf.to_ours(theirs))
        assert net.num_params() == count


@torch.no_grad()
def test_an_original_of_mamba2_with_an_mlp(tmp_path):
    """The MLP has the value before the gate, whatever the mixer."""
    net = Mamba(MambaConfig(version=2, n_layer=1, n_embd=24, head_dim=12, state_size=16,
                            vocab_size=96, intermediate_size=128)).eval()
    weights = dict(net.state_dict())
    weights['backbone.embedding.weight'] = weights.pop('backbone.embeddings.weight')
    prefix = 'backbone.layers.0.mlp.'
    gate, up, down = (weights.pop(f'{prefix}{name}_proj.weight') for name in ('gate', 'up', 'down'))
    weights |= {prefix + 'fc1.weight': torch.cat((up, gate)), prefix + 'fc2.weight': down}
    save(tmp_path, dict(d_model=24, n_layer=1, d_intermediate=99, vocab_size=96,
                        ssm_cfg=dict(layer='Mamba2', d_state=16, headdim=12)), weights)
    kind, ours, loaded, _ = hf.load_hf(tmp_path)
    again = checkpoint.build(kind, ours).eval()
    again.load_state_dict(loaded)
    idx = tokens(2, 30) % 96
    assert torch.equal(again(idx)[0], net(idx)[0])


class Harmful:
    def __reduce__(self):
        return os.system, ('touch harm',)


def refusal(folder, capsys):
    with pytest.raises(SystemExit):
        hf.load_hf(folder)
    line = capsys.readouterr().err
    assert line.count('\n') == 1
    return line


@pytest.mark.parametrize('ssm, change, words', [
    (dict(A_floor=1e-3), {}, ['A_floor=0.001', 'at most -1e-4']),
    (dict(A_activation='softplus'), {}, ['A_activation="softplus"', '1 / (1 - v)', 'June 2026']),
    (dict(is_mimo=1.5), {}, ['is_mimo=1.5', 'true or false']),
    (dict(d_state=15), {}, ['state_size=15 must be even']),
    (dict(taps=3), {}, ['ssm_cfg.taps=3', 'no setting of a Mamba-3']),
    (dict(layer='Mamba4'), {}, ['ssm_cfg.layer="Mamba4"', 'Mamba1, Mamba2, Mamba3']),
    ({}, dict(attn_layer_idx=[1]), ['attn_layer_idx=[1]', 'no layers of attention']),
    ({}, dict(rms_norm=False), ['rms_norm=false', 'RMSNorm']),
    ({}, dict(d_intermediate=300), ['up_proj.weight has shape (128, 24)', 'be (384, 24)']),
    ({}, dict(model_type='mamba3'), ['model_type="mamba3"', 'flash-linear-attention', 'softplus']),
])
def test_an_original_that_is_refused(ssm, change, words, tmp_path, capsys):
    config, weights = original(24, dict(SSM, A_activation='heavy_tail'))
    save(tmp_path, {**config, 'ssm_cfg': config['ssm_cfg'] | ssm, **change}, weights)
    line = refusal(tmp_path, capsys)
    assert all(word in line for word in words), line


def test_weights_of_an_original_that_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, weights = original(24, dict(SSM, is_mimo=True, mimo_rank=1, A_activation='heavy_tail'))
    save(tmp_path, config, weights | {'more': Harmful()})
    assert 'holds more than tensors (posix.system), and could run code; nothing of it' in refusal(tmp_path, capsys)
    assert not os.path.exists('harm')
    # folding a MIMO of rank 1 meets what is missing or misshapen first
    prefix = 'backbone.layers.1.mixer.'
    for name, shape in (('mimo_x', 5), ('B_bias', 2), ('in_proj.weight', (3, 3)), ('B_norm.weight', 7)):
        save(tmp_path, config, weights | {prefix + name: torch.ones(shape)})
        assert str(tmp_path) in refusal(tmp_path, capsys)
        save(tmp_path, config, {key: u for key, u in weights.items() if key != prefix + name})
        assert str(tmp_path) in refusal(tmp_path, capsys)
