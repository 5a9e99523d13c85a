"""What became of each source: an entry for each that was read, those of a file's parts summed, and
judged as a whole.

    account.book(report, account.whole([entry]))       # a source that was read in one
    total = account.settle(tasks, reports)             # one report for all: parts are put together

An entry: {'file', 'kind', 'documents', 'copies', 'dropped', 'taken', 'lost', 'facts', 'notes',
'skip': why it could not be read or '', 'suspect': [score, why], 'sample': the text's beginning,
'chars', 'separators', 'part': None or [number, of how many]; then 'rows': [begin, end] in its
task's .rows}.
"""
import json
import re

from mambino.prepare import screen
from mambino.prepare.files import MOST_LOST, judge

FEWEST_COPIES = 20  # documents: of fewer, nobody need know that most are alike
NUMBER = re.compile(r'(\d[\d,]*)(?= )')


def new_report():
    """Of a task, or of them all."""
    return {
        'files': {},       # kind -> how many were taken
        'skipped': [],     # {'file', 'reason'}
        'notes': [],       # {'file', 'note'}
        'suspects': [],    # [score, path, why]
        'decided': {},     # [kind, facts] as JSON -> [how many files, sample of the first]
        'copies': 0,       # documents that are not written, since earlier ones are the same
        'separators': 0,   # documents' own marks at which texts were cut
        'parts': [],       # entries of parts, whose file is not yet judged
        'chars': set(),    # the characters of what was taken, if they were asked for
    }


def merged(entries):
    """One entry with the sums of several."""
    total = dict(entries[0])
    for name in ('documents', 'copies', 'dropped', 'taken', 'separators'):
        total[name] = sum(entry[name] for entry in entries)
    total['lost'] = {}
    total['facts'] = {}
    for entry in entries:
        for what, n in entry['lost'].items():
            total['lost'][what] = total['lost'].get(what, 0) + n
        total['facts'] = entry['facts'] | total['facts']
    total['chars'] = set().union(*(entry['chars'] for entry in entries))
    total['suspect'] = max((entry['suspect'] for entry in entries), key=lambda suspect: suspect[0])
    total['sample'] = next((entry['sample'] for entry in entries if entry['sample']), '')
    total['notes'] = summed([note for entry in entries for note in entry['notes']])
    return total


def whole(entries):
    """The entry of a file from those of its parts; 'skip' is why it is better left out, or ''."""
    total = merged(entries) if len(entries) > 1 else dict(entries[0])
    failed = [entry['skip'] for entry in entries if entry['skip']]
    reason, lost = judge(total['taken'], total['lost'])
    if not total['documents']:
        reason = failed[0] if failed else reason or 'empty'
    elif len(failed) > MOST_LOST * len(entries):
        reason = f'{len(failed):,} of {len(entries):,} parts cannot be read: {failed[0]}'
    elif failed:
        lost.append(f'{len(failed):,} of {len(entries):,} parts could not be read: {failed[0]}')
    if total['documents'] >= FEWEST_COPIES and total['copies'] > total['documents'] / 2:
        lost.append(f'{total["copies"]:,} of {total["documents"]:,} documents are the same as earlier ones')
    total['skip'] = reason
    total['notes'] = total['notes'] + lost
    return total


def summed(notes):
    """Each note once; those that begin with a number and go on alike are one, with the sum."""
    sums = {}
    for note in notes:
        number = NUMBER.match(note)
        n = int(number[1].replace(',', '')) if number else 0
        words = note[number.end():] if number else note
        sums[bool(number), words] = sums.get((bool(number), words), 0) + n
    return [f'{n:,}{words}' if is_counted else words for (is_counted, words), n in sums.items()]


def book(report, entry):
    """Adds the entry of a whole file to a report."""
    if entry['skip']:
        report['skipped'].append({'file': entry['file'], 'reason': entry['skip']})
        return
    kind = entry['kind']
    report['files'][kind] = report['files'].get(kind, 0) + 1
    facts = json.dumps(entry['facts'], sort_keys=True) if entry['facts'] else '{}'
    decide(report, f'["{kind}", {facts}]', 1, entry['sample'])
    report['notes'] += [{'file': entry['file'], 'note': note} for note in entry['notes']]
    score, why = entry['suspect']
    if why:
        report['suspects'] = screen.worst([*report['suspects'], [score, entry['file'], why]])
    report['copies'] += entry['dropped']
    report['separators'] += entry['separators']
    report['chars'].update(entry['chars'])


def decide(report, decision, files, sample):
    """Counts what was decided for so many files; the sample of the first one stays."""
    before, first_sample = report['decided'].get(decision, (0, ''))
    report['decided'][decision] = [before + files, first_sample or sample]


def add(report, more):
    """Adds what another report counts."""
    for kind, n in more['files'].items():
        report['files'][kind] = report['files'].get(kind, 0) + n
    for decision, (files, sample) in more['decided'].items():
        decide(report, decision, files, sample)
    report['skipped'] += more['skipped']
    report['notes'] += more['notes']
    report['suspects'] = screen.worst(report['suspects'] + more['suspects'])
    report['copies'] += more['copies']
    report['separators'] += more['separators']
    report['chars'].update(more['chars'])


def settle(tasks, reports):
    """One report for all tasks, with 'dropped': {key of a task: [(begin, end) of rows]} of the
    files that turned out bad when all their parts were known.
    """
    total = new_report() | {'dropped': {}}
    parts = []  # (key of the task, entry) of one file
    for task, report in zip(tasks, reports):
        add(total, report)
        for entry in report['parts']:
            parts.append((task['key'], entry))
            number, n = entry['part']
            if number == n - 1:
                file = whole([entry for _, entry in parts])
                book(total, file)
                for key, entry in parts if file['skip'] else []:
                    total['dropped'].setdefault(key, []).append(entry['rows'])
                parts = []
    return total
