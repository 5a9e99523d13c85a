"""prepare.py stopped, killed, starved: the same command goes on, and makes the same dataset."""
import functools
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import zipfile
from types import SimpleNamespace

import pytest
from helpers import kills
from helpers.prepare import (
    DIES,
    DIES_EARLY,
    command,
    dataset,
    driven,
    environment,
    files,
    jsonl,
    nobody_left,
    one_line,
    parquet,
    parts,
    posix,
    prepare,
    processes_in,
    prose,
    running,
    wait_for,
    write,
)


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """Files of most kinds, 12 MB in several parts, and the dataset that an undisturbed run by two
    processes makes of it.
    """
    folder = tmp_path_factory.mktemp('mixed')
    for i in range(300):
        write(folder / 'mine' / 'small' / f'{i}.md', f'# Note {i}\r\n' + prose(700, i))
    for i in range(3):
        write(folder / 'mine' / f'book{i}.txt', prose(1_500_000, 1000 + i))
    write(
        folder / 'mine' / 'rows.jsonl',
        jsonl(*(f'{i % 700}: ' + prose(3000, 2000 + i % 700) for i in range(1000))),
    )
    parquet(
        folder / 'mine' / 'rows.parquet',
        text=[f'{i}. ' + prose(2000, 4000 + i) for i in range(1500)],
        n=list(range(1500)),
    )
    for i in range(5):
        write(
            folder / 'mine' / 'pages' / f'{i}.html', f'<h1>Page {i}</h1><p>' + prose(2000, 6000 + i)
        )
    with gzip.open(folder / 'mine' / 'packed.txt.gz', 'wb') as f:
        f.write(prose(600_000, 7000).encode())
    write(folder / 'mine' / 'cut.txt.gz', gzip.compress(prose(900_000, 7001).encode())[:-2000])
    prepare(folder, 'mine', '--workers=2', '--out=data/whole')
    return SimpleNamespace(folder=folder, files=files(folder / 'data' / 'whole'))


@pytest.mark.parametrize('workers', [1, 4])
def test_same_bytes_whatever_the_number_of_processes(mixed, workers):
    prepare(mixed.folder, 'mine', f'--workers={workers}', f'--out=data/by{workers}')
    made = dataset(mixed.folder / 'data' / f'by{workers}')
    assert files(mixed.folder / 'data' / f'by{workers}') == mixed.files
    assert {name: kind['files'] for name, kind in made.meta['kinds'].items()} == {
        'text': 304,
        'jsonl': 1,
        'parquet': 1,
        'html': 5,
    }
    assert made.meta['copies'] == 300 and made.tok.vocab_size == 4096


# -----------------------------------------------------------------------------
# Whatever moment it is

EVENTS = {  # in the order of a run: what lies in its <out>.partial by then
    'begins': lambda partial: (partial / 'prepare.lock').exists(),
    'reads': lambda partial: any(partial.glob('*.tmp.rows')),
    'has read a part': lambda partial: parts(partial) > 0,
    'has read all': lambda partial: (partial / 'all.rows').exists(),
    'has a tokenizer': lambda partial: (partial / 'tokenizer' / 'tokenizer.json').exists(),
    'encodes': lambda partial: any(file.stat().st_size for file in partial.glob('dataset/train.bin')),
    'has encoded': lambda partial: (partial / 'written').exists(),
}


def wait_for_event(process, event, partial):
    """Until it has come, or the process has ended."""
    wait_for(lambda: EVENTS[event](partial) or process.poll() is not None, 120)


@posix
@pytest.mark.parametrize('events', [
    ('has read a part', 'has read all', 'encodes'), ('reads', 'has a tokenizer', 'has encoded'), ('begins',)])
def test_killed_at_any_moment(mixed, events):
    """kill -9 to the one process, again and again; then the same command makes what an undisturbed
    run does.
    """
    out = mixed.folder / 'data' / f'killed as it {events[0]}'
    partial = out.with_name(out.name + '.partial')
    argv = ('mine', '--workers=2', f'--out={out}')
    said = ''
    for event in events:
        with running(mixed.folder, *argv) as process:
            wait_for_event(process, event, partial)
            process.kill()
            said += process.communicate(timeout=120)[0]
            assert nobody_left(mixed.folder)
        if out.exists():                # it was quicker than this test
            assert files(out) == mixed.files
        else:
            assert partial.is_dir()
    said += prepare(mixed.folder, *argv)
    assert files(out) == mixed.files
    assert dataset(out)
    assert events == ('begins',) or 'going on: ' in said


@posix
@pytest.mark.parametrize('number, code, workers', [
    (signal.SIGINT, 130, 1), (signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 2)])
def test_told_to_stop(mixed, number, code, workers):
    """Ctrl-C, which reaches the whole process group, and kill: in one line, and nothing is lost.

    Prompt it is by what it still does, not by a clock: all its processes are halted, told, and go
    on; then each reads at most to the end of the part it has begun, and no next stage is entered.
    """
    out = f'data/stopped{code}-{workers}'
    (mixed.folder / out).mkdir(parents=True)
    for name, data in (('train.bin', b'old'), ('val.bin', b'old'), ('meta.json', b'{}')):
        (mixed.folder / out / name).write_bytes(data)
    argv = ('mine', f'--workers={workers}', f'--out={out}')
    partial = mixed.folder / f'{out}.partial'

    def workers_are_there():
        lines = processes_in(mixed.folder).values()
        return workers == 1 or any('spawn_main' in line for line in lines)

    def has_come(stage, parts_before):
        if stage == 'begins':
            return partial.exists() and workers_are_there()
        return (partial / 'tokenizer').exists() or stage == 'reads' and parts(partial) > parts_before

    for stage in ('begins', 'reads', 'learns') if workers > 1 else ('reads',):
        parts_before = parts(partial)
        shutil.rmtree(partial / 'tokenizer', ignore_errors=True)
        with running(mixed.folder, *argv) as process:
            wait_for(functools.partial(has_come, stage, parts_before), 120)
            os.killpg(process.pid, signal.SIGSTOP)
            parts_read, learns = parts(partial), (partial / 'tokenizer').exists()
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            os.killpg(process.pid, signal.SIGCONT)
            err = process.communicate(timeout=120)[1]
            assert process.returncode == code, (stage, err)
            assert parts(partial) <= parts_read + workers, stage
            assert learns or not (partial / 'tokenizer').exists(), stage
            assert not (partial / 'dataset').exists(), stage
            if code == 130:
                assert one_line(err, 'goes on from here').startswith('stopped')
            else:
                assert err == ''
            assert nobody_left(mixed.folder)
        assert (mixed.folder / out / 'train.bin').read_bytes() == b'old'
        assert (stage == 'begins' or partial.is_dir())
    assert 'going on: ' in prepare(mixed.folder, *argv)
    assert files(mixed.folder / out) == mixed.files
    assert not partial.exists()


@posix
@pytest.mark.parametrize('limit, workers', [(100_000, 1), (100_000, 2), (3_000_000, 1)])
def test_full_disk(tmp_path, limit, workers):
    """Files can grow no further: while reading, and while writing the ids; which take four times
    the room.
    """
    import resource
    rng = random.Random(5)
    for i in range(3):
        write(tmp_path / 'in' / f'{i}.txt', ''.join(rng.choices('abcdefghijklmnop \n', k=600_000)))
    argv = ('in', '--tokenizer=byte', '--val_fraction=0.5', f'--workers={workers}')
    prepare(tmp_path, *argv, '--out=data/whole')
    write(tmp_path / 'old' / 'a.txt', 'an old text ' * 20)
    prepare(tmp_path, 'old', '--out=data/x', '--tokenizer=byte')
    old = files(tmp_path / 'data' / 'x')

    def starve():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    said = prepare(tmp_path, *argv, '--out=data/x', code=2, preexec_fn=starve)
    assert 'File too large' in said and 'nothing was changed' in said
    assert 'goes on from here' in said
    assert files(tmp_path / 'data' / 'x') == old
    # where not even one part was read, nothing is kept
    assert (tmp_path / 'data' / 'x.partial').is_dir() == (limit > 100_000)
    assert nobody_left(tmp_path)
    said = prepare(tmp_path, *argv, '--out=data/x')
    assert files(tmp_path / 'data' / 'x') == files(tmp_path / 'data' / 'whole')
    assert dataset(tmp_path / 'data' / 'x')
    assert limit < 1_000_000 or 'going on: ' in said


@posix
def test_two_at_once(mixed):
    argv = ('mine', '--workers=2', '--out=data/both')
    partial = mixed.folder / 'data' / 'both.partial'
    with running(mixed.folder, *argv) as first:
        wait_for(lambda: parts(partial))
        os.killpg(first.pid, signal.SIGSTOP)     # it is at work until it is told to go on
        for other in argv, (*argv, '--append'), ('mine', '--out=data/both', '--tokenizer=byte'):
            said = prepare(mixed.folder, *other, code=2)
            assert f'prepare.py (process {first.pid} on ' in said or '--append' in other
            assert parts(partial)
        os.killpg(first.pid, signal.SIGCONT)
        out, err = first.communicate(timeout=120)
        assert first.returncode == 0, err
    assert files(mixed.folder / 'data' / 'both') == mixed.files


@posix
def test_a_worker_that_dies(mixed):
    """For want of memory, say: one line, and the same command goes on."""
    argv = ('mine', '--workers=2', '--out=data/died')
    partial = mixed.folder / 'data' / 'died.partial'
    with running(mixed.folder, *argv) as process:
        wait_for(lambda: parts(partial))
        os.killpg(process.pid, signal.SIGSTOP)
        os.kill(
            next(pid for pid, line in processes_in(mixed.folder).items() if 'spawn_main' in line),
            signal.SIGKILL,
        )
        os.killpg(process.pid, signal.SIGCONT)
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert one_line(err, 'the same command goes on from here').startswith('error: ')
    assert 'going on: ' in prepare(mixed.folder, *argv)
    assert files(mixed.folder / 'data' / 'died') == mixed.files


# -----------------------------------------------------------------------------
# One moment

@pytest.mark.parametrize('commit', [True, False])
def test_going_on_in_the_middle_of_encoding(corpus, commit):
    write(corpus / 'mine' / 'rows.jsonl', jsonl(*(prose(500, i) for i in range(300))))
    prepare(corpus, 'mine', '--vocab_size=300', '--out=data/a')
    for block in (1, 4):
        driven(
            corpus, DIES.format(commit=commit, block=block),
            'mine', '--vocab_size=300', '--out=data/b', code=9)
    assert not (corpus / 'data' / 'b').exists()
    said = driven(corpus, 'spool.BLOCK = 20_000', 'mine', '--vocab_size=300', '--out=data/b')
    assert ('going on: 4 of 8 blocks were encoded before' in said) == commit
    assert 'parts were read before' in said
    assert 'tokenizer ' not in said  # it was made
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')


def test_another_run_between_is_not_mistaken_for_this_one(corpus):
    """Killed; killed with other settings before they wrote anything down; then the first ones
    again.
    """
    write(corpus / 'mine' / 'rows.jsonl', jsonl(*(prose(500, i) for i in range(300))))
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a')
    driven(
        corpus, DIES.format(commit=True, block=4),
        'mine', '--tokenizer=byte', '--out=data/b', code=9)
    driven(
        corpus, DIES.format(commit=False, block=2),
        'mine', '--vocab_size=300', '--out=data/b', code=9)
    driven(corpus, 'spool.BLOCK = 20_000', 'mine', '--tokenizer=byte', '--out=data/b')
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')


def test_changed_files_are_read_again(corpus):
    driven(corpus, DIES_EARLY, 'mine', '--tokenizer=byte', code=9)
    write(corpus / 'mine' / '1' / '1.txt', 'something else by now')
    prepare(corpus, 'mine', '--tokenizer=byte')
    assert 'something else by now' in dataset(corpus / 'data' / 'mine').all


@pytest.mark.skipif(os.name != 'posix', reason='there, the time of an entry is that of its making')
def test_a_file_that_another_of_the_same_time_replaced_is_read_again(corpus):
    """As by cp -p, of the same length too."""
    path = corpus / 'mine' / '1' / '1.txt'
    text = path.read_text(encoding='utf-8')
    driven(corpus, DIES_EARLY, 'mine', '--tokenizer=byte', code=9)
    status = path.stat()
    write(path, text.replace('document', 'DOCUMENT'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    prepare(corpus, 'mine', '--tokenizer=byte')
    assert text.replace('document', 'DOCUMENT') in dataset(corpus / 'data' / 'mine').all


def test_what_lies_in_its_own_input_is_no_input(corpus):
    """`out` within a folder that is read: neither a broken run's journal nor the dataset changes
    what is found.
    """
    prepare(corpus, 'mine', '--out=mine/data', '--tokenizer=byte')
    first = files(corpus / 'mine' / 'data')
    shutil.rmtree(corpus / 'mine' / 'data')
    driven(corpus, DIES_EARLY, 'mine', '--out=mine/data', '--tokenizer=byte', code=9)
    for _ in range(2):
        prepare(corpus, 'mine', '--out=mine/data', '--tokenizer=byte')
        assert files(corpus / 'mine' / 'data') == first
        assert len(dataset(corpus / 'mine' / 'data').all) == 60
    write(corpus / 'mine' / 'other' / 'prepare.lock', '')
    # a dataset of another is no input either
    prepare(corpus, 'mine', '--out=data/x', '--tokenizer=byte')
    made = dataset(corpus / 'data' / 'x')
    assert len(made.all) == 60
    assert 'a prepared dataset' in [entry['reason'] for entry in made.meta['skipped']]


BETWEEN = '''
output.exchange.exchange = lambda *args: False  # of systems that have no such thing
rename, count = os.rename, []
def stop(a, b):
    rename(a, b)
    count.append(b)
    if len(count) == {n}:
        os._exit(9)
os.rename = stop
'''


@pytest.mark.parametrize('append', [False, True])
@pytest.mark.parametrize('n', [1, 2])
def test_killed_between_the_renames(corpus, append, n):
    prepare(corpus, 'mine/1', '--vocab_size=300')
    old = files(corpus / 'data' / '1')
    write(corpus / 'new' / 'a.txt', 'something new')
    write(corpus / 'new' / 'b.txt', 'and something else')
    argv = ('new', '--out=data/1', *(['--append'] if append else []))
    shutil.copytree(corpus / 'data' / '1', corpus / 'data' / '2')
    prepare(corpus, *argv[:1], '--out=data/2', *argv[2:])
    new = files(corpus / 'data' / '2')
    driven(corpus, BETWEEN.format(n=n), *argv, code=9)
    if n == 1:
        assert not (corpus / 'data' / '1').exists()
        assert files(corpus / 'data' / '1.partial' / 'old') == old
    prepare(corpus, *argv)
    assert files(corpus / 'data' / '1') == new and dataset(corpus / 'data' / '1')


@posix
@pytest.mark.parametrize('act', [kills.die, kills.no_room, kills.interrupt])
def test_stopped_at_any_change_to_the_disk(tmp_path, act):
    """kill -9, a full disk and Ctrl-C at every eleventh of them; at all of them: python tests/helpers/kills.py"""
    states = kills.prepare_inputs(tmp_path)
    before, wanted = 'b', 'a'
    for n in range(0, 100, 11):
        if not kills.try_change(tmp_path, states, before, wanted, n, act):
            break
        before, wanted = wanted, before
    assert n > 40


@posix
def test_nobody_takes_what_is_said(corpus):
    """stdout is closed, or a pipe that nobody reads, or on a full disk: the dataset is made all the same."""
    env = environment(PYTHONUNBUFFERED='')
    reader, pipe = os.pipe()
    os.close(reader)
    full = os.open('/dev/full', os.O_WRONLY) if os.path.exists('/dev/full') else pipe
    for name, settings in (
            ('closed', {'preexec_fn': lambda: os.close(1)}), ('pipe', {'stdout': pipe}), ('full', {'stdout': full})):
        argv = command('mine', '--tokenizer=byte', f'--out=data/{name}')
        done = subprocess.run(argv, cwd=corpus, stderr=subprocess.PIPE, text=True, env=env, **settings)
        assert done.returncode == 0, (name, done.stderr)
        assert name == 'closed' or done.stderr.startswith('note: standard output takes no more'), done.stderr
        assert done.stderr.count('\n') == (name != 'closed'), done.stderr
        assert dataset(corpus / 'data' / name)


@posix
def test_archives_need_no_temporary_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        for i in range(3):
            archive.writestr(f'{i}.txt', f'some text {i} ' * 20)
    status, said = kills.forked(
        tmp_path, ['a.zip', '--tokenizer=byte', '--out=x'], lambda: setattr(tempfile, 'tempdir', '/nowhere'))
    assert status == 0, said
    assert len(dataset(tmp_path / 'x').all) == 3


def test_a_mistake_costs_no_journal(corpus):
    """A run was stopped; then the command is mistyped."""
    driven(corpus, DIES_EARLY, 'mine', '--vocab_size=300', code=9)
    for wrong in ('--pdf=word', '--vocab_size=3', '--tokenizer=bpee', '--engine=rai'):
        prepare(corpus, 'mine', '--vocab_size=300', wrong, code=2)
    assert 'going on: ' in prepare(corpus, 'mine', '--vocab_size=300')


@pytest.mark.parametrize('ending', ['.text', '.rows', '.json'])
def test_a_power_cut_emptied_a_file_of_the_journal(corpus, ending):
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a')
    driven(corpus, DIES_EARLY, 'mine', '--tokenizer=byte', '--out=data/b', code=9)
    part = next(
        path
        for path in (corpus / 'data' / 'b.partial').iterdir()
        if path.suffix == ending and path.stem != 'all'
    )
    part.write_bytes(b'')
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/b')
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')


def test_what_the_disk_refused_is_asked_again(corpus):
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a')
    path = corpus / 'mine' / '1' / '1.txt'
    fails = f'''
import builtins
real = builtins.open
def refuse(path, *args, **more):
    if str(path) == {os.path.join('mine', '1', '1.txt')!r}:
        raise OSError(5, 'Input/output error')
    return real(path, *args, **more)
files.open = refuse
''' + DIES_EARLY

    driven(corpus, fails, 'mine', '--tokenizer=byte', '--out=data/b', code=9)
    reports = [json.loads(p.read_text()) for p in (corpus / 'data' / 'b.partial').glob('*.json')]
    assert [os.path.basename(e['file']) for r in reports for e in r['skipped']] == [path.name]
    assert any(r['again'] for r in reports)
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/b')
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')


def test_a_stopped_run_leaves_no_tokenizer_of_another_split(tmp_path):
    """One document, cut elsewhere: the tokenizer has learnt from another text."""
    write(tmp_path / 'one.txt', prose(5000, 1) + 'but then something else, ' * 500)
    argv = ('one.txt', '--vocab_size=400')
    driven(
        tmp_path, 'output.encode = lambda *args: os._exit(9)', *argv, '--val_fraction=0.1',
        '--out=data/b', code=9)
    for name in 'a', 'b':
        prepare(tmp_path, *argv, '--val_fraction=0.7', f'--out=data/{name}')
    assert files(tmp_path / 'data' / 'a') == files(tmp_path / 'data' / 'b')
