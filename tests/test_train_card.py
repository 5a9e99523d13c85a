"""train.py on a pretended card: what it waits for, what it does where memory does not suffice or
the card is gone, and that it computes what the CPU does."""
import contextlib
import io
import os
import sys
import types

import pytest
import torch
from helpers.card import LOST, pretended
from helpers.card_process import on_card
from helpers.runs import load, metrics, script, train

from mambino import machine
from mambino.train import evaluation, recovery
from mambino.train.metrics import Trace
from mambino.weights import checkpoint

# of a card's run and of the CPU's the optimizer and its rate would differ
SAME = ('--model=gpt --max_iters=4 --eval_interval=2 --optimizer=adamw --schedule=cosine --learning_rate=1e-2 '
        '--eval_iters=20 ')
CUDA = SAME + '--device=cuda --dtype=float32 '


def said_of(*flags, status=0):
    """What train.py says on a card: (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        train(*flags, status=status)
    return out.getvalue(), err.getvalue()


@on_card
def test_a_run_has_the_losses_of_the_cpu_and_waits_at_log_steps_alone(here):
    evaluation.TOKENS = 64                              # four sequences of the 20 at once
    train(SAME, '--out_dir=cpu')
    with pretended() as card:
        train(CUDA, '--log_interval=100')
        waits = dict(card.waits)
    assert metrics(key='val_loss') == pytest.approx(metrics('cpu', 'val_loss'), abs=1e-5)
    in_steps = [wait for wait in waits if 'train.py' in wait]
    assert sum(waits[wait] for wait in in_steps) <= 2 * 2, waits   # of steps 1 and 4: the loss and the norm
    # an evaluation reads its losses once, however many batches it has
    assert sum(n for wait, n in waits.items() if 'evaluation.py' in wait) == 2, waits
    assert not [wait for wait in waits if 'loader.py' in wait]


@on_card
@pytest.mark.parametrize('kind, more', [('gpt', dict(n_head=4, n_expert=4)), ('mamba', {}), ('hybrid', dict(n_head=4))])
def test_weights_rounded_once_a_step_have_the_same_gradients(kind, more):
    config = dict(n_layer=2, n_embd=64, vocab_size=128, block_size=32, **more)
    idx = torch.randint(128, (6, 33), generator=torch.Generator().manual_seed(1))

    def gradients(context):
        torch.manual_seed(0)
        net = checkpoint.build(kind, config).to('cuda')
        x, y = idx[:, :-1].to('cuda'), idx[:, 1:].to('cuda')
        card.reset()
        with context:
            for i in range(0, 6, 2):
                with machine.autocast('cuda', 'bfloat16'):
                    loss = net(x[i:i + 2], y[i:i + 2])[1] / 3
                loss.backward()
        return {name: p.grad.cpu() for name, p in net.named_parameters()}, card.kernels['_to_copy']

    with pretended() as card:
        often, casts = gradients(contextlib.nullcontext())
        once, fewer = gradients(machine.rounded_once('cuda', 'bfloat16'))
    assert fewer < casts
    assert all(torch.equal(often[name], once[name]) for name in often)


@on_card
@pytest.mark.parametrize('operation', ['_log_softmax', 'embedding_dense_backward'])
def test_out_of_memory_in_a_step_halves_the_micro_batch(here, operation):
    """And what the step had taken is free when the cache is emptied."""
    flags = CUDA + ' --batch_size=4 --tokens_per_step=64'
    train(SAME, '--batch_size=2 --out_dir=cpu')
    alive = []
    with pretended() as card:
        train(flags, '--max_iters=1 --out_dir=one')
        at_rest = card.alive_bytes
        left = [2]

        def fault(name):                                # an error that nobody keeps, nor its traceback
            left[0] -= name == operation
            if name == operation and left[0] == 0:
                raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        card.faults.append(fault)
        empty_cache, torch.cuda.empty_cache = torch.cuda.empty_cache, lambda: alive.append(card.alive_bytes)
        said, _ = said_of(flags)
        torch.cuda.empty_cache = empty_cache
    assert said.count('out of memory: going on with micro-batches of 2, 2 a step') == 1
    of_a_step = card.peak_bytes - at_rest
    assert len(alive) == 1 and alive[0] < at_rest + 0.1 * of_a_step and load()['settings']['batch_size'] == 2
    assert metrics(key='val_loss') == pytest.approx(metrics('cpu', 'val_loss'), abs=1e-5)


@on_card
def test_out_of_memory_in_the_optimizer_ends_in_a_line(here):
    with pretended() as card:
        card.plant_out_of_memory('_fused_adamw_', nth=5)        # there are two groups
        said, err = said_of(CUDA, status=2)
    assert 'out of memory in the update of step 3' in err and err.count('\n') == 1
    assert 'the last good checkpoint is out/ckpt.pt, of step 2' in err and load()['counters']['step'] == 2


@on_card
def test_out_of_memory_in_an_evaluation(here):
    """Halves are tried; where one sequence is too much the program ends in a line."""
    train(SAME, '--out_dir=cpu')
    with pretended() as card:
        enough = said_of(CUDA, '--log_interval=1')[0]
        assert 'out of memory' not in enough
        plain = evaluation.machine.sent

        def sent(x, device):
            if len(x) > limit and not torch.is_grad_enabled():
                raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
            return plain(x, device)
        evaluation.machine.sent = sent
        limit = 3
        said_of(CUDA, '--out_dir=halves')
        limit = 0
        _, err = said_of(CUDA, '--out_dir=none', status=2)
        del card
    assert metrics('halves', 'val_loss') == pytest.approx(metrics('cpu', 'val_loss'), abs=1e-5)
    assert 'out of memory in the evaluation, with 1 sequences of 16 tokens' in err and err.count('\n') == 1


@on_card
def test_a_card_that_is_lost_is_told_in_a_line(here):
    """The process ends at once, so the hook that would end it is called by hand."""
    ended = []
    with pretended() as card:
        said_of(CUDA)
        card.plant_loss(nth=400)
        hook = sys.excepthook
        with pytest.raises(torch.AcceleratorError) as caught:
            said_of(CUDA, '--max_iters=50')
        assert sys.excepthook is not hook
        os._exit, plain = ended.append, os._exit
        recovery.atexit._run_exitfuncs, run_all = lambda: None, recovery.atexit._run_exitfuncs
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            sys.excepthook(caught.type, caught.value, None)
        os._exit, recovery.atexit._run_exitfuncs = plain, run_all
    said = err.getvalue().strip()
    assert ended[0] == 2 and '\n' not in said
    for words in ('the card failed at step', 'CUDA error: unspecified launch failure; the last good checkpoint is '
                  'out/ckpt.pt, of step 4', 'nvidia-smi', 'the same command goes on'):
        assert words in said, said
    assert script('train.py', '--out_dir=out --device=cpu --max_iters=5 --dataset=tiny') == 0


@pytest.mark.parametrize('error, lost', [
    (RuntimeError(LOST), True),
    (RuntimeError('CUDA error: uncorrectable ECC error encountered'), True),
    (RuntimeError('CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm'), True),
    (RuntimeError('CUDA error: device-side assert triggered'), False),     # a mistake of the program
    (RuntimeError('CUDA error: out of memory'), False),
    (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False),
    (ValueError('no'), False),
])
def test_which_errors_tell_of_a_lost_card(error, lost):
    assert recovery.is_lost(error) is lost


@on_card
def test_a_profile_on_a_card_has_its_times():
    """By events, of which the pretended card's count launches: here one, three, six and two."""
    with pretended() as card:
        trace = Trace('trace.json', 1, 'cuda')
        trace.done = trace.WARM_UP
        x = torch.ones(3, device='cuda')
        card.reset()
        for name, n in (('data', 1), ('forward', 3), ('backward', 6), ('optimizer', 2)):
            with trace.part(name):
                for _ in range(n):
                    x.mul_(2)
        assert trace.parts({}) == dict(data=1, forward=3, backward=6, optimizer=2) and card.waits == {}
        rows = types.SimpleNamespace(key_averages=lambda: [], export_chrome_trace=lambda path: None)
        first = next(trace.report(rows))
    assert first == '1 steps, on the card: data 8.3%, forward 25.0%, backward 50.0%, optimizer 16.7%'


@on_card
@pytest.mark.parametrize('compiles', [False, True])
def test_a_run_that_is_to_be_compiled(here, compiles):
    with pretended(compiles=compiles):
        said, _ = said_of(CUDA, '--compile --max_iters=2')
    line, = [line for line in said.split('\n') if line.startswith('torch.compile: ')]
    assert ('seconds, for faster steps' in line) is compiles
    assert ('does not work here (there is no Triton: pip install triton' in line) is not compiles, line
    assert 'done: 2 steps' in said


@on_card
def test_a_model_too_large_for_the_card_is_told_in_a_line(here):
    with pretended(gigabytes=1):
        _, err = said_of(CUDA, '--dtype=bfloat16 --n_embd=512 --n_layer=4 --n_head=8 --batch_size=0', status=2)
    assert 'one sequence of 16 tokens takes' in err and 'halve --n_layer or --n_embd' in err and err.count('\n') == 1


@on_card
def test_a_sample_in_training_is_computed_in_the_runs_precision(here):
    with pretended() as card:
        dtypes = set()
        prefill = evaluation.prefill

        def watched(net, ids):
            dtypes.add(torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda'))
            return prefill(net, ids)
        evaluation.prefill = watched
        said, _ = said_of(CUDA, '--dtype=bfloat16 --sample_interval=4')
        del card
    assert dtypes == {torch.bfloat16} and '--- sample at step 4' in said
