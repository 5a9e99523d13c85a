"""What the tables among the sources hold, looked at before they are read: the files of a folder
choose their text column together, and a large one is cut into parts that are read side by side.

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
from mambino.prepare import files, isolate, pool
from mambino.prepare.files import Notes, Skip
from mambino.prepare.readers import reason_of
from mambino.prepare.sources import Source
from mambino.prepare.tables import columns, hub, looking

MAY_HOLD_TABLES = ('zip', 'tar', 'xlsx', 'odt', 'email')  # which is known when they are read
TOGETHER = 50     # sources that a process looks at in one go
FEW = 5           # files of one object each: less are settings


def survey(sources, options):
    """(the sources that can be read, a plan for each of them, [{'file', 'reason'}] of the others).
    Ends the program where --text_column asks for what none of them has.
    """
    found = look_at_all(sources, options)
    decide_singles(sources, found, options)
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


# -----------------------------------------------------------------------------
# Looking

def look_at_all(sources, options):
    """{index of a source: what looking.look found there}"""
    indexes = [i for i, source in enumerate(sources) if source.kind in looking.KINDS]
    tasks = []
    for start in range(0, len(indexes), TOGETHER):
        some = indexes[start:start + TOGETHER]
        tasks.append({'cwd': os.getcwd(), 'indexes': some, 'sources': [list(sources[i]) for i in some],
                      'options': options})
    found = {}
    for results in pool.map_tasks(look_at, tasks, window=64):
        found.update(results)
    for i, source in enumerate(sources):
        if source.kind == 'hf':
            found[i] = hub.or_end(hub.look, source.path)
    return found


def look_at(task):
    """[(index, what looking.look found)] of some sources, of those where it found something."""
    if os.getcwd() != task['cwd']:
        os.chdir(task['cwd'])  # on another machine of a cluster
    files.allow(task['options'].get('unpack_ratio', files.TIMES))
    results = []
    for i, source in zip(task['indexes'], map(Source._make, task['sources'])):
        try:
            found = looking.look(source.kind, source.path, task['options'], look_apart)
        except Skip as reason:
            found = {'skip': str(reason)}
        except Exception as error:  # of whatever library
            found = {'skip': reason_of(error)}
            if getattr(error, 'errno', None):  # the disk's fault: its reader says so, and it may be better next time
                found = {'kind': source.kind, 'plan': {'again': error.errno}}
        if found:
            results.append((i, found))
    return results


def look_apart(kind, path, options):
    """Of a table whose parser may crash what it says of itself, from a process of its own."""
    pieces = isolate.isolated(kind, path, options | {'look': True}, Notes())
    return json.loads(''.join(text for text, _ in pieces))


# -----------------------------------------------------------------------------
# Choosing

def decide_singles(sources, found, options):
    """A file of one object is a table if there are some of its kind in the folder, each a row, or
    if it has what --text_column asks for; else it is a text.
    """
    folders = {}
    for i, looked in found.items():
        if looked.get('alone') and sources[i].kind != 'jsonl':
            folders.setdefault(os.path.dirname(sources[i].path), {})[i] = looked['profile']
    for profiles in folders.values():
        if options['text_column']:
            kept = {i for i, profile in profiles.items() if columns.wanted(profile, options['text_column'])[0]}
        else:
            kept = rows_of_their_own(profiles)
        for i in profiles.keys() - kept:
            del found[i]


def rows_of_their_own(profiles):
    """The keys of the profiles, of one object each, that are rows as those of a table are."""
    alike = {}
    for i, (chosen, _) in columns.choose_together(profiles).items():
        if chosen and columns.are_usual(chosen):
            alike.setdefault(tuple(chosen), []).append(i)
    kept = set()
    for chosen, keys in alike.items():
        if len(keys) >= FEW and columns.is_rich(columns.add_all(profiles[i] for i in keys), chosen):
            kept.update(keys)
    return kept


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
            folder = source.path if source.kind == 'hf' else os.path.dirname(source.path)
            groups.setdefault((folder, found[i]['kind'].replace('jsonl', 'json')), []).append(i)
    for indexes in groups.values():
        profiles = {i: found[i]['profile'] for i in indexes}
        if options['text_column']:
            choices = {i: columns.wanted(profiles[i], options['text_column']) for i in indexes}
        else:
            choices = columns.choose_together(profiles)
        for i in indexes:
            try:
                plans[i] = looking.decide(sources[i].kind, found[i], *choices[i], options)
            except Skip as reason:
                reasons[i] = str(reason)
    return plans, reasons


def check_wanted(sources, found, plans, reasons, options):
    """Ends the program where --text_column asks for what no input has."""
    wanted = options['text_column']
    tables = [i for i, looked in found.items() if 'profile' in looked]
    if not wanted or any(i in plans and plans[i][1].get('columns') for i in tables):
        return
    if any(source.kind in MAY_HOLD_TABLES for source in sources):
        return
    refused = [reasons[i] for i in tables if i in reasons]
    fail(f'text_column={columns.shown(wanted)}: {refused[0] if refused else "none of the inputs is a table"}')
