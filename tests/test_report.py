"""report.py, progress.py: what a person sees of a run."""
import io
import json
import os
import re
import subprocess
import sys

import pytest
from helpers.prepare import ROOT, dataset, jsonl, prepare, wait_for, write

from mambino.configurator import fail
from mambino.prepare import progress, report
from mambino.prepare.sources import Source


def entries(name, *pairs):
    return [{'file': file, name: text} for file, text in pairs]


def test_all_reasons_are_shown(capsys):
    skipped = entries('reason', *((f'a/{i}.x', f'reason {"abcdefghijkl"[i]}') for i in range(12)),
                      *((f'b/{i}', f'unknown type .{"jpg" if i % 3 else "png"}') for i in range(6)),
                      ('c', 'most of it is lost: 17 rows of 20'), ('d', 'most of it is lost: 3 rows of 9'),
                      ('e', 'a secret (*.pem); name the file'), ('f', 'a secret (.env); name the file'))
    report.show_skipped(skipped)
    said = capsys.readouterr().out
    assert said.startswith('skipped 22:\n        6  unknown type .jpg (4), .png (2): b/0, ...\n')
    assert all(f'        1  reason {letter}: a/' in said for letter in 'abcdefghijkl')
    assert '2  most of it is lost: 17 rows of 20, and the like: c, ...' in said
    assert '2  a secret (*.pem (1), .env (1)); name the file: e, ...' in said
    assert report.reasons(skipped).count(',') > 12


def test_notes_keep_their_numbers(capsys):
    report.show_notes(entries(
        'note', ('a.jsonl', '17 lines were no JSON'), ('b.jsonl', '3 lines were no JSON'),
        ('c.txt', 'encoding guessed: cp1252'), ('d.txt', 'encoding guessed: cp1251')))
    said = capsys.readouterr().out
    assert said == (
        'noted on 4 files:\n'
        '        2  a.jsonl: 17 lines were no JSON (and 1 more; 20 in all)\n'
        '        1  c.txt: encoding guessed: cp1252\n'
        '        1  d.txt: encoding guessed: cp1251\n')


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
    evil = 'a\x1b[31m\r\u202e'
    report.show_plan([Source(evil + '.txt', 'text', 1, 0)], entries('reason', (evil, evil)))
    report.show_notes(entries('note', (evil, evil)))
    report.show_decided([{'kind': 'csv', 'facts': {'columns': evil}, 'files': 1, 'sample': evil * 9}])
    with pytest.raises(SystemExit):
        fail(evil)
    said = ''.join(capsys.readouterr())
    assert not set('\x1b\r\u202e') & set(said) and said.count('\\x1b[31m') >= 6
    write(tmp_path / 'in' / f'{evil[:6]}.jpg', b'\xff')
    write(tmp_path / 'in' / f'{evil[:6]}.txt', 'plain enough ' * 20 + '<|endoftext|>')
    said = prepare(tmp_path, 'in', '--tokenizer=byte')
    assert '\x1b' not in said and r'a\x1b[31m.txt: 1 marks' in said and r'a\x1b[31m.jpg' in said


def test_what_was_decided_is_shown_and_kept(tmp_path):
    for i in range(3):
        write(tmp_path / 'in' / f'{i}.jsonl', jsonl(*(f'Page {i}.{j} is\tabout rain.' for j in range(9))))
    write(tmp_path / 'in' / 'a.md', 'Notes on rain and snow.')
    said = prepare(tmp_path, 'in', '--tokenizer=byte')
    meta = dataset(tmp_path / 'data' / 'in').meta
    assert [(item['kind'], item['files'], item['sample']) for item in meta['decided']] == [
        ('text', 1, 'Notes on rain and snow.'), ('jsonl', 3, 'Page 0.0 is\tabout rain.')]
    assert re.search(r'^jsonl .*3 files  "Page 0.0 is about rain."$', said, re.M)
    assert re.search(r'^jsonl .*3 files  "Page 0', prepare(tmp_path, '--inspect', 'data/in'), re.M)
    again = json.loads((tmp_path / 'data' / 'in' / 'meta.json').read_text(encoding='utf-8'))
    prepare(tmp_path, 'in', '--tokenizer=byte', '--out=data/other')
    assert dataset(tmp_path / 'data' / 'other').meta['content'] == again['content']
    prepare(tmp_path, 'in', '--tokenizer=byte', '--out=data/other', '--split_seed=2')
    assert dataset(tmp_path / 'data' / 'other').meta['content'] != again['content']


def test_a_typo_is_told_before_the_libraries_are_there():
    command = [sys.executable, '-X', 'importtime', os.path.join(ROOT, 'prepare.py'), '--vocabsize=3']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and 'did you mean --vocab_size?' in done.stderr
    assert 'numpy' not in done.stderr and 'pyarrow' not in done.stderr


def test_settings_without_effect_are_said(corpus):
    def first_lines(*argv):
        said = prepare(corpus, *argv)
        return [line.split(' has no effect')[0] for line in said.split('\n') if 'has no effect' in line]

    assert first_lines('mine', '--tokenizer=byte', '--vocab_size=300', '--sample_mb=2') == \
        ['--vocab_size', '--sample_mb']
    assert first_lines('mine/1/1.txt', '--tokenizer=byte', '--exclude=b', '--split_seed=5') == \
        ['--exclude', '--split_seed']
    assert first_lines('mine', '--exclude=*.log', '--dry_run') == ['--exclude']
    assert first_lines('mine', '--exclude=1.txt', '--vocab_size=300', '--sample_mb=2') == []
    assert 'in none of the texts' in prepare(corpus, 'mine', r'--document_separator=\n%\n', code=2)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('stream', [Terminal, io.StringIO])
def test_the_line_moves_while_one_task_works(monkeypatch, stream):
    out = stream()
    monkeypatch.setattr(progress.sys, 'stdout', out)
    for name in ('BEGINS', 'ON_TERMINAL', 'ELSEWHERE'):
        monkeypatch.setattr(progress, name, 0.05)
    inside = iter(range(0, 10_000_000, 500_000))

    def shares():
        return set(re.findall(r'(\d+\.\d) of 20.0 MB', out.getvalue()))

    with progress.Progress('reading', 20_000_000, lambda: next(inside, 9_000_000)) as line:
        wait_for(lambda: len(shares()) > 3)
        line.add(20_000_000)
    said = out.getvalue()
    assert said.endswith(' s\n') or said.rstrip(' ').endswith('s\n') or '20.0 of 20.0 MB' in said
    assert ('\r' in said) == (stream is Terminal)
    with pytest.raises(ValueError), progress.Progress('looking', also='at 3 files'):
        wait_for(lambda: 'looking   at 3 files' in out.getvalue())
        raise ValueError
    assert 'looking   at 3 files' in out.getvalue()
