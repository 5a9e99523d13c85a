"""What the tables among the sources hold, looked at before they are read: the files of a folder choose
their text column together, and a large one is cut into parts that are read side by side.

    sources, plans, skipped = survey.survey(sources, options)    # a plan for each that is left

    sources ──► look: which are tables, by their content? some rows of each ──► profiles of the columns
            ──► choose: for the files of a folder and a format together ──► plans
                  └► it is not clear, or --text_column is not there: skipped, with the reason

A plan is a dict that JSON can hold and that its reader finds among its options: {} for what needs
none. {'columns': [...]} are those that are read, 'form' says so in words, and {'parts': [...]} is
there where the file is to be read in parts, of which a reader gets one as 'part'.
"""
import json
import os

from mambino.configurator import fail
from mambino.prepare import columns, csv_look, isolate, json_look, pool
from mambino.prepare.files import Notes, Skip
from mambino.prepare.readers import reason_of
from mambino.prepare.sources import Source

LOOKED_AT = ('jsonl', 'csv', 'parquet', 'arrow', 'data', 'text')  # kinds that are tables, or may be
TOGETHER = 50     # sources that a process looks at in one go
FEW = 5           # rows of a .json, or files of one object each: less are settings
MANY = 100        # rows of a .json without a text that make it a table all the same
TEXT_ROWS = 3     # rows that a file without a name for it needs, to be a table


def survey(sources, options):
    """(the sources that can be read, a plan for each of them, [{'file', 'reason'}] of the others). Ends
    the program where --text_column asks for what none of them has.
    """
    found = look_at_all(sources, options)
    decide_singles(sources, found)
    plans, reasons = choose_all(sources, found, options)
    check_wanted(sources, found, plans, reasons, options)
    kept = []
    kept_plans = []
    skipped = []
    for i, source in enumerate(sources):
        if i in reasons:
            skipped.append({'file': source.path, 'reason': reasons[i]})
        else:
            kept.append(source._replace(kind=plans[i][0]))
            kept_plans.append(plans[i][1])
    return kept, kept_plans, skipped


NO_JSON = {'kind': 'text', 'plan': {'said': ['no JSON in it: taken as plain text']}}


# -----------------------------------------------------------------------------
# Looking

def look_at_all(sources, options):
    """{index of a source: what look() found there}"""
    indexes = [i for i, source in enumerate(sources) if source.kind in LOOKED_AT]
    tasks = []
    for start in range(0, len(indexes), TOGETHER):
        some = indexes[start:start + TOGETHER]
        tasks.append({'cwd': os.getcwd(), 'indexes': some, 'sources': [list(sources[i]) for i in some],
                      'options': options})
    found = {}
    for results in pool.map_tasks(look_at, tasks, window=64):
        found.update(results)
    return found


def look_at(task):
    """[(index, what look() found)] of some sources, of those where it found something."""
    if os.getcwd() != task['cwd']:
        os.chdir(task['cwd'])  # on another machine of a cluster
    results = []
    for i, source in zip(task['indexes'], map(Source._make, task['sources'])):
        try:
            found = look(source, task['options'])
        except Skip as reason:
            found = {'skip': str(reason)}
        except Exception as error:  # of whatever library
            found = {'skip': reason_of(error)}
        if found:
            results.append((i, found))
    return results


def look(source, options):
    """{'kind', 'format', 'plan', 'profile', 'rows', 'facts'} of a source that is a table: what it is by
    its content, and how its columns look. None for the others.
    """
    kind = table_kind(source)
    if kind in ('parquet', 'arrow'):
        return look_apart(source.path, kind, options)
    if source.kind == 'data' and not is_json(os.path.basename(source.path).lower()):
        return None
    if source.kind == 'csv':
        looked = json_look.look(source.path, 'text', options) if csv_look.may_be_json(source.path) else None
        return looked or csv_look.look(source.path, options)
    looked = json_look.look(source.path, source.kind, options)
    return looked or (NO_JSON if source.kind == 'jsonl' else None)


def table_kind(source):
    """'parquet' or 'arrow' where a file is that, or is called so and may be; else ''."""
    with open(source.path, 'rb') as f:
        head = f.read(8)
    for kind, signature in ('parquet', b'PAR1'), ('arrow', b'ARROW1\0\0'):
        if head.startswith(signature):
            return kind
    is_text = head[:1] in (b'{', b'[')
    return source.kind if source.kind in ('parquet', 'arrow') and not is_text else ''


def look_apart(path, kind, options):
    """The same of a table whose parser may crash, from a process of its own."""
    pieces = isolate.isolated(kind, path, options | {'look': True}, Notes())
    looked = json.loads(''.join(text for text, _ in pieces))
    return looked | {'kind': kind, 'format': kind, 'facts': {}}


def is_json(name):
    """Whether a name says that there is JSON in the file: rows.json, rows.json.gz."""
    stem, extension = os.path.splitext(name)
    return extension == '.json' or stem.endswith('.json')


# -----------------------------------------------------------------------------
# Choosing

def decide_singles(sources, found):
    """A file of one object is a table if there are some of its kind in the folder, each a row; else it
    is a text.
    """
    folders = {}
    for i, looked in found.items():
        if looked.get('alone') and sources[i].kind != 'jsonl':
            folders.setdefault(os.path.dirname(sources[i].path), []).append(i)
    for indexes in folders.values():
        for names in {tuple(sorted(found[i]['profile'])) for i in indexes}:
            same = [i for i in indexes if tuple(sorted(found[i]['profile'])) == names]
            total = columns.add_all(found[i]['profile'] for i in same)
            chosen, _ = columns.choose(total)
            if len(same) < FEW or not chosen or not columns.is_rich(total, chosen):
                for i in same:
                    del found[i]


def choose_all(sources, found, options):
    """({index: (kind, plan)}, {index: why it cannot be read})"""
    plans = {}
    reasons = {i: looked['skip'] for i, looked in found.items() if 'skip' in looked}
    groups = {}
    for i, source in enumerate(sources):
        if i not in found:
            plans[i] = source.kind, {}
        elif i not in reasons and 'profile' not in found[i]:
            plans[i] = found[i]['kind'], found[i]['plan']
        elif i not in reasons:
            folder = os.path.dirname(source.path)
            groups.setdefault((folder, found[i]['kind'].replace('jsonl', 'json')), []).append(i)
    for indexes in groups.values():
        profiles = {i: found[i]['profile'] for i in indexes}
        if options['text_column']:
            choices = {i: columns.wanted(profiles[i], options['text_column']) for i in indexes}
        else:
            choices = columns.choose_together(profiles)
        for i in indexes:
            chosen, reason = choices[i]
            if chosen and not is_setting(sources[i], found[i], options):
                plans[i] = found[i]['kind'], plan_of(found[i], chosen)
            elif is_plain(sources[i], found[i], options):
                plans[i] = sources[i].kind, {}
            else:
                reasons[i] = reason
    return plans, reasons


def plan_of(looked, chosen):
    """The plan of a table."""
    form = columns.form_of(chosen, looked['profile'])
    facts = {'format': looked['format'], 'columns': form} | looked['facts']
    plan = looked['plan'] | {'columns': chosen, 'form': form, 'facts': facts}
    return {key: value for key, value in plan.items() if value or key in ('names', 'said')}


def is_setting(source, looked, options):
    """Whether a file is too small, and too little called a table, to be taken for one."""
    is_one_value = looked['plan'].get('layout') not in ('lines', 'values')
    return not options['text_column'] and source.kind in ('data', 'text') and is_one_value and looked['rows'] < FEW


def is_plain(source, looked, options):
    """Whether a file without a clear text column is read as it stands: settings in JSON, say."""
    if source.kind == 'data':
        return looked['rows'] < (FEW if options['text_column'] else MANY)
    return source.kind == 'text' and looked['rows'] < TEXT_ROWS


def check_wanted(sources, found, plans, reasons, options):
    """Ends the program where --text_column asks for what no input has."""
    wanted = options['text_column']
    tables = [i for i, looked in found.items() if 'profile' in looked]
    if not wanted or any(i in plans and plans[i][1].get('columns') for i in tables):
        return
    if any(source.kind in ('hf', 'csv') and i not in found for i, source in enumerate(sources)):
        return
    refused = [reasons[i] for i in tables if i in reasons]
    fail(f'text_column={columns.shown(wanted)}: {refused[0] if refused else "none of the inputs is a table"}')
