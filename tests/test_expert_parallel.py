"""--expert_parallel as its user meets it: processes that share the experts train as one does, stop
and go on as more or fewer of them, and leave what one process would have left."""
import os

import pytest
import torch
from helpers.card import pretended
from helpers.card_process import on_card
from helpers.models import build, tokens
from helpers.runs import forked, load, metrics, plain, refused, script, shape_of, train

from mambino.kernels import portable
from mambino.sample import graphs, parts
from mambino.train import experts, memory

pytestmark = [pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks'), pytest.mark.usefixtures('one_thread')]
MOE = ('--model=gpt --n_layer=2 --n_expert=4 --optimizer=muon --tokens_per_step=128 --learning_rate=1e-2 '
       '--warmup_iters=2 --schedule=wsd --decay_fraction=0 --eval_interval=3')


@pytest.fixture
def in_float64():
    """An expert sees few of so few tokens, and where its gradient is little more than rounding
    AdamW divides that by its own size."""
    torch.set_default_dtype(torch.float64)
    yield 'torch.set_default_dtype(torch.float64)'
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def spread(here, in_float64):
    def run(*lines, n=2, world=2, before='', status=0, precision=in_float64):
        """So many processes train, experts spread over n of them; returns what they said: [out,
        err] of the first, and so on. status: what they end with; None: not with 0."""
        before = f'{precision}\n{before}'
        ended, said = forked(MOE, f'--expert_parallel={n}', *lines, before=before, world=world, joined=True)
        assert all(ended) if status is None else set(ended) == {status}, said
        return said
    return run


def assert_same_curve(a, b):
    for key, tolerance in (('loss', 1e-5), ('val_loss', 1e-5), ('grad_norm', 1e-4)):
        assert metrics(a, key) == pytest.approx(metrics(b, key), abs=tolerance), key


LIMIT = '--capacity_factor=1'
CASES = [  # processes that share the experts, all processes, flags
    (2, 2, '--capacity_factor=0 --gradient_checkpointing=True'),
    (2, 4, LIMIT),
    (4, 4, '--capacity_factor=0'),
    (4, 4, f'{LIMIT} --gradient_checkpointing=True'),
]


@pytest.mark.parametrize('n, world, flags', CASES)
def test_equals_one_process(spread, n, world, flags):
    """With a limit, too, which counts the tokens of each process, as it does those of one's
    micro-batches."""
    flags = f'--batch_size={8 // world} {flags} --max_iters=6 --grad_clip=0.5'
    out = spread(flags, n=n, world=world)[0]
    assert f'({world} x 1 x {8 // world} x 16)' in out and out.count('done: ') == 1
    train(MOE, flags, '--out_dir=one')
    assert_same_curve('out', 'one')
    if LIMIT in flags:
        assert any(metrics('one', 'dropped').values())
    assert max(metrics(key='grad_norm').values()) > 0.5                 # it was cut down


def test_goes_on_with_another_number_of_processes(spread, capsys):
    """Two, then four that share the experts by twos, then one: the curve and the checkpoint are
    those of one."""
    flags = f'{LIMIT} --batch_size=2'
    train(MOE, flags, '--out_dir=one --max_iters=9')
    first = spread(flags, '--max_iters=3')[0]
    numbers = [line for line in first.split('\n') if 'M parameters' in line]
    assert numbers and all(line in capsys.readouterr().out for line in numbers)
    out = spread(flags, '--max_iters=6', world=4)[0]
    assert 'going on from out/ckpt.pt at step 3' in out
    train(MOE, flags, '--max_iters=9')
    assert_same_curve('out', 'one')
    ours, theirs = load(), load('one/ckpt.pt')
    for part in ('weights', 'optimizers', 'config'):
        assert shape_of(ours[part]) == shape_of(theirs[part])
    for name, weight in theirs['weights'].items():
        torch.testing.assert_close(ours['weights'][name], weight, atol=1e-5, rtol=1e-4)
    for key in ('parameters', 'parameter_bytes'):
        assert ours['metadata'][key] == theirs['metadata'][key]
    assert os.path.getsize('out/ckpt.pt') == pytest.approx(os.path.getsize('one/ckpt.pt'), rel=0.02)


STOPS = """
from mambino.train import progress                          # before the first step
progress.catch_stop_signals = lambda: [signal.SIGTERM]"""


def test_what_is_saved_is_what_was_read(spread):
    """Every bit of weights and optimizers, cut and put together again."""
    train(MOE, '--max_iters=3')
    before = load()
    said = spread('--max_iters=6', before=STOPS, n=2, world=4, status=143)
    after = load()
    assert 'torchrun --nproc_per_node=4 train.py --init_from=resume --out_dir=out --device=cpu --expert_parallel=2' in (
        said[0])
    assert plain(before['weights']) == plain(after['weights'])
    for a, b in zip(before['optimizers'], after['optimizers']):
        assert plain(a['state']) == plain(b['state'])


def test_kill_samples_and_seldom_evaluation_change_nothing(spread):
    """A run that was killed goes on bit for bit; samples, in which all take part, and evaluations
    disturb nothing. best.pt is read like any other."""
    flags = f'{LIMIT} --batch_size=2 --dropout=0.1 --max_iters=6'
    spread(flags, '--out_dir=unbroken --sample_interval=4 --eval_interval=6')
    spread(flags, status=None, before="""
save = checkpoint.save_checkpoint                           # right after the first
def patched(path, *contents):
    save(path, *contents)
    if path.endswith('ckpt.pt'):
        os.kill(os.getpid(), 9)
checkpoint.save_checkpoint = patched""")
    out = spread(flags)
    assert 'going on from out/ckpt.pt at step 3' in out[0]
    assert metrics(key='loss') == metrics('unbroken', 'loss')
    assert plain(load()['weights']) == plain(load('unbroken/ckpt.pt')['weights'])
    assert metrics(key='val_loss')[6] == metrics('unbroken', 'val_loss')[6]
    assert f'val_loss {metrics(key="val_loss")[6]:.4f}' in spread('--eval_only')[0]
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=5') == 0


def test_fp16_scales_alike_everywhere(spread):
    """A gradient that is infinite in the experts of one process alone makes all leave out the step,
    and halve the scale."""
    said = spread('--dtype=float16 --max_iters=6', precision='', before="""
from mambino.train import experts
join = experts.join_gradients
def patched(net, scaled):
    calls.append(1)
    if len(calls) == 3 and rank == 1:
        net.model.layers[0].mlp.experts.down_proj.grad[0, 0, 0] = float('inf')
    join(net, scaled)
calls, experts.join_gradients = [], patched
update = torch.amp.GradScaler.update
def told(scaler):
    update(scaler)
    print('scale', scaler.get_scale(), flush=True)
torch.amp.GradScaler.update = told""")
    scales = [[line for line in out.split('\n') if line.startswith('scale')] for out in said[::2]]
    assert scales[0] == scales[1] and len(set(scales[0])) == 2


def test_what_does_not_fit_is_one_line(here, capsys):
    train(MOE, '--expert_parallel=2', status=2)
    refused(capsys, 'expert_parallel=2', 'torchrun')
    train(MOE, '--expert_parallel=0', status=2)
    refused(capsys, 'expert_parallel=0', '1 (experts are not spread) or more')
    cases = {
        '--expert_parallel=2 --parallel=fsdp': 'parallel=fsdp',
        '--expert_parallel=3': 'number of processes, which is 2',
        '--expert_parallel=2 --n_expert=3': 'number of experts, which is 3',
        '--expert_parallel=2 --n_expert=0': 'has none',
    }
    for flags, words in cases.items():
        statuses, said = forked(MOE, flags, world=2, joined=True)
        assert statuses == [2, 2], said
        for err in said[1::2]:
            assert err.startswith('error: expert_parallel=') and err.count('\n') == 1 and words in err


def test_memory_is_planned_for_the_experts_that_are_here():
    config = dict(vocab_size=64, n_layer=2, n_embd=32, n_head=2, n_expert=4, intermediate_size=64)
    of_all = 4 * 2 * 4 * 3 * 32 * 64                                    # bytes of the experts
    ddp, half = (memory.estimate('gpt', config, 2, 64, world=4, expert_parallel=n) for n in (1, 2))
    assert ddp['weights'] - half['weights'] == of_all // 2
    assert ddp['optimizer'] - half['optimizer'] == of_all
    assert ddp['gradients'] - half['gradients'] == of_all + of_all // 2


@on_card
@pytest.mark.parametrize('limit, waits', [(1.0, 0), (0.0, 2)])
def test_a_card_is_waited_for_only_without_a_limit(limit, waits):
    """Once a layer. The other processes are left out: what is sent comes back."""
    torch.manual_seed(0)
    net, idx = build('gpt-experts', capacity_factor=limit).train(), tokens(2, 40)
    with portable():
        want = net(idx, idx)[1].item()
    experts.divide(net)
    experts.all_to_all = lambda x, sent=None, received=None: x
    with pretended(capability=(9, 0)) as card:
        net.to('cuda')
        idx = idx.to('cuda')
        card.reset()
        with torch.autocast('cuda', dtype=torch.bfloat16):
            loss = net(idx, idx)[1]
        loss.backward()
        found = dict(card.waits)
        assert loss.item() == pytest.approx(want, abs=2e-3)
    assert sum(found.values()) == waits and all('experts.py' in place for place in found), found
    assert all(p.grad is not None for p in net.parameters())


CARDS = """                                                 # as if there were GPUs, and NCCL
import torch.distributed as dist
from mambino import machine
init = dist.init_process_group
dist.init_process_group = lambda backend: (print(backend), init('gloo'))
dist.is_nccl_available = lambda: {nccl}
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: {cards}
torch.cuda.set_device = torch.cuda.get_device_properties = str
torch.cuda.synchronize = lambda: None
machine.choose_device = lambda device: device
processes.LOCAL_RANK += {cards} < 2                           # one after another would wait for the first
all_reduce = dist.all_reduce
dist.all_reduce = lambda x, *op: (tried if x.dtype == torch.float32 else all_reduce)(x, *op)
zeros = torch.zeros
torch.zeros = lambda *shape, device='cpu', **how: zeros(*shape, **how)
begin.refuse_dataset = lambda out_dir: checkpoint.fail('they have met')
def tried(x, *op):
    raise RuntimeError('NCCL error in: x.cpp:1, unhandled\\nLast error:\\n  Cuda failure 2')
"""
REFUSALS = [  # flags, has NCCL, GPUs, what each process says
    ('--device=cuda', True, 1, '--nproc_per_node=1'),
    ('--device=cuda:0', True, 2, '2 processes have the same GPU, cuda:0'),
    ('--device=cuda', True, 2, 'does not start: Cuda failure 2'),
    ('--device=cuda', False, 2, 'they have met'),
    ('--device=cuda --parallel=fsdp', False, 2, 'parallel=fsdp on GPUs needs NCCL'),
]


@pytest.mark.parametrize('flags, nccl, cards, words', REFUSALS)
def test_what_gpus_cannot_do_together_is_one_line(here, flags, nccl, cards, words):
    statuses, said = forked('--model=gpt', flags, before=CARDS.format(nccl=nccl, cards=cards), world=2, joined=True)
    errors = [err for err in said[1::2] if err]
    assert statuses[1] == 2 and errors
    for err in errors:
        assert err.startswith('error: ') and err.count('\n') == 1 and words in err
    if 'fsdp' not in flags and cards > 1:
        assert f'cpu:gloo,cuda:{"nccl" if nccl else "gloo"}' in said[0] and ('without NCCL' in said[0]) != nccl


def test_gpus_for_some_of_the_processes_are_one_line(here):
    found = "\nmachine.choose_device = lambda device: 'cpu' if processes.RANK else 'cuda:0'\n"
    statuses, said = forked('--model=gpt', before=CARDS.format(nccl=True, cards=2) + found, world=2, joined=True)
    assert statuses == [2, 2]
    assert all(err.count('\n') == 1 and '1 of 2 processes found a GPU' in err for err in said[1::2]), said


def test_a_process_that_ends_is_one_line_of_the_others(here):
    statuses, said = forked(MOE, '--expert_parallel=2', world=2, joined=True, before="""
from mambino.train import experts
join = experts.join_gradients
def patched(*arguments):
    if rank == 1:
        os._exit(3)
    join(*arguments)
experts.join_gradients = patched""")
    assert statuses == [2, 3], said
    assert said[1].startswith('error: another process has ended') and said[1].count('\n') == 1


@on_card
def test_no_graph_holds_what_other_processes_compute():
    """In which an exchange would be recorded, and its wait for the host."""
    with pretended():
        graphs.models.of(build('gpt-experts').to('cuda'))
        net = build('gpt-experts')
        experts.N = 2
        experts.divide(net)
        with pytest.raises(parts.Unknown):
            graphs.models.of(net.to('cuda'))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU: experts on a card are NOT tested')
@pytest.mark.parametrize('limit', ['--capacity_factor=0', LIMIT])
def test_two_processes_on_a_card(spread, limit):
    """Which NCCL does not take: what they tell each other goes by gloo, as it does on Windows."""
    flags = f'{limit} --batch_size=4 --max_iters=6 --device=cuda:0'
    by_gloo = 'import torch.distributed\ntorch.distributed.is_nccl_available = lambda: False'
    said = spread(flags, before=by_gloo, precision='')
    assert 'without NCCL' in said[0]
    torch.set_default_dtype(torch.float32)
    train(MOE, flags, '--out_dir=one')
    for key in ('loss', 'val_loss', 'grad_norm'):
        assert metrics(key=key) == pytest.approx(metrics('one', key), abs=2e-3), key
