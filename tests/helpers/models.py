"""Small models of every kind, the models of transformers they equal, and how closely tensors must agree."""
import math

import pytest
import torch

from model_gpt import GPT, GPTConfig
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, MambaConfig

V, WINDOW = 97, 20
GPT_SIZE = dict(n_layer=2, n_embd=32, n_head=4)
SSM_SIZE = dict(n_layer=2, n_embd=32, state_size=8, chunk_size=16)
HYBRID_SIZE = dict(**GPT_SIZE, state_size=8, ssm_head_dim=16, chunk_size=16, window=WINDOW)
CONFIG = {GPT: GPTConfig, Mamba: MambaConfig, Hybrid: HybridConfig}
MODELS = {
    "gpt": (GPT, GPT_SIZE),
    "gpt-gqa-window": (GPT, dict(GPT_SIZE, n_kv_head=2, window=WINDOW)),
    "gpt-qknorm-untied": (GPT, dict(GPT_SIZE, n_kv_head=1, head_dim=16, qk_norm=True, tie_embeddings=False)),
    # with fewer active ones bf16 would choose others
    "gpt-experts": (GPT, dict(GPT_SIZE, n_expert=8, n_expert_active=4, intermediate_size=16)),
    "mamba1": (Mamba, dict(SSM_SIZE, version=1)),
    "mamba2": (Mamba, dict(SSM_SIZE, head_dim=16)),
    "mamba2-groups-untied": (Mamba, dict(SSM_SIZE, head_dim=8, n_groups=2, tie_embeddings=False)),
    "mamba3": (Mamba, dict(SSM_SIZE, version=3, head_dim=16)),
    "mamba3-mimo": (Mamba, dict(SSM_SIZE, version=3, head_dim=16, mimo_rank=2, n_groups=2, head_norm=True,
                                intermediate_size=48)),
    "hybrid": (Hybrid, HYBRID_SIZE),
    "hybrid-parallel": (Hybrid, dict(HYBRID_SIZE, layout="parallel", n_kv_head=2, qk_norm=True, n_groups=2)),
    "hybrid-plain-full": (Hybrid, dict(HYBRID_SIZE, gate=False, branch_norm=False, window=0)),
    "hybrid-low-rank": (Hybrid, dict(HYBRID_SIZE, low_rank=8, tie_embeddings=False)),
    "hybrid-pattern": (Hybrid, dict(HYBRID_SIZE, layers="ma", embed_norm=False, gated_norm=False, ssm_inner_size=48)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name, **changes):
    cls, settings = MODELS[name]
    return cls(CONFIG[cls](**{"vocab_size": V, **settings, **changes})).eval()


@torch.no_grad()
def perturb(model, std=0.1):
    for p in model.parameters():
        p.add_(torch.randn_like(p) * std)
    return model


def tokens(*shape):
    return torch.randint(V, shape)


def assert_close(got, want, tolerance=1e-4):
    error = (got - want).abs().max().item()
    assert got.shape == want.shape and error <= tolerance, f"differs by {error:.2g}"  # also fails on NaN


def assert_same(run, reference, inputs, through=None):
    """run in fp32 and reference in float64: outputs, and gradients of all inputs, differ by 1e-5 of
    their largest value. through: index of the output that the gradients come from; None: all."""
    results = []
    for function, dtype in ((run, torch.float32), (reference, torch.float64)):
        leaves = [u.to(dtype).requires_grad_() for u in inputs]
        outputs = function(*leaves)
        torch.manual_seed(1)
        pairs = [(u, torch.randn(u.shape).to(dtype)) for u in outputs]
        sources, weights = zip(*(pairs if through is None else [pairs[through]]))
        gradients = torch.autograd.grad(
            sources, leaves, weights, allow_unused=True, materialize_grads=True)
        results.append([*outputs, *gradients])
    for i, (got, want) in enumerate(zip(*results)):
        name = f"output {i}" if i < len(outputs) else f"gradient of input {i - len(outputs)}"
        assert got.dtype == torch.float32 and torch.isfinite(got).all(), f"{name} is not finite fp32"
        largest = want.abs().max().clamp(min=1e-30)         # exp(-800) has no digits in fp32
        error = ((got - want).abs().max() / largest).item()
        assert error <= 1e-5, f"{name} is off by {error:.2g} of its largest value"


# --- transformers -----------------------------------------------------------------------------------------------------

# an eps and a theta far from the defaults: mixing them up must show
LLAMA = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, rms_norm_eps=1e-3,
             tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0))
OURS = dict(n_embd=64, n_head=4, n_kv_head=2, intermediate_size=96, norm_eps=1e-3, rope_theta=500.0)
EXPERTS = dict(LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
SSM = dict(hidden_size=72, state_size=16, layer_norm_epsilon=1e-3, tie_word_embeddings=True)
SSM2 = dict(SSM, head_dim=12, num_heads=12, chunk_size=16)
OURS2 = dict(n_embd=72, head_dim=12, state_size=16, norm_eps=1e-3)
PEERS = {
    "llama": ("Llama", LLAMA, GPT, OURS),
    "qwen3": ("Qwen3", dict(LLAMA, head_dim=24), GPT, dict(OURS, qk_norm=True, head_dim=24)),
    "qwen3-untied": ("Qwen3", dict(LLAMA, head_dim=16, tie_word_embeddings=False),
                     GPT, dict(OURS, qk_norm=True, tie_embeddings=False)),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=WINDOW, attn_implementation="eager"),
                GPT, dict(OURS, window=WINDOW)),
    "mixtral": ("Mixtral", dict(EXPERTS, num_key_value_heads=4),
                GPT, dict(OURS, n_kv_head=4, n_expert=4)),
    "mixtral-gqa": ("Mixtral", dict(EXPERTS, num_experts_per_tok=3),
                    GPT, dict(OURS, n_expert=4, n_expert_active=3)),
    "mamba1": ("Mamba", SSM, Mamba, dict(OURS2, version=1)),
    "mamba1-untied": ("Mamba", dict(SSM, conv_kernel=3, expand=3, tie_word_embeddings=False),
                      Mamba, dict(OURS2, version=1, conv_kernel=3, expand=3, tie_embeddings=False)),
    "mamba2": ("Mamba2", dict(SSM2, n_groups=1), Mamba, dict(OURS2, chunk_size=16)),
    "mamba2-untied": ("Mamba2", dict(SSM2, n_groups=2, tie_word_embeddings=False),
                      Mamba, dict(OURS2, n_groups=2, chunk_size=32, tie_embeddings=False)),
}


def theirs(kind, settings, dtype=torch.float32):
    """A small model of transformers, no weight of which is 0 or 1."""
    transformers = pytest.importorskip('transformers')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = 'Text' if hasattr(transformers, kind + 'TextConfig') else ''     # of a family that reads images, too
    config = getattr(transformers, kind + text + 'Config')(**{'vocab_size': V, 'num_hidden_layers': 2, **settings})
    model = perturb(getattr(transformers, kind + 'ForCausalLM')(config)).eval()
    for p in model.parameters():  # not model.to(dtype), which would round the frequencies of rotary positions for good
        p.data = p.data.to(dtype)
    return model


# --- the state space recurrence, one step after another ---------------------------------------------------------------

def recurrence(x, dt, A, B, C, h=0):
    """x (B, T, H, P), dt (B, T, H), A (H, 1 or N), B, C (B, T, G, N), h (B, H, P, N), one step after another."""
    ys = []
    B, C = (u.repeat_interleave(x.shape[2] // u.shape[2], 2) for u in (B, C))   # (B, T, H, N)
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)[:, :, None]                    # (B, H, 1, 1 or N)
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(ys, 1), h


def random_dt(kind, shape):
    if kind == "usual":
        return torch.empty(shape).uniform_(1e-3, 0.1)
    if kind == "extreme":
        logs = torch.empty(shape).uniform_(math.log(1e-7), math.log(500))
        return torch.exp(logs).clamp(1e-6, 50)              # often the ends
    # 'cliff': great steps among tiny ones, but not at the end, where only zeros would be left
    t = torch.arange(shape[1])[:, None]
    return torch.where(t % 40 == 5, 50.0, 1e-6).expand(shape).clone()
