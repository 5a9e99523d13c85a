"""What the page reads of a run's files: numbers that grow, logs, and how a run stands."""
import json
import os
import random

import pytest
from helpers.pace import seconds_of

from mambino.serve import curves, datasets, launch, recipes, runs
from mambino.serve.told import Refused
from mambino.train.report import read_samples

START = '$ python train.py --out_dir=out-a\n'
STATUS = 'step     {step}/100 | loss 4.0 | lr 1e-3 | norm 1.0 | 9,000 tok/s | MFU 1% | epoch 0.01 | left 0:01:21\n'


def write(path, text, mode='w'):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, mode, encoding='utf-8') as f:
        f.write(text)


def line(step, **values):
    return json.dumps(dict(step=step, **values)) + '\n'


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An empty folder, and in it the one of a run."""
    monkeypatch.chdir(tmp_path)
    os.mkdir('out-a')
    return 'out-a'


# --- numbers --------------------------------------------------------------------------------------

def test_a_line_that_is_half_written_waits(out):
    path = 'out-a/metrics.jsonl'
    log = runs.Metrics(path)
    assert not log.refresh() and log.curve('loss') == ([], [])
    whole = line(1, loss=5.0, tokens=64) + line(2, loss=4.0)
    write(path, whole[:-7])
    log.refresh()
    assert log.curve('loss') == ([1], [5.0])
    write(path, whole[-7:] + line(2, val_loss=4.5), 'a')
    assert not log.refresh()
    assert log.curve('loss') == ([1, 2], [5.0, 4.0])
    assert log.curve('val_loss') == ([2], [4.5])
    assert (log.best(), log.last('tokens'), log.last('none')) == (4.5, 64, None)


def test_a_log_that_was_cut_is_read_anew(out):
    """As by a run that goes on from a checkpoint: another file, that begins as the old one; also one that was
    made longer than the old one was meanwhile."""
    path = 'out-a/metrics.jsonl'
    log = runs.Metrics(path)
    write(path, ''.join(line(step, loss=step) for step in range(1, 11)))
    log.refresh()
    for last in (5, 50):
        write(path + '.new', ''.join(line(step, loss=-step) for step in range(1, last + 1)))
        os.replace(path + '.new', path)
        assert log.refresh()
        assert log.curve('loss') == (list(range(1, last + 1)), [-step for step in range(1, last + 1)])
    os.remove(path)
    assert log.refresh() and log.curve('loss') == ([], [])


def test_what_is_damaged_is_left_out(out):
    path = 'out-a/metrics.jsonl'
    write(path, 'no json\n[1]\n{"loss": 1}\n{"step": "x", "loss": 1}\n{"step": -1}\n\x00\n'
          + '{"step": 1, "loss": null, "lr": NaN, "a": true, "b": "x", "c": 1e999}\n' + '[' * 5000 + '\n'
          + line(3, loss=2))
    log = runs.metrics_of(out)
    assert log.columns == {'loss': ([3], [2])}
    assert log.damaged == 7


def test_thinned_keeps_each_peak():
    values = [random.Random(1).random() for _ in range(1000)]
    xs = list(range(100_000))
    ys = values * 100
    ys[77_777] = 99.0
    ys[12_345] = -99.0
    points = curves.thinned(xs, ys, 400)
    assert len(points) <= 400
    assert [77_777, 99.0] in points and [12_345, -99.0] in points
    assert points == sorted(points) and points[-1][0] == 99_999
    assert curves.thinned([1, 2], [3, 4], 400) == [[1, 3], [2, 4]]
    assert curves.thinned([], [], 400) == []


def test_smoothing_goes_on_where_it_was():
    values = [random.Random(2).random() for _ in range(50)]
    at_once = curves.Smoothing(0.9).of(values)
    in_parts = curves.Smoothing(0.9)
    assert in_parts.of(values[:20]) + in_parts.of(values[20:]) == at_once
    assert at_once[0] == pytest.approx(values[0])               # without a bias
    assert curves.Smoothing(0).of(values) == values
    assert curves.Smoothing(0.9).of([3.0] * 9) == pytest.approx([3.0] * 9)


def test_a_chart_is_sent_new_points_alone(out):
    path = 'out-a/metrics.jsonl'
    log = runs.Metrics(path)
    feed = curves.Feed(['~loss', 'val_loss'])
    assert feed.update(log) == (True, [[], []])
    write(path, line(1, loss=5) + line(2, loss=4))
    log.refresh()
    assert feed.update(log) == (False, [[[1, 5], [2, 4]], []])
    assert feed.update(log) is None
    write(path, line(3, loss=3) + line(3, val_loss=3.5), 'a')
    log.refresh()
    assert feed.update(log) == (False, [[[3, 3]], [[3, 3.5]]])
    write(path + '.new', line(1, loss=9))
    os.replace(path + '.new', path)
    log.refresh()
    assert feed.update(log) == (True, [[[1, 9]], []])


def test_a_chart_that_has_grown_long_is_drawn_anew(out):
    log = runs.Metrics('none')
    feed = curves.Feed(['loss'])
    feed.update(log)
    sent = 0
    for step in range(5 * curves.POINTS):
        log.add([line(step, loss=step).encode()])
        is_anew, (points,) = feed.update(log)
        sent = len(points) if is_anew else sent + len(points)
        assert sent <= 3 * curves.POINTS + 1
    assert sent < 3 * curves.POINTS


def test_a_hundred_thousand_lines(out):
    """Read, smoothed and thinned for five charts: seconds of computing."""
    values = dict(loss=3.14159265, lr=1e-3, grad_norm=1.5, tokens_per_s=9000.25, mfu=0.1, memory=5e8, epoch=0.5)
    write('out-a/metrics.jsonl', ''.join(line(step, tokens=step * 64, **values) for step in range(100_000)))

    def look():
        log = runs.metrics_of(out)
        names = ('~loss', 'lr', '~grad_norm', '~tokens_per_s', 'memory')
        return [curves.Feed([name, name.removeprefix('~')], 0.6).update(log) for name in names]
    charts, seconds = seconds_of(look)
    assert all(is_anew and all(0 < len(points) <= curves.POINTS for points in chart) for is_anew, chart in charts)
    assert seconds < 3
    _, seconds = seconds_of(look)           # once it is read
    assert seconds < 1


def test_numbers_over_tokens_and_hours(out):
    write('out-a/metrics.jsonl', line(1, loss=5, tokens=100, seconds=36) + line(3, loss=4, tokens=300, seconds=108)
          + line(2, val_loss=6) + line(3, val_loss=5))
    log = runs.metrics_of(out)
    assert curves.along(log, 'loss', 'step') == ([1, 3], [5, 4])
    assert curves.along(log, 'val_loss', 'tokens') == ([200.0, 300.0], [6, 5])
    assert curves.along(log, 'loss', 'hours') == ([0.01, 0.03], [5, 4])


def test_numbers_as_csv(out):
    write('out-a/metrics.jsonl', line(1, loss=5, lr=0.1) + line(2, loss=4) + line(2, val_loss=4.5))
    assert runs.as_csv(out) == 'step,loss,lr,val_loss\n1,5,0.1,\n2,4,,4.5\n'


# --- logs -----------------------------------------------------------------------------------------

def test_lines_come_once(out):
    lines = runs.Lines('out-a/train.log')
    assert lines.new() == (False, [])
    write('out-a/train.log', 'a\nb <b>c</b>\nhal')
    assert lines.new() == (True, ['a', 'b <b>c</b>'])
    assert lines.new() == (False, [])
    write('out-a/train.log', 'f\n1\r22\r333\n', 'a')
    assert lines.new() == (False, ['half', '333'])
    write('out-a/train.log', 'new\n')
    assert lines.new() == (True, ['new'])


def test_of_a_long_log_the_end(out):
    write('out-a/train.log', 'x' * 99 + '\n' + ''.join(f'{i:09}\n' for i in range(20_000)))
    _, found = runs.Lines('out-a/train.log').new()
    assert found[-1] == '000019999' and all(len(text) == 9 for text in found) and len(found) < 7000


def test_samples(out):
    text = (START + '--- sample at step 0\n\nabc\n---\n' + STATUS.format(step=1)
            + '--- sample at step 5\n<img src=x>\n---\nnot its end\nerror: of the text\n---\nstep 5: val loss 4.0\n'
            + '--- sample at step 9\nunfinished')
    write('out-a/train.log', text)
    assert read_samples(out) == [(5, '<img src=x>\n---\nnot its end\nerror: of the text'), (0, '\nabc')]
    assert 'of the text' not in runs.last_words(launch.training(out))       # it is no error of the run


# --- how a run stands -----------------------------------------------------------------------------

BEGUN = START + 'mamba: 2.79M parameters\n' + STATUS.format(step=10)
NAN = 'error: the loss or its gradient is not a finite number any more at step 12; no checkpoint was made yet. Try\n'
TORCH = ('Traceback (most recent call last):\n  File "train.py"\n'
         'RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can\'t allocate memory\n')
STANDINGS = {
    'complete': (BEGUN + 'done: 100 steps, 6,400 tokens, 0:00:29 of training; best val loss 4.8 in out-a/best.pt\n'
                 'to read what it writes: python sample.py\n', 'complete', 'Complete: 100 steps'),
    'complete before': (START + 'this run has made its 100 steps: raise --max_iters to go on\n', 'complete', 'all its'),
    'stopped': (BEGUN + 'stopped at step 10, saved out-a/ckpt.pt; to go on: python train.py\n', 'stopped', 'step 10'),
    'nan': (BEGUN + NAN, 'nan', 'NaN'),
    'memory of the script': (BEGUN + 'error: out of memory with 1 sequences at once; halve --block_size\n', 'memory',
                             'smaller batch'),
    'memory of torch': (BEGUN + TORCH, 'memory', 'Out of memory'),
    'memory it could do with less of': (BEGUN + '\nout of memory: going on with micro-batches of 4, 2 a step\n'
                                        'stopped at step 10, saved out-a/ckpt.pt; to go on: x\n', 'stopped', 'step 10'),
    'disk': (BEGUN + 'error: out-a: the finished model could not be saved; free some space: No space left on device\n',
             'disk', 'disk is full'),
    'disk while it waits': (BEGUN + 'out-a: no space is left for the finished model; it waits 10 minutes\n', 'disk',
                            'disk is full'),
    'disk full for a while': (BEGUN + 'warning: out-a/ckpt.pt could not be saved (No space left on device); the one\n'
                              'stopped at step 20, saved out-a/ckpt.pt; to go on: x\n', 'stopped', 'step 20'),
    'an error': (START + 'error: out_dir=out-a: unknown\n', 'failed', 'out_dir=out-a: unknown'),
    'a traceback': (BEGUN + 'Traceback (most recent call last):\n  File "x"\nKeyError: <b>\n', 'failed',
                    'KeyError: <b>'),
    'killed': (BEGUN, 'killed', 'without a word'),
    'killed at once': (START, 'killed', 'without a word'),
    'an error that was mended': (START + 'error: no\n' + BEGUN + 'stopped at step 3, saved x; to\n', 'stopped',
                                'step 3'),
}


@pytest.mark.parametrize('case', STANDINGS)
def test_standing_in_plain_words(case, out):
    text, state, words = STANDINGS[case]
    write('out-a/train.log', text)
    standing = runs.standing(out)
    assert (standing.state, standing.is_done) == (state, state == 'complete')
    assert words in standing.words
    assert not standing.can_go_on
    if state not in ('complete', 'failed'):
        assert 'No checkpoint' in standing.words
        open('out-a/ckpt.pt', 'w').close()
        assert 'It can go on' in runs.standing(out).words


def test_a_run_of_a_terminal(finished):
    """It has no log; its checkpoint tells all, and is read with its weights left on the disk."""
    standing = runs.standing('out')
    assert (standing.state, standing.words) == ('complete', 'Complete: 10 steps.')
    summary = runs.summary('out')
    assert (summary['kind'], summary['step'], summary['tokens']) == ('gpt', 10, 640)
    assert summary['best'] == pytest.approx(runs.facts_of('out')['best_loss'])
    assert runs.progress_of('out') == (10, 10, '')
    assert runs.settings_of('out')['n_embd'] == 32
    with open('out/ckpt.pt', 'wb') as f:
        f.write(b'PK no checkpoint')
    with open('out/best.pt', 'wb') as f:
        f.write(b'')
    assert runs.facts_of('out') == {}
    assert runs.summary('out')['state'] == 'unknown'


def test_differences_of_settings(out):
    for name, words in (('out-a', ['--n_layer=2', '--x=1']), ('out-b', ['--n_layer=3', '--x=1', '--y=<b>'])):
        write(f'{name}/started.json', json.dumps(dict(command=words)))
    assert runs.differences(['out-a', 'out-b']) == [('n_layer', ['2', '3']), ('y', ['—', '<b>'])]


def test_how_far_it_is(out):
    write('out-a/train.log', BEGUN)
    write('out-a/metrics.jsonl', line(10, tokens=640))
    assert runs.progress_of(out) == (10, 100, '0:01:21')


def test_how_a_dataset_stands(out):
    assert runs.made('x') is None
    for text, state in (('now: python train.py --dataset=x\n', 'complete'), ('error: x: nothing readable\n', 'failed'),
                        ('reading 1 of 2 MB\n', 'killed'), ('error: x: No space left on device\n', 'disk')):
        write('data/x.log', '$ python prepare.py\nold\n$ python prepare.py\n' + text)
        assert runs.made('x').state == state


# --- datasets, settings ---------------------------------------------------------------------------

def test_what_a_dataset_is(here):
    assert set(datasets.names()) == {'tiny', 'other', 'more'}
    facts = datasets.facts_of('tiny')
    assert facts['tokenizer'] == 'char' and facts['train'] > facts['val'] > 0
    looks = datasets.windows('tiny', 3, seed=1)
    assert len(looks) == 3
    assert all(text for _, text in looks)
    assert sum(count for _, count in datasets.lengths('tiny')) == facts['documents']
    for name in ('none', '../data/tiny', '/etc', ''):
        with pytest.raises(datasets.NoDataset):
            datasets.facts_of(name)
    write('data/tiny/meta.json', '{"splits": []}')
    with pytest.raises(datasets.NoDataset):
        datasets.facts_of('tiny')


def test_a_folder_is_listed(out):
    write('out-a/<b>.txt', 'abc')
    os.mkdir('out-a/z')
    write('out-a/.hidden', '')
    os.symlink('nowhere', 'out-a/link')
    entries, more = datasets.listing('out-a')
    assert [(entry.name, entry.is_folder, entry.size) for entry in entries] == [('z', True, 0), ('<b>.txt', False, 3)]
    assert more == 0


def test_every_setting_of_train_is_there():
    settings = recipes.all_settings()
    assert {'model', 'learning_rate', 'gradient_checkpointing', 'seed'} <= settings.keys()
    assert settings['learning_rate'].default == 0.0 and 'optimizer' in settings['learning_rate'].heading
    assert settings['save_minutes'].comment.startswith('minutes after which')


def test_a_choice_is_a_recipe_and_its_changes():
    recipe = recipes.recipe_of('quick')
    choice = recipes.Choice(recipe, {'n_layer': '4', 'n_embd': '128', 'dropout': '0.1'})
    assert choice.changed == {'n_embd': '128', 'dropout': '0.1'}        # 4 layers are the recipe's
    assert choice.arguments() == [recipe, '--n_embd=128', '--dropout=0.1']
    choice.set('dropout', '0')
    choice.set('gradient_checkpointing', 'true')
    choice.set('none', '1')
    assert choice.arguments() == [recipe, '--n_embd=128', '--gradient_checkpointing=true']
    choice.take('')
    assert choice.base['n_layer'] == '0' and choice.value('n_embd') == '128'
    with pytest.raises(Refused, match='no such recipe'):
        choice.take('/etc/passwd')


@pytest.mark.parametrize('name, text, words', [
    ('max_iters', 'many', 'expected a whole number'), ('max_iters', '1e4', ''), ('learning_rate', '1', ''),
    ('learning_rate', 'nan', 'nan is not'), ('tie_embeddings', 'maybe', 'true or false'), ('model', 'x', ''),
    ('gradient_checkpointing', 'none', ''), ('max_iters', '9' * 40, 'below 2**63')])
def test_values_are_checked_by_the_configurator(name, text, words):
    found = recipes.problem_with(recipes.all_settings()[name], text)
    assert words in found and bool(found) == bool(words)


def test_profiles_have_recipes():
    for profile in recipes.PROFILES:
        for kind in recipes.KINDS:
            rows = dict((name, value) for name, value, _ in recipes.profile_settings(profile, kind))
            assert rows['model'] == kind
            if profile.endswith('GB'):
                assert rows['vram'] == profile.split()[0]
