"""Contenders take turns, one round each (A B C A B C …), so that a machine whose speed drifts is
unfair to nobody.

A row is one contender's: `section`, `name`, `label`, `dtype`, `root` (the checkout it is from), and
what its section adds; what is measured goes into `times`, a {work: [seconds]} for each round. A row
that failed has an `error`, and takes no more turns. A ratio is the median over the rounds of the
two's ratio within a round.
"""
import os
import subprocess
import sys
from json import dumps, loads
from math import inf
from statistics import median

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONTENDERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'contenders.py')
START = 'import runpy, sys; sys.path[0] = sys.argv[1]; runpy.run_path(sys.argv[2], run_name="__main__")'


def progress(text):
    if sys.stderr.isatty():
        print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)


def take_turns(rows, rounds, turn, limit=inf, before_round=None):
    """`rounds` times turn(row) for each row, which returns {work: [seconds]}; a row stops after
    `limit` seconds, or with an error."""
    for number in range(rounds):
        if before_round:
            before_round()
        for row in rows:
            spent = sum(sum(seconds) for times in row['times'] for seconds in times.values())
            if 'error' not in row and spent < limit:
                progress(f'{row["section"]}: round {number + 1} of {rounds}, {row["label"]} {row["dtype"]}')
                times = turn(row)
                if times:
                    row['times'].append(times)
    progress('')


def ask(process, line):
    """One line to a contender, its answer as a dict."""
    try:
        process.stdin.write(line + '\n')
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = ''
    if not answer:
        return dict(error=f'its process died with status {process.wait()} (out of memory?)')
    return loads(answer)


def contest(rows, settings, before_round=None):
    """Measures contenders.py's rows, each in a process of its own, so that its peak memory is its
    own, and returns them."""
    processes = {}
    try:
        for i, row in enumerate(rows):
            if 'error' not in row:
                processes[i] = subprocess.Popen(
                    [sys.executable, '-c', START, row['root'], CONTENDERS], stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding='utf-8')
        for i, process in processes.items():  # one after another: together they would take each other's time
            progress(f'{rows[i]["section"]}: warming up {rows[i]["label"]} {rows[i]["dtype"]}')
            job = rows[i] | dict(settings=vars(settings) | rows[i].get('sizes', {}))
            rows[i].update(ask(process, dumps(job)))
        process_of = {id(rows[i]): process for i, process in processes.items()}

        def turn(row):
            answer = ask(process_of[id(row)], 'go')
            times = answer.pop('times', None)
            row.update(answer)
            return times
        take_turns(rows, settings.rounds, turn, settings.limit, before_round)
    finally:
        progress('')
        for process in processes.values():
            process.kill()
            process.wait()
    return rows


def with_before(rows, settings):
    """These rows of ours, and where --against names a checkout, after each the same from there."""
    if not settings.against:
        return rows
    both = []
    for row in rows:
        both += [row, row | dict(label=f'before: {row["label"]}', root=settings.against, times=[])]
    return both


def ratio(a, b, work='step'):
    """(median, lowest, highest) over the rounds of how many times faster row a does this work than
    row b."""
    each = [median(theirs[work]) / median(ours[work]) for ours, theirs in zip(a['times'], b['times'])]
    return median(each), min(each), max(each)


def all_times(row, work):
    """Seconds of every time that a row did this work, in all rounds."""
    return [seconds for times in row['times'] for seconds in times.get(work, [])]


def table(title, header, lines):
    """Aligned columns: the first two to the left, figures to the right."""
    lines = [header] + lines
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f'\n{title}')
    for line in lines:
        cells = [f'{cell:<{width}}' if i < 2 else f'{cell:>{width}}'
                 for i, (cell, width) in enumerate(zip(line, widths))]
        print('  ' + '  '.join(cells).rstrip())
    sys.stdout.flush()
