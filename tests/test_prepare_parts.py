"""Files that prepare.py reads in parts: each has its place in the journal, and what is judged is the
file.
"""
import json

import pytest
from helpers.prepare import (
    DIES_EARLY,
    dataset,
    driven,
    files,
    jsonl,
    nobody_left,
    parts,
    posix,
    prepare,
    prose,
    write,
)

from mambino.prepare import account, extract, screen, spool
from mambino.prepare.sources import Source

# a line is a document, but those that begin with 'bad'; in parts of about 1,000 bytes
IN_LINES = '''
from mambino.prepare import readers, survey
def read_lines(path, options, notes):
    begin, end = options.get('part', [0, None])
    with open(path, 'rb') as f:
        f.seek(begin)
        data = f.read() if end is None else f.read(end - begin)
    for line in data.decode().split('\\n'):
        if line.startswith('bad'):
            notes.lose(1, 'lines were bad')
        elif line:
            yield line, True
    notes.facts['columns'] = 'line'
readers.READERS['text'] = read_lines
def look(sources, options):
    with open('looked.txt', 'a') as f:
        f.write('looked\\n')
    plans = []
    for source in sources:
        data = open(source.path, 'rb').read()
        cuts = [0]
        while len(data) - cuts[-1] > 1000:
            cuts.append(data.index(b'\\n', cuts[-1] + 900) + 1)
        parts = [[a, b] for a, b in zip(cuts, [*cuts[1:], len(data)])]
        plans.append({'parts': parts} if IN_PARTS and len(parts) > 1 else {})
    return sources, plans, []
survey.survey = look
IN_PARTS = True
extract.TASK_BYTES = 1500
'''
WHOLE = IN_LINES + 'IN_PARTS = False\n'
DIES_AFTER = '''
done = []
real = spool.extract
def some(task):
    if len(done) == {n}:
        os._exit(9)
    done.append(task)
    return real(task)
spool.extract = some
'''


@pytest.fixture
def lines(tmp_path):
    """Three files of lines, one of them large."""
    for name, n in ('a', 5), ('b', 400), ('c', 30):
        text = ''.join(f'line {i} of {name} has some words {i * i}\n' for i in range(n))
        write(tmp_path / 'in' / f'{name}.txt', text)
    return tmp_path


ARGV = ('in', '--tokenizer=byte')


def test_the_same_in_parts_and_in_one(lines):
    driven(lines, WHOLE, *ARGV, '--out=data/a')
    driven(lines, IN_LINES, *ARGV, '--out=data/b')
    assert files(lines / 'data' / 'a') == files(lines / 'data' / 'b')
    made = dataset(lines / 'data' / 'b')
    assert len(made.all) == 435 and made.meta['kinds']['text']['files'] == 3
    assert [(item['facts'], item['files']) for item in made.meta['decided']] == [({'columns': 'line'}, 3)]


def test_killed_in_the_middle_of_a_file(lines):
    driven(lines, IN_LINES, *ARGV, '--out=data/a')
    for n in 4, 5:
        driven(lines, IN_LINES + DIES_AFTER.format(n=n), *ARGV, '--out=data/b', code=9)
    said = driven(lines, IN_LINES, *ARGV, '--out=data/b')
    assert 'going on: 9 of ' in said
    assert files(lines / 'data' / 'a') == files(lines / 'data' / 'b')
    assert (lines / 'looked.txt').read_text() == 'looked\n' * 2  # nor is what they are found out again


def test_what_was_looked_at_is_looked_at_again_where_it_changed(lines):
    driven(lines, IN_LINES + DIES_EARLY, *ARGV, code=9)
    write(lines / 'in' / 'a.txt', 'another line\n')
    driven(lines, IN_LINES, *ARGV)
    assert (lines / 'looked.txt').read_text() == 'looked\n' * 2
    assert 'another line' in dataset(lines / 'data' / 'in').all


def test_a_file_is_judged_by_all_its_parts(lines):
    """A fifth of it may be lost, wherever that is; where it is more, no part of it is taken."""
    good = ''.join(f'line {i} of it\n' for i in range(400))
    write(lines / 'in' / 'few.txt', 'bad line\n' * 70 + good)
    write(lines / 'in' / 'many.txt', good.replace('it', 'many') + 'bad line\n' * 120)
    for name, patch in ('parts', IN_LINES), ('whole', WHOLE):
        driven(lines, patch, *ARGV, f'--out=data/{name}')
        made = dataset(lines / 'data' / name)
        assert len(made.all) == 435 + 400 and not any('many' in text for text in made.all)
        assert [note['note'] for note in made.meta['notes']] == ['70 lines were bad']
        assert [entry['reason'] for entry in made.meta['skipped']] == \
            ['too much of it is lost: 120 lines were bad of 520']
    assert files(lines / 'data' / 'parts') == files(lines / 'data' / 'whole')


def test_the_characters_of_a_file_that_is_dropped_are_not_in_the_vocabulary(lines):
    write(lines / 'in' / 'many.txt', ''.join(f'λ {i} of it\n' for i in range(400)) + 'bad line\n' * 120)
    driven(lines, IN_LINES, 'in', '--tokenizer=char')
    assert 'λ' not in dataset(lines / 'data' / 'in').tok.text


def entry(**more):
    return {
        'file': 'a', 'kind': 'jsonl', 'part': None, 'rows': [0, 1], 'documents': 1, 'copies': 0, 'dropped': 0,
        'separators': 0, 'taken': 1, 'lost': {}, 'facts': {}, 'notes': [], 'skip': '', 'suspect': [0, ''],
        'sample': '', 'chars': '',
    } | more


def test_notes_of_parts_are_summed():
    file = account.whole([
        entry(notes=['3 rows without text', 'a guess'], taken=5, lost={'lines were bad': 1}),
        entry(notes=['1,004 rows without text', 'a guess'], taken=5, lost={'lines were bad': 1}, sample='b')])
    assert file['notes'] == ['1,007 rows without text', 'a guess', '2 lines were bad']
    assert (file['taken'], file['sample'], file['skip']) == (10, 'b', '')


def test_parts_that_cannot_be_read():
    bad = entry(documents=0, skip='truncated')
    assert account.whole([bad, bad])['skip'] == 'truncated'
    assert account.whole([bad, entry(), entry()])['skip'] == '1 of 3 parts cannot be read: truncated'
    file = account.whole([bad, *[entry()] * 9])
    assert file['skip'] == '' and file['notes'] == ['1 of 10 parts could not be read: truncated']
    assert account.whole([entry(documents=0)])['skip'] == 'empty'


def test_rows_that_are_mostly_the_same_are_noted(tmp_path):
    write(tmp_path / 'a.jsonl', ''.join(json.dumps({'text': f'page {i % 3} not found'}) + '\n' for i in range(60)))
    prepare(tmp_path, 'a.jsonl', '--tokenizer=byte')
    notes = [note['note'] for note in dataset(tmp_path / 'data' / 'a').meta['notes']]
    assert '57 of 60 documents are the same as earlier ones' in notes


def test_the_largest_are_read_first_and_counted_once(tmp_path):
    options = {'pdf': 'auto'}
    sources = [Source('a', 'text', 10, 0), Source('b', 'jsonl', 70_000_000, 0), Source('c', 'text', 20, 0)]
    parts = [[i, i + 1] for i in range(7)]
    tasks = extract.make_tasks(sources, [{}, {'columns': ['x'], 'parts': parts}, {}], str(tmp_path), options, 1, False)
    assert sum(sum(task['sizes']) for task in tasks) == 70_000_030
    plans = [plan for task in tasks for plan in task['plans']]
    assert plans == [{}, *({'columns': ['x'], 'part': part} for part in parts), {}]
    assert len({task['key'] for task in tasks}) == len(tasks) == 9


def test_a_task_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, 'PULSE', 0)
    write(tmp_path / 'a.txt', 'some words ' * 300_000)
    source = Source(str(tmp_path / 'a.txt'), 'text', 3_300_000, 0)
    said = []

    class Screen(screen.Screen):
        def passed(self, pieces):
            for piece in super().passed(pieces):
                yield piece
                said.append(spool.unfinished(tmp_path))

    monkeypatch.setattr(screen, 'Screen', Screen)
    options = {'pdf': 'auto', 'max_file_mb': 256, 'text_column': '', 'encoding': ''}
    task, = extract.make_tasks([source], [{}], str(tmp_path), options, 1, False)
    assert spool.extract(task) == 3_300_000
    assert said == sorted(said) and 0 < said[-1] <= 3_300_000 and spool.unfinished(tmp_path) == 0


KILLED_AFTER_A_PART = '''
from mambino.prepare import pool
map_tasks = pool.map_tasks
def killed(function, *args, **more):
    for result in map_tasks(function, *args, **more):
        if function is spool.extract:
            os.kill(os.getpid(), 9)
        yield result
pool.map_tasks = killed
'''


@posix
@pytest.mark.slow
def test_one_large_file_killed_twice(tmp_path):
    """kill -9 while it is read: what was read of it is not read again, and the dataset is that of one
    process that was left alone.
    """
    rows = jsonl(*(f'{i} ' + prose(3000, i) for i in range(300)))
    write(tmp_path / 'big.jsonl', rows * 28)
    argv = ('big.jsonl', '--tokenizer=byte', '--dedupe=False')
    partial = tmp_path / 'data' / 'b.partial'
    read = []
    for _ in range(2):
        driven(tmp_path, KILLED_AFTER_A_PART, *argv, '--workers=2', '--out=data/b', code=-9)
        assert nobody_left(tmp_path)
        read.append(parts(partial))
    assert 0 < read[0] < read[1] <= 3 and not (tmp_path / 'data' / 'b').exists()
    assert f'going on: {read[1]} of 3 parts' in prepare(tmp_path, *argv, '--workers=2', '--out=data/b')
    prepare(tmp_path, *argv, '--workers=1', '--out=data/a')
    assert files(tmp_path / 'data' / 'a') == files(tmp_path / 'data' / 'b')
    assert len(dataset(tmp_path / 'data' / 'a').all) == 28 * 300
