"""Conversations in tables and texts, and what prepare.py reads there."""
import csv
import io
import json
import os
import random
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq

from helpers.readers import OPTIONS, save_arrow, write
from mambino.prepare import archive, conversations, isolate, rendered, sources, survey
from mambino.prepare.conversations import TALK
from mambino.prepare.files import Notes, Skip, judge

N = 12
WORDS = 'the baker has bread and tea for every guest who walks along the river in spring rain'.split()


def prose(i, words=8):
    rng = random.Random(f'{i} {words}')
    return f'Nr {i}: ' + ' '.join(rng.choices(WORDS, k=words)) + '.'


def turn(role, text):
    return {'role': role, 'content': text}


def said(*turns):
    """[('user', 'Hi'), ...] as messages."""
    return [turn(role, text) for role, text in turns]


def pair(i):
    return said(('user', prose(i)), ('assistant', prose(-i)))


def documents_of(path, mode='auto', **options):
    """(documents, notes, facts) of a file: messages, or a text."""
    path = str(path)
    kind = sources.kind_of(os.path.basename(path))[0] or 'text'
    notes, found, parts = Notes(), [], []
    options = OPTIONS | {'conversations': mode} | options
    kept, plans, skipped = survey.survey([sources.Source(path, kind, 0, 0)], options)
    if skipped:
        raise Skip(skipped[0]['reason'])
    source = isolate.look(kept[0], notes)
    marks = rendered.Rendered(mode in ('auto', 'always'))
    for text, last in marks.passed(archive.read(source, options | plans[0], notes)):
        parts.append(text)
        if last:
            found.append(conversations.unpack(text) if last == TALK else ''.join(parts))
            parts = []
    marks.tell(notes)
    reason, lines = judge(notes.taken, notes.lost)
    if reason:
        raise Skip(reason)
    return found, [*notes, *lines], notes.facts


SYSTEM = turn('system', 'Be good.')


def save(path, rows, form):
    if form == 'csv':
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]), delimiter='\t' if path.suffix == '.tsv' else ',')
        table.writeheader()
        table.writerows([{name: json.dumps(value) if isinstance(value, (list, dict)) else value
                          for name, value in row.items()} for row in rows])
        return write(path, text.getvalue())
    if form == 'python':  # as pandas writes a list into a csv
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        return write(path, text.getvalue())
    if form == 'parquet':
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == 'arrow':
        save_arrow(pa.Table.from_pylist(rows), path, 'file')
    elif form == 'array':
        write(path, json.dumps(rows, indent=1))
    elif form == 'inside':
        write(path, json.dumps({'version': 1, 'data': rows}))
    elif form == 'zip':
        with zipfile.ZipFile(path, 'w') as f:
            f.writestr('a.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
    else:
        write(path, ''.join(json.dumps(row) + '\n' for row in rows))
    return path


def chatml(*messages):
    return ''.join(f'<|im_start|>{m["role"]}\n{m["content"]}<|im_end|>\n' for m in messages)
