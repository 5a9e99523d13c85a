"""--parallel=fsdp as its user meets it: processes that share the weights train as one does, are
killed and go on, also as more or fewer of them, and leave what one process would have left."""
import copy
import os
import pickle
import shutil

import pytest
import torch
from helpers.runs import forked, load, metrics, plain, refused, script, shape_of, train

from mambino.weights import checkpoint, shards

pytestmark = [pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks'), pytest.mark.usefixtures('one_thread')]
SAME = '--tokens_per_step=128 --learning_rate=1e-2 --warmup_iters=2 --schedule=wsd --decay_fraction=0'
FSDP = f'--parallel=fsdp --batch_size=2 {SAME}'
ONE = f'--batch_size=8 {SAME}'


@pytest.fixture
def pair(here):
    def run(*lines, before='', statuses=(0, 0), world=2):
        """So many processes train with these flags, each after the statements `before`, which know
        `rank`; returns what they said: [out, err] of the first, and so on. statuses: what they end
        with; None: not with 0."""
        ended, said = forked(FSDP, *lines, before=before, world=world, joined=True)
        assert tuple(ended) == (statuses * world)[:world] if statuses else all(ended), said
        return said
    return run


def numbers_in(ckpt):
    """How many numbers a checkpoint's weights and optimizer's states have, tied ones once."""
    states = [state for opt in ckpt['optimizers'] for state in opt['state'].values()]
    tensors = {id(t): t for part in (ckpt['weights'], *states) for t in part.values()}
    return sum(t.numel() for t in tensors.values())


def numbers_in_shards(folder):
    """{file: how many numbers it has}."""
    metadata, sizes = shards.read_metadata(folder), {}
    for index, place in metadata.storage_data.items():
        chunks = metadata.state_dict_metadata[index.fqn].chunks
        size = next(chunk.sizes.numel() for chunk in chunks if chunk.offsets == index.offset)
        sizes[place.relative_path] = sizes.get(place.relative_path, 0) + size
    return sizes


def assert_same_curve(a, b):
    for key, tolerance in (('loss', 1e-5), ('val_loss', 1e-5), ('grad_norm', 1e-4)):
        assert metrics(a, key) == pytest.approx(metrics(b, key), abs=tolerance), key


def same_run(a, b):
    assert metrics(a) == metrics(b)
    for name in ('ckpt.pt', 'best.pt'):
        assert plain(load(f'{a}/{name}')) == plain(load(f'{b}/{name}'))
    assert sorted(os.listdir(a)) == sorted(os.listdir(b)) == ['best.pt', 'ckpt.pt', 'metrics.jsonl']


# A GPT in float64: at AdamW's 1e-2 rounding doubles from step to step; in float32 one process with micro-batches of 4
# is 2.4e-4 from one of 8 after 16 steps. With experts by Muon, too, which see few of so few tokens: 1.2e-5.
CASES = [
    'gpt adamw --gradient_checkpointing=True',
    'gpt muon --n_layer=3 --n_expert=4 --aux_loss=0 --capacity_factor=0',
    'mamba adamw --version=1',
    'mamba muon --version=3 --mimo_rank=2',
    'mamba muon --n_layer=1',
    'hybrid adamw --n_layer=1',
    'hybrid muon --tie_embeddings=False',
]


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield 'torch.set_default_dtype(torch.float64)'
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('flags', CASES)
def test_fsdp_equals_one_process(request, pair, flags):
    before = request.getfixturevalue('in_float64') if 'gpt' in flags else ''
    model, optimizer, *more = flags.split()
    flags = f'--model={model} --optimizer={optimizer} --n_layer=2 --n_embd=64 --eval_interval=4 ' + ' '.join(more)
    out = pair(flags, '--max_iters=8', before=before)[0]
    assert '(2 x 2 x 2 x 16)' in out and out.count('done: ') == 1
    train(ONE, flags, '--out_dir=one --max_iters=8')
    both = load(), load('one/ckpt.pt')
    assert both[0].keys() == both[1].keys() and 'shards' not in both[0]
    for part in ('weights', 'optimizers', 'config', 'tokenizer'):
        assert shape_of(both[0][part]) == shape_of(both[1][part])
    sizes = [os.path.getsize(f'{folder}/ckpt.pt') for folder in ('out', 'one')]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02              # tied weights are there once
    if model == 'gpt':
        train(ONE, flags, '--max_iters=12')                 # goes on from two processes with one,
        pair(flags, '--max_iters=16', before=before)        # and with two again
        train(ONE, flags, '--out_dir=one --max_iters=16')
    assert_same_curve('out', 'one')
    losses = list(metrics(key='loss').values())
    assert losses[-1] < losses[0] - 0.05                    # there was a curve


KILLS = [  # which process is killed: at the n-th call of a function of os for a path that ends so; where it goes on
    (1, 'fsync', '', 2, 5),                                 # its shard is written
    (0, 'rename', '.metadata', 2, 5),
    (0, 'replace', 'ckpt.pt', 2, 5),                        # the shards are whole
    (0, 'listdir', 'ckpt.shards', 2, 10),                   # and the older ones still there
    (0, 'replace', 'ckpt.pt', 3, 10),
    (0, 'rmdir', 'ckpt.shards', 1, 15)]


def test_kill_and_resume_is_bit_identical(pair):
    flags = '--model=gpt --dropout=0.1 --optimizer=muon --max_iters=15'
    pair(flags, '--out_dir=unbroken')
    for rank, function, end, n, step in KILLS:
        shutil.rmtree('out', ignore_errors=True)
        pair(flags, statuses=None, before=f'''
if rank == {rank}:
    calls, {function} = [], os.{function}
    def patched(*paths, **how):
        calls.extend(1 for path in paths[-1:] if str(path).endswith({end!r}))
        if len(calls) == {n}:
            os.kill(os.getpid(), 9)
        return {function}(*paths, **how)
    os.{function} = patched''')
        ckpt = load()
        assert ckpt['counters']['step'] == step
        if step == 15:                                      # the last checkpoint was whole
            assert 'shards' not in ckpt and os.path.exists('out/ckpt.shards')
        else:
            assert ckpt['shards'] == dict(step=step) and all(isinstance(name, str) for name in ckpt['weights'].values())
            sizes = numbers_in_shards(f'out/ckpt.shards/{step}')
            assert len(sizes) == 2 and max(sizes.values()) < 0.6 * numbers_in(checkpoint.load_checkpoint('out/ckpt.pt'))
            assert f'going on from out/ckpt.pt at step {step}' in pair(flags)[0]
            same_run('unbroken', 'out')


def test_a_stop_saves_the_whole(pair, capsys):
    out = pair('--model=gpt', statuses=(143, 143), before='''
if rank == 1:                                               # right after a save in shards
    from mambino.weights import shards
    write = shards.write
    def patched(*arguments):
        write(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
    shards.write = patched''')[0]
    assert 'torchrun --nproc_per_node=2 train.py --init_from=resume --out_dir=out --device=cpu --parallel=fsdp\n' in out
    ckpt = load()
    assert ckpt['counters']['step'] == 5 and 'shards' not in ckpt
    assert sorted(os.listdir('out')) == ['best.pt', 'ckpt.pt', 'metrics.jsonl']
    assert script('sample.py', '--out_dir=out/ckpt.pt --device=cpu --max_new_tokens=5') == 0


def test_evaluation_samples_and_patience(pair):
    """Neither hangs, though the processes have different numbers of batches to evaluate; neither
    disturbs training."""
    flags = '--model=hybrid --dropout=0.2 --window=8 --learning_rate=1e-3'
    pair(flags, '--max_iters=10 --eval_interval=10 --out_dir=seldom')
    out = pair(flags, '--max_iters=10 --eval_interval=4 --sample_interval=5')
    assert out[0].count('--- sample at step') == 2 and not out[2]
    assert metrics(key='loss') == metrics('seldom', 'loss')
    assert plain(load()['weights']) == plain(load('seldom/ckpt.pt')['weights'])
    assert f'val_loss {metrics(key="val_loss")[10]:.4f}' in pair('--eval_only')[0]
    pair('--model=gpt --learning_rate=1 --patience=1 --eval_interval=1 --max_iters=50 --init_from=scratch')
    assert 'shards' not in load() and load()['counters']['step'] < 50


def test_blocks_are_evaluated_where_one_has_no_batch(pair):
    """What it computes in its place is of whole windows, which are cut into blocks."""
    flags = '--model=gpt --objective=block --max_iters=2 --eval_interval=2'
    pair(flags)
    train(ONE, flags, '--out_dir=one')
    assert metrics(key='val_loss') == pytest.approx(metrics('one', 'val_loss'), abs=1e-5)


@pytest.mark.parametrize('flags', ['', '--objective=masked'])
def test_samples_are_of_rounded_weights(pair, flags):
    """As they travel, on a CPU too."""
    out = pair('--model=gpt --dtype=bfloat16 --sample_interval=1 --max_iters=1', flags)[0]
    assert '--- sample at step 1\n' in out


def test_a_disk_that_is_full_for_one(pair):
    out = pair('--model=gpt', before='''
if rank == 1:
    fsync, calls = os.fsync, []
    def patched(file):
        calls.append(1)
        if len(calls) in (1, 3):
            raise OSError('no space left')
        fsync(file)
    os.fsync = patched''')[0]
    assert out.count('ckpt.pt could not be saved') == 2 and 'done: 20 steps' in out and sorted(os.listdir('out')) == [
        'best.pt', 'ckpt.pt', 'metrics.jsonl']


DIES = """                                                  # right after the first save in shards
save = checkpoint.save_checkpoint
def patched(path, *contents):
    save(path, *contents)
    if path.endswith('ckpt.pt'):
        os.kill(os.getpid(), 9)
checkpoint.save_checkpoint = patched"""


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_goes_on_with_another_number_of_processes(pair, optimizer):
    """Four are killed; two go on, or four, or two that share nothing, or one: each time the curve
    is that of one."""
    flags = f'--model=gpt --n_embd=64 --optimizer={optimizer} --max_iters=10'
    train(ONE, flags, '--out_dir=one')
    pair(flags, '--batch_size=1', world=4, before=DIES, statuses=None)
    os.rename('out', 'killed')
    for world, more in ((2, ''), (4, '--batch_size=1'), (2, '--parallel=ddp'), (1, '')):
        shutil.copytree('killed', 'out')
        if world == 1:
            train(ONE, flags)
        else:
            assert 'going on from out/ckpt.pt at step 5' in pair(flags, more, world=world)[0]
        assert 'shards' not in load() and not os.path.exists('out/ckpt.shards')
        assert_same_curve('out', 'one')
        shutil.rmtree('out')


STOPS = """
from mambino.train import progress                          # before the first step
progress.catch_stop_signals = lambda: [signal.SIGTERM]"""


def test_other_shares_have_the_same_bits(pair):
    """Weights and both optimizers' states, from shards and from a whole file: of four processes,
    three, two and one; three cannot have equal rows."""
    flags = '--model=hybrid --optimizer=muon --max_iters=10 --tokens_per_step=192 --batch_size=1'
    pair(flags, world=4, before=DIES, statuses=None)
    wanted = checkpoint.load_checkpoint('out/ckpt.pt')
    assert wanted['counters']['step'] == 5 and len(wanted['optimizers']) == 2
    for world in (3, 2):
        pair(flags, world=world, before=STOPS, statuses=(143,) * 3)
        ckpt = load()
        assert ckpt['counters']['step'] == 5 and 'shards' not in ckpt
        assert plain(ckpt['weights']) == plain(wanted['weights'])
        for ours, theirs in zip(ckpt['optimizers'], wanted['optimizers']):
            assert plain(ours['state']) == plain(theirs['state'])
    train(flags, '--learning_rate=1e-2')
    assert load()['counters']['step'] == 10


@pytest.fixture
def killed(pair, capsys):
    """In out/ a run that was killed right after it had saved in shards."""
    pair('--model=gpt', statuses=None, before=DIES)
    capsys.readouterr()


def test_shards_are_read_like_a_whole_file(killed, capsys):
    for source in ('out/ckpt.pt', 'out'):                   # best.pt has the same weights
        assert script('sample.py', f'--out_dir={source} --device=cpu --max_new_tokens=20 --temperature=0') == 0
    said = capsys.readouterr().out
    assert len(set(text.partition("\n\n")[2] for text in said.split('out_dir'))) <= 2
    ours, best = checkpoint.load_checkpoint('out/ckpt.pt'), checkpoint.load_checkpoint('out/best.pt')
    assert plain(ours['weights']) == plain(best['weights']) and plain(ours['optimizers']) == plain(best['optimizers'])
    assert ours['weights']['lm_head.weight'] is ours['weights']['model.embed_tokens.weight']


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_damaged_shards_are_one_line(killed, pair, capsys):
    folder = 'out/ckpt.shards/5'
    sound = {name: open(f'{folder}/{name}', 'rb').read() for name in os.listdir(folder)}
    metadata = shards.read_metadata(folder)
    elsewhere = copy.deepcopy(metadata)
    for place in elsewhere.storage_data.values():
        place.relative_path = '../../best.pt'
    huge = copy.deepcopy(metadata)
    for tensor in huge.state_dict_metadata.values():
        tensor.size = torch.Size([2**50])
    cases = {
        '.metadata': [(None, 'is missing'), (b'', 'not readable'), (sound['.metadata'][:-200], 'not readable'),
                      (pickle.dumps(Bomb()), 'mkdir'), (pickle.dumps({'x': os.system}), 'system'),
                      (pickle.dumps([]), 'not readable'), (pickle.dumps(elsewhere), 'elsewhere'),
                      (pickle.dumps(huge), 'not readable')],
        '__1_0.distcp': [(None, 'is missing'), (b'', 'not readable'),
                         (sound['__1_0.distcp'][:500], 'not readable'), (pickle.dumps(Bomb()) * 99, 'not readable')]}
    for file, contents in cases.items():
        for content, word in contents:
            if content is None:
                os.remove(f'{folder}/{file}')
            else:
                open(f'{folder}/{file}', 'wb').write(content)
            train('--model=gpt', status=2)
            refused(capsys, folder, word)
            assert not os.path.exists('executed')
        errs = pair('--model=gpt', statuses=None)[1::2]      # each looks at its own shard alone
        assert any(err.startswith(f'error: {folder}') and err.count('\n') == 1 for err in errs), errs
        open(f'{folder}/{file}', 'wb').write(sound[file])
    train('--model=gpt')


def test_what_does_not_fit_is_one_line(killed, pair, capsys):
    train('--model=gpt --out_dir=new --parallel=fsdp', status=2)
    refused(capsys, 'parallel=fsdp', 'torchrun')
    train('--model=gpt --out_dir=new --parallel=fdsp', status=2)
    refused(capsys, 'parallel=fdsp', 'ddp or fsdp')
    os.remove('out/ckpt.shards/5/__1_0.distcp')
    for err in pair('--model=gpt', statuses=(2, 2))[1::2]:
        assert err.startswith('error: out/ckpt.shards/5/__1_0.distcp: is missing') and err.count('\n') == 1
        assert 'out/best.pt: --init_from=out --out_dir=another' in err
    ckpt = load()                                           # of an older version
    torch.save(ckpt | dict(format=1, weights=None, optimizers=None, shards=dict(step=5, world=2)), 'out/ckpt.pt')
    for flags in ('', '--init_from=resume', '--init_from=out/ckpt.pt --out_dir=new'):
        train('--model=gpt', flags, status=2)
        refused(capsys, 'out/ckpt.pt', '2 processes', 'older version', 'out/best.pt')
    pair('--model=gpt --init_from=scratch --max_iters=5')
    assert os.path.exists('out/ckpt.shards.old') and 'shards' not in load()


def test_fp16_scales_alike_everywhere(pair):
    pair('--model=gpt --dtype=float16 --optimizer=muon')
    assert metrics(key='loss')[20] < metrics(key='loss')[1] and load()['scaler']['scale'] > 0


GATHERED = """                                              # what each layer's modules read in training
place = processes.place
def patched(net, *arguments):
    place(net, *arguments)
    for name, module in net.named_modules():
        for key in [key for key, p in module._parameters.items() if p is not None]:
            reads = functools.partial(read, f'{name}.{key}', key)
            module.register_forward_pre_hook(reads)
def read(name, key, module, args):
    if module.training and name not in seen:
        print('gathered', name, getattr(module, key).dtype)
        seen.add(name)
seen, processes.place = set(), patched
import functools"""


@pytest.mark.parametrize('flags', ['gpt --n_expert=4 --capacity_factor=0 --qk_norm=True', 'mamba', 'hybrid'])
def test_weights_travel_as_they_are_rounded(pair, flags):
    """In bf16 the matrices of products, and nothing else: the losses stay what those of ddp are."""
    flags = f'--model={flags} --n_embd=64 --n_layer=2 --dtype=bfloat16 --optimizer=adamw --max_iters=10'
    out = pair(flags, before=GATHERED)[0]
    gathered = dict(line.split()[1:] for line in out.split('\n') if line.startswith('gathered'))
    rounded = {name for name, dtype in gathered.items() if dtype == 'torch.bfloat16'}
    assert {name for name in gathered if '.layers.' in name and '_proj' in name} == rounded and len(rounded) >= 4
    weights = load()['weights']
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    pair(flags, '--parallel=ddp --out_dir=ddp')
    ours, theirs = metrics(key='loss'), metrics('ddp', 'loss')
    assert ours == pytest.approx(theirs, abs=0.02)
    for step in range(1, 5):                                # later bf16 makes others of any
        assert ours[step] == pytest.approx(theirs[step], abs=2e-4)
