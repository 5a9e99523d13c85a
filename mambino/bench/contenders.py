"""What is measured: training steps, layers, the loss, reading and writing; each contender in a
process of its own.

turns.py starts this file as a program, in the folder of a checkout of this project: this one, or
with --against another, even one from before its files stood in folders. So what it needs of the
project it gets by `checkout_has`, from where it stands or stood.

The process reads a job, one line of JSON: a row as turns.py describes it, and the settings. It
makes its model, warms up and answers with facts. Then it takes a turn for each line that comes, and
answers with the seconds each work took.
"""
import importlib
import importlib.util
import os
import sys
import time
from functools import partial
from json import dumps, loads
from types import SimpleNamespace

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py; the same for every contender

import torch
import torch.nn.functional as F

OURS = ('gpt', 'gpt_window', 'mamba2', 'mamba1', 'mamba3', 'mamba3_r4', 'hybrid')      # _r4: of rank 4 (MIMO)
PEERS = {  # what to print, the model of ours it resembles, the sections it takes part in
    'llama': ('transformers Llama', 'gpt', ('train', 'sample')),
    'litgpt': ('litgpt', 'gpt', ('train',)),
    'nanogpt': ('nanoGPT', 'gpt', ('train',)),
    'hf_mamba2': ('transformers Mamba2', 'mamba2', ('train', 'sample')),
    'mamba_ssm': ('mamba-ssm Mamba2', 'mamba2', ('train',)),
    'mambapy': ('mamba.py', 'mamba1', ('layers',)),
    'hf_mamba': ('transformers Mamba', 'mamba1', ('layers',)),
    'cross_entropy': ('F.cross_entropy', 'linear_cross_entropy', ('loss',)),
}


def checkout_has(*names):
    """What stands under the first of these names, 'module:name', that this checkout has."""
    for name in names:
        module, _, attribute = name.partition(':')
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f'this checkout has none of {", ".join(names)}')


def step_of(model):
    """step(idx (B, t), state=None) → (logits, state), the quickest this checkout has."""
    try:
        step = checkout_has('mambino.sample.decode:step')
    except ImportError:  # before, a model's own step was the quickest
        return model.step
    return partial(step, model)


def weights_read(model):
    """Bytes a token reads: all weights once, those of the embedding as the head."""
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(weights.values())


# --- models ---------------------------------------------------------------------------------------

def our_class(kind):
    """(model's class, config's class) of 'gpt', 'mamba' or 'hybrid'."""
    module = importlib.import_module(f'model_{kind}')
    name = {'gpt': 'GPT', 'mamba': 'Mamba', 'hybrid': 'Hybrid'}[kind]
    return getattr(module, name), getattr(module, name + 'Config')


def ours(name, settings):
    """(class, config) of one of OURS, at the size of the settings."""
    fields = {key: getattr(settings, key)
              for key in ('block_size', 'vocab_size', 'n_layer', 'n_embd')}
    kind = name.partition('_')[0].rstrip('123')
    if kind == 'mamba':
        fields['version'] = int(name[5])
        fields |= dict(mimo_rank=4) if name.endswith('_r4') else {}
    else:
        fields['n_head'] = settings.n_head
        fields['window'] = 0 if name == 'gpt' else settings.window
    model_class, config_class = our_class(kind)
    return model_class, config_class(**fields)


def hf_config(model_class, config, **changes):
    """transformers' config of one of our models, made without its memory."""
    import transformers

    from mambino.export import to_hf
    with torch.device('meta'):
        keys = to_hf.to_transformers(model_class(config))[0]
    return transformers.AutoConfig.for_model(**keys | changes)


def litgpt(like, settings):
    """litgpt's Llama-like GPT of the same size; its input and output embeddings are one, as
    ours."""
    from litgpt.config import Config
    from litgpt.model import GPT
    model = GPT(Config(
        block_size=settings.block_size, vocab_size=settings.vocab_size,
        padded_vocab_size=settings.vocab_size, n_layer=settings.n_layer, n_head=settings.n_head, n_embd=settings.n_embd,
        intermediate_size=like.intermediate_size, mlp_class_name='LLaMAMLP', norm_class_name='RMSNorm',
        bias=False, rotary_percentage=1.0, parallel_residual=False))
    model.lm_head.weight = model.transformer.wte.weight
    return model


def mamba_ssm(like, settings):
    """mamba-ssm's Mamba-2 of the same size, with its fused kernels, which run on CUDA alone and
    were tuned for its own chunk_size."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    layer = dict(layer='Mamba2', d_state=like.state_size, d_conv=like.conv_kernel, expand=like.expand,
                 headdim=like.head_dim, ngroups=like.n_groups)
    return MambaLMHeadModel(MambaConfig(d_model=settings.n_embd, n_layer=settings.n_layer, ssm_cfg=layer,
                                        vocab_size=settings.vocab_size, pad_vocab_size_multiple=1))


def nanogpt(settings):
    """nanoGPT's GPT of the same size, from the checkout that --nanogpt names."""
    path = os.path.join(settings.nanogpt, 'model.py')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['nanogpt_model'] = module
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(
        block_size=settings.block_size, vocab_size=settings.vocab_size, n_layer=settings.n_layer,
        n_head=settings.n_head, n_embd=settings.n_embd, dropout=0.0, bias=False))


def whole_model(name, settings):
    """(model, loss(idx, targets)) of any contender but Mamba-1's peers."""
    model_class, config = ours(PEERS[name][1] if name in PEERS else name, settings)
    if name in ('litgpt', 'mamba_ssm'):
        model = litgpt(config, settings) if name == 'litgpt' else mamba_ssm(config, settings)

        def loss(idx, targets):
            logits = model(idx)
            logits = getattr(logits, 'logits', logits)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    elif name in ('llama', 'hf_mamba2'):
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_config(hf_config(model_class, config))

        def loss(idx, targets):
            return model(input_ids=idx, labels=idx, use_cache=False).loss
    else:
        model = nanogpt(settings) if name == 'nanogpt' else model_class(config)

        def loss(idx, targets):
            return model(idx, targets)[1]
    return model, loss


def matrix_flops(model):
    """6 a weight of every matrix product; a table of positions is none."""
    return 6 * sum(weight.numel() for name, weight in model.named_parameters()
                   if weight.ndim == 2 and not name.endswith(('A_log', 'wpe.weight')))


# --- sections: each returns facts, a function that warms up, and one that takes a turn and returns {work: [seconds]} --

def processor_time(work):
    """Seconds of the processor that work() takes in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def by_turns(works, settings):
    """(warm up, turn) of some functions: one call of each, by turns, until all had their share of
    `seconds`."""
    if settings.clock == 'cpu':
        timed = processor_time
    else:
        timed = partial(checkout_has('mambino.machine:timed', 'machine:timed'), settings.device)

    def warm_up():
        for work in works.values():
            end = time.perf_counter() + 2 * settings.seconds
            while timed(work) and time.perf_counter() < end:
                pass  # a slow one is warm after one call, and compiled

    def turn():
        times = {name: [] for name in works}
        share = settings.seconds / len(works)
        while left := [name for name, took in times.items() if sum(took) < share]:
            for name in left:
                times[name].append(timed(works[name]))
        return times
    return warm_up, turn


def memory_function():
    return checkout_has('mambino.machine:memory_used', 'machine:memory')


def memory_now(settings):
    return memory_function()(settings.device)


def train(job, settings, autocast):
    """Training steps. Everyone has the same optimizer: what is compared is the models."""
    name = job['name']
    model, loss = whole_model(name, settings)
    with torch.device('meta'):  # mixing of tokens costs a peer what it costs our model
        model_class, config = ours(PEERS[name][1] if name in PEERS else name, settings)
        like = model_class(config)
    parameters = sum(weight.numel() for weight in model.parameters())
    facts = dict(parameters=parameters, tokens=settings.batch_size * settings.block_size)
    facts['flops'] = matrix_flops(model) + like.flops_per_token(settings.block_size) - matrix_flops(like)
    model.to(settings.device).train()
    # neither libraries nor the making of a model count, but its weights
    facts['before'] = memory_now(settings)
    facts['counted'] = 4 * parameters
    if settings.compile:
        loss = checkout_has('mambino.kernels:compiled', 'checkpoint:compiled')(loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (2, settings.batch_size, settings.block_size)
    idx, targets = torch.randint(settings.vocab_size, shape, device=settings.device).unbind()

    def step():
        with autocast():
            value = loss(idx, targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return facts, *by_turns({'step': step}, settings)


def layers(job, settings, autocast):
    """Two Mamba-1 mixers, without norms and residuals."""
    name = job['name']
    model_class, config = ours('mamba1', settings)
    if name == 'mamba1':
        from model_mamba import Mamba1Mixer
        pair = [Mamba1Mixer(config, 2) for _ in range(2)]
    elif name == 'mambapy':
        from mambapy.mamba import MambaBlock, MambaConfig
        theirs = MambaConfig(d_model=settings.n_embd, n_layers=2, d_state=config.state_size, pscan=True)
        pair = [MambaBlock(theirs) for _ in range(2)]
    else:
        from transformers.models.mamba.modeling_mamba import MambaMixer
        pair = [MambaMixer(hf_config(model_class, config), 0) for _ in range(2)]
    pair = torch.nn.ModuleList(pair).to(settings.device).train()
    parameters = sum(weight.numel() for weight in pair.parameters())
    B, T, D = settings.layers_batch_size, settings.block_size, settings.n_embd
    facts = dict(parameters=parameters, tokens=2 * B * T, before=memory_now(settings),
                 counted=4 * parameters)
    x = torch.randn(B, T, D, device=settings.device, requires_grad=True)

    def step():
        y = x
        with autocast():
            for layer in pair:
                y = layer(y)
                y = y[0] if isinstance(y, tuple) else y
        y.float().square().mean().backward()
        pair.zero_grad(set_to_none=True)
        x.grad = None
    return facts, *by_turns({'step': step}, settings)


def loss(job, settings, autocast):
    """Forward and backward of the loss alone, from the last hidden states. Inputs and gradients,
    which any way needs, count apart."""
    device = settings.device
    chunked = checkout_has('mambino.language_model:linear_cross_entropy', 'ops:linear_cross_entropy')
    B, T = settings.loss_batch_size, settings.loss_block_size
    D, V = settings.n_embd, settings.loss_vocab_size
    x = torch.randn(B, T, D, device=device, requires_grad=True)
    weight = torch.nn.Parameter(0.02 * torch.randn(V, D, device=device))
    targets = torch.randint(V, (B, T), device=device)

    def step(x=x, targets=targets):
        with autocast():
            if job['name'] == 'cross_entropy':
                value = F.cross_entropy((x @ weight.t()).flatten(0, 1), targets.flatten())
            else:
                value = chunked(x, weight, targets)
        value.backward()
        x.grad = None
        weight.grad = None

    # once, so that libraries have their buffers
    step(torch.randn(1, 8, D, device=device, requires_grad=True), targets[:1, :8])
    inputs = x.nbytes + weight.nbytes
    facts = dict(tokens=B * T, inputs=inputs, before=memory_now(settings), counted=-inputs)
    return facts, *by_turns({'step': step}, settings)


def sample(job, settings, autocast):
    """Reading a prompt, and one token more at each of the positions. Autocast is on all the time:
    it keeps its copies."""
    name = job['name']
    is_ours = name in OURS
    model = whole_model(name, settings)[0].to(settings.device).eval()
    autocast().__enter__()
    (torch.no_grad() if is_ours else torch.inference_mode()).__enter__()
    step = step_of(model) if is_ours else None
    cache = 'cache_params' if name == 'hf_mamba2' else 'past_key_values'

    def read(idx, state=None):
        if is_ours:
            return step(idx, state)[1]
        given = {} if state is None else {cache: state}
        return model(input_ids=idx, use_cache=True, **given)[cache]

    def random_ids(length):
        return torch.randint(settings.vocab_size, (1, length), device=settings.device)

    prompt = random_ids(settings.prefill)
    works = {'prefill': lambda: read(prompt)}
    states, sizes = {}, []
    for position in settings.positions.split(','):
        state = None
        for start in range(0, int(position), 512):
            state = read(random_ids(min(512, int(position) - start)), state)
        states[position] = state
        if is_ours:
            sizes.append(sum(tensor.nbytes for key, tensor in state.items() if key != 'pos'))

        def one_more(position=position):
            states[position] = read(prompt[:, :1], states[position])
        works[position] = one_more
    itemsize = 4 if job['dtype'] == 'float32' else 2        # a bf16 copy of the weights is kept
    weights = weights_read(model) * itemsize // 4
    return dict(tokens=settings.prefill, state=sizes, weights=weights), *by_turns(works, settings)


def generate(job, settings, autocast):
    """A prompt continued greedily, by ours, transformers or llama.cpp: see generators.py."""
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # last: the project's modules are the checkout's
    from generators import generate
    return generate(job, settings)


SECTIONS = dict(train=train, length=train, layers=layers, loss=loss, sample=sample,
                generate=generate)


def main():
    """The life of the process: a job on stdin, then a line for each turn it shall take; answers on
    stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    job = loads(sys.stdin.readline())
    settings = SimpleNamespace(**job['settings'])

    def answer(**fields):
        print(dumps(fields), file=answers, flush=True)

    try:
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        torch.manual_seed(1)
        dtype = getattr(torch, job['dtype'], None)  # none of int8, int4, which do without
        autocast = partial(torch.autocast, torch.device(settings.device).type, dtype,
                           enabled=job['dtype'] != 'float32')
        facts, warm_up, turn = SECTIONS[job['section']](job, settings, autocast)
        warm_up()
        answer(**facts)
        memory = memory_function()
        for _ in sys.stdin:
            fields = dict(times=turn())
            if facts.get('before'):
                fields['memory'] = memory(settings.device, peak=True) - facts['before'] + facts['counted']
            answer(**fields)
    except Exception as error:  # a library's, about what it does not have here: the row says which
        answer(error=f'{type(error).__name__}: {error}'.split('\n')[0][:150])


if __name__ == '__main__':
    main()
