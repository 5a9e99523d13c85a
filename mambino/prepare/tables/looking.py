"""Whether a file is a table, by its content, and how its columns look.

    found = looking.look('data', 'rows.json', options)     # None: no table
    kind, plan = looking.alone('jsonl', 'rows.jsonl', options)

The files of a folder choose together, in survey.py; one in an archive chooses alone.
"""
import json
import os

from mambino.prepare import sniff
from mambino.prepare.files import Notes, Skip
from mambino.prepare.tables import arrow_rows, columns, csv_look, json_look, talks

KINDS = ('jsonl', 'csv', 'parquet', 'arrow', 'data', 'text')  # that are tables, or may be
APART = {'parquet': arrow_rows.read_parquet, 'arrow': arrow_rows.read_arrow}  # whose parsers may crash
FEW = 5        # rows of a .json: less are settings
MANY = 100     # rows of a .json without a text that make it a table all the same
SAID = 20      # rows of a .json that are worth a note when it is taken as a text
MUCH = 20      # words a row that are text, whatever they are called
TEXT_ROWS = 3  # rows that a file without a name for it needs, to be a table
NO_JSON = {'kind': 'text', 'plan': {'said': ['no JSON in it: taken as plain text']}}


def look(kind, path, options, look_apart=None):
    """{'kind', 'format', 'plan', 'profile', 'rows', 'facts'} of a file that is a table: what it is
    by its content, and how its columns look. None for the others. kind: by its name; look_apart:
    how to look at those of APART, if not right here.
    """
    if sniff.kind_of(kind, path, Notes()) not in (kind, *APART):
        return None  # called as a table, or a text, and none: its own reader tells
    table = table_kind(kind, path)
    if table:
        looked = (look_apart or look_here)(table, path, options)
        return looked | {'kind': table, 'format': table, 'facts': {}}
    if kind == 'data' and not is_json(os.path.basename(path).lower()):
        return None
    if kind == 'csv':
        looked = json_look.look(path, 'text', options) if csv_look.may_be_json(path) else None
        return looked or csv_look.look(path, options)
    looked = csv_look.look_in_text(path, options) if kind in ('text', 'data') else None
    looked = looked or json_look.look(path, kind, options)
    if looked is None and kind == 'jsonl':
        looked = csv_look.look(path, options)
        return looked if len(looked.get('profile', ())) > 1 else NO_JSON
    return looked


def look_here(kind, path, options):
    """What a parquet or Arrow file says of itself."""
    return json.loads(''.join(text for text, _ in APART[kind](path, options | {'look': True}, Notes())))


def table_kind(kind, path):
    """A key of APART where a file is that, or is called so and may be; else ''."""
    with open(path, 'rb') as f:
        head = f.read(8)
    for table, signature in ('parquet', b'PAR1'), ('arrow', b'ARROW1\0\0'):
        if head.startswith(signature):
            return table
    is_text = head[:1] in (b'{', b'[')
    return kind if kind in APART and not is_text else ''


def is_json(name):
    """Whether a name says that there is JSON in the file: rows.json, rows.json.gz."""
    stem, extension = os.path.splitext(name)
    return extension == '.json' or stem.endswith('.json')


def plan_of(looked, chosen, options):
    """The plan of a table. chosen: names of columns."""
    profile = looked['profile']
    form = columns.form_of(chosen, profile)
    speakers = talks.speakers(chosen, profile, options)
    said = talks.said_of(chosen, speakers, profile, options)
    facts = {'format': looked['format'], 'columns': form} | looked['facts'] | said
    plan = looked['plan'] | {'columns': chosen, 'form': form, 'facts': facts, 'speakers': speakers}
    if speakers:
        plan['columns'] = [name for name, _ in speakers]
    plan['written'] = [name for name in chosen if name in profile and profile[name]['written']]
    return {key: value for key, value in plan.items() if value or key in ('names', 'said')}


def decide(kind, looked, chosen, reason, options):
    """(kind, plan) of a file that was looked at. kind: by its name; chosen: the names of its
    columns, or None, and `reason` why there are none. Skip(reason) where it is neither a table nor
    a text.
    """
    if chosen and (options['text_column'] or not is_setting(kind, looked, chosen)):
        return looked['kind'], plan_of(looked, chosen, options)
    plan = setting_plan(looked, chosen) if chosen else plain_plan(kind, looked, reason, options)
    if plan is None:
        raise Skip(reason)
    return kind, plan


def alone(kind, path, options, look_apart=None):
    """(kind, plan) of a file that nobody has looked at together with others. Skip where its text
    column is not clear.
    """
    looked = look(kind, path, options, look_apart) if kind in KINDS else None
    if looked is None:
        return kind, {}
    if 'profile' not in looked:
        return looked['kind'], looked['plan']
    wanted = options['text_column']
    chosen, reason = columns.wanted(looked['profile'], wanted) if wanted else columns.choose(looked['profile'])
    kind, plan = decide(kind, looked, chosen, reason, options)
    return kind, plan | {'parts': []}


# -----------------------------------------------------------------------------
# Small files that are called no table

def is_setting(kind, looked, chosen):
    """Whether a file is too little like a table, and too little called one, to be taken for one
    though it has columns that could be read: few rows, or a list in an object without a name for
    its text.
    """
    layout = looked['plan'].get('layout')
    if kind not in ('data', 'text') or layout in ('lines', 'values'):
        return False
    is_inside = layout in ('object', 'columns')
    is_text = columns.are_usual(chosen) or columns.is_rich(looked['profile'], chosen, MUCH)
    return looked['rows'] < FEW or is_inside and not is_text


def setting_plan(looked, chosen):
    """The plan of a file that is_setting and is read as it stands: where that leaves a list of many
    rows in its JSON, it says so.
    """
    if looked['rows'] < SAID or looked['plan'].get('keyed'):
        return {}
    names = ','.join(map(columns.shown, chosen))
    return {'said': [f'taken as plain text, for it may be settings; its rows are read with --text_column={names}']}


def plain_plan(kind, looked, reason, options):
    """The plan of a file without a clear text column that is read as it stands, settings in JSON,
    say; None where it is not. reason: why there is none.
    """
    rows = looked['rows']
    is_small = kind == 'data' and rows < (FEW if options['text_column'] else MANY)
    if not is_small and not (kind == 'text' and rows < TEXT_ROWS):
        return None
    return {'said': [f'{reason}; taken as plain text']} if reason and rows >= SAID else {}
