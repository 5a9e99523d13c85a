"""Results of the parts: lines for the screen while they come, report.json and report.md at the end.

A result is a dict: part, name, passed (True, False; None of a figure that nothing is asked of),
text, `figures`, {name: number}, from which tables are made, and `at`, the second of its part. A
process of a part writes them with a Recorder, one line of JSON each; Results reads them.
"""
import json
import os
import time
import traceback
from contextlib import contextmanager

MARKS = {True: 'ok', False: 'WRONG', None: '-'}
KEPT_LINES = 4      # of a traceback


class Recorder:
    """What a part's process tells of its work. path: of a file of lines; end: time.monotonic() of
    its end, past which it should not begin anything."""

    def __init__(self, part, path, end):
        self.part = part
        self.path = path
        self.end = end
        self.begun = time.monotonic()
        self.at = ''                    # the item that is under way

    def add(self, name, text, passed=None, **figures):
        row = dict(part=self.part, name=name, passed=passed, text=text, figures=figures,
                   at=round(time.monotonic() - self.begun, 1))
        with open(self.path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(row) + '\n')

    def seconds_left(self):
        return self.end - time.monotonic()

    @contextmanager
    def item(self, name, seconds=0):
        """One check or measurement of a part: its failure is a result, and the part goes on.
        seconds: that it takes; where fewer are left it is left out, which its body sees as False,
        unless it is the first: then it may be that the part has come to something."""
        if self.at and self.seconds_left() < seconds:
            self.add(name, f'left out: {max(0, self.seconds_left()):.0f} s left, takes about {seconds}')
            yield False
            return
        self.at = name
        try:
            yield True
        except Exception as error:      # whatever a card, a driver or a compiler may come up with
            self.add(name, last_lines(traceback.format_exception(error)), passed=False)


def last_lines(lines, n=KEPT_LINES):
    """The last of these lines that are not empty, in one: of a traceback they say what went
    wrong."""
    rows = [row.strip() for row in ''.join(lines).splitlines() if row.strip()]
    return ' | '.join(row[:300] for row in rows[-n:])


class Results:
    """All parts' results so far, and the time each took."""

    def __init__(self, out_dir, command):
        self.out_dir = out_dir
        self.command = command
        self.begun = time.time()
        self.rows = []
        self.seconds = {}               # part → how long it ran

    def add(self, row):
        self.rows.append(row)
        at = f'{row["at"]:4.0f} s' if 'at' in row else ''
        print(f'{MARKS[row["passed"]]:<6} {row["part"]:<11} {at:>6} {row["name"]}: {row["text"]}',
              flush=True)

    def leave_out(self, part, why):
        self.add(dict(part=part.name, name='left out', passed=None, text=f'{part.what}; {why}',
                      figures={}))

    def machine(self):
        """What the part `machine` found: {name: text}."""
        return {row['name']: row['text'] for row in self.rows if row['part'] == 'machine'}

    def write(self):
        begun = time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(self.begun))
        report = dict(command=self.command, begun=begun, seconds=self.seconds, results=self.rows)
        write_whole(os.path.join(self.out_dir, 'report.json'), json.dumps(report, indent=1) + '\n')
        write_whole(os.path.join(self.out_dir, 'report.md'), self.markdown())

    def markdown(self):
        """The report as a table, like those of docs/measured.md."""
        machine = self.machine()
        wrong = [row for row in self.rows if row['passed'] is False]
        right = [row for row in self.rows if row['passed']]
        lines = [f'# {machine.get("card", "A card")}', '']
        named = ('driver', 'torch', 'triton', 'gcc', 'mamba-ssm')
        facts = [f'{name} {machine[name]}' for name in named if name in machine]
        lines += [', '.join(facts) + f'. `{self.command}`', '',
                  f'{len(right)} checks right, {len(wrong)} wrong.', '',
                  '| part | what | | figure |', '| --- | --- | --- | --- |']
        for row in self.rows:
            text = row['text'].replace('|', '\\|').replace('\n', ' ')
            lines.append(f'| {row["part"]} | {row["name"]} | {MARKS[row["passed"]]} | {text} |')
        took = ', '.join(f'{name} {seconds:.0f} s' for name, seconds in self.seconds.items())
        return '\n'.join([*lines, '', f'Took: {took}.', ''])

    def show_sum(self):
        """The last lines; returns the exit status."""
        wrong = [row for row in self.rows if row['passed'] is False]
        right = [row for row in self.rows if row['passed']]
        print(f'{len(right)} checks right, {len(wrong)} wrong, in {time.time() - self.begun:.0f} s; '
              f'{os.path.join(self.out_dir, "report.md")}')
        for row in wrong:
            print(f'WRONG  {row["part"]} {row["name"]}: {row["text"]}')
        return 1 if wrong else 0


def write_whole(path, text):
    """The whole file or the one before: a process that is killed leaves no half."""
    with open(path + '.part', 'w', encoding='utf-8') as f:
        f.write(text)
    os.replace(path + '.part', path)
