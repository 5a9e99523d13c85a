"""The panel that hands a model to other tools: export.py, a process of its own, with what it says.

    the form ──► export.py ──► out-mine/export.log ──► each second: what was written, what its own tool says

All that is shown of an export is read from its log, so a reload, or a server that was started again, shows
the same.
"""
import os
import re
import secrets
from typing import NamedTuple

from nicegui import ui

from mambino import files
from mambino.serve import launch
from mambino.serve.library import checkpoint_in
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.words import bytes_in_words
from mambino.serve.runs import facts_of

FORMATS = {
    'hf': ('transformers', 'also vLLM and all that reads such folders'),
    'gguf': ('GGUF', 'llama.cpp and what is built on it'),
    'onnx': ('ONNX', 'onnxruntime'),
    'torchscript': ('TorchScript', 'torch alone, also in C++'),
    'safetensors': ('safetensors', 'anything that reads tensors'),
    'native': ('Mambino', 'quantised, or with its adapter merged in'),
    'peft': ('peft', 'of adapters alone'),
}
PRECISIONS = {'': 'all 32 bits', 'int8': '8 bits', 'int4': '4 bits'}
EACH = 1.0              # seconds between two looks at the log
LONGEST = 200_000       # bytes of a log that are read
CHECK = re.compile(fr'({"|".join(FORMATS)}): (.+)')
FILE = re.compile(r'(\S.*?)  ([\d.,]+ [kMG]?B)')


class Report(NamedTuple):
    """What the log of an export says."""
    is_at_work: bool
    command: list
    checks: list            # [(format, what its own tool says), …]
    files: list             # [(path, size), …] as export.py tells them
    trouble: str            # why there is none
    lines: list             # all of it


def report_of(out_dir):
    """The Report of a run's latest export; None if there was none."""
    task = launch.exporting(out_dir)
    record = launch.read_record(task.record)
    if not record:
        return None
    try:
        with files.open_plain(task.log) as f:
            f.seek(record.get('begins', 0))
            lines = f.read(LONGEST).decode('utf-8', 'replace').splitlines()
    except OSError:
        lines = []
    matches = [match for line in lines if (match := CHECK.fullmatch(line))]
    checks = [match.groups() for match in matches if match[2] != 'written']
    found = [match.groups() for line in lines if (match := FILE.fullmatch(line))]
    trouble = next((line.removeprefix('error: ') for line in lines if line.startswith('error: ')), '')
    is_at_work = bool(launch.worker(task))
    if not (is_at_work or found or trouble):
        trouble = lines[-1] if lines else 'It ended without a word.'
    return Report(is_at_work, record.get('command', []), checks, found, trouble, lines)


def show(library):
    """Fills the panel."""
    look.title('Export', 'Writes the files that other tools read, then opens them with the tool itself and compares: '
               'what it says stands below.')
    runs = {run['id']: os.path.normpath(run['out_dir']) for run in library.names()}
    if not runs:
        look.empty('There is no model yet.', 'Train one first', '/train')
        return
    Panel(runs)


class Panel:
    """The form, and what became of it."""

    def __init__(self, runs):
        self.runs = runs                    # {id: out_dir}
        self.request = secrets.token_hex(8)
        self.shown = None
        with look.sheet():
            with look.row():
                self.model = ui.select(list(runs), value=next(iter(runs)), label='Model', on_change=self.change)
                self.precision = ui.select(PRECISIONS, value='', label='Weights', on_change=self.change)
                look.field(self.model, 'model').classes('choice')
                look.field(self.precision, 'quantize').classes('choice')
            self.formats = {}
            with ui.element('div').classes('formats').props('role=group aria-label=Formats'):
                for name, (title, what) in FORMATS.items():
                    with ui.element('div').classes('format') as part:
                        box = ui.checkbox(title, value=name == 'hf', on_change=self.change)
                        ui.label(what).classes('muted small')
                    self.formats[name] = look.mark(box, f'format-{name}')
                box.bind_visibility_to(part)
            self.force = ui.checkbox('Write over an earlier export of the same name', on_change=self.change)
            look.mark(self.force, 'force')
            self.command = look.code('', 'export-command')
            with look.row():
                self.go = look.mark(ui.button('Export', icon='ios_share', on_click=self.start), 'export')
                self.halt = ui.button('Stop', icon='stop', on_click=self.stop).props('outline')
                look.mark(self.halt, 'export-stop')
                self.state = look.mark(ui.label().classes('muted small').props('role=status'), 'state')
        self.halt.set_visibility(False)
        self.trouble = look.trouble()
        self.result = look.mark(ui.element('div').classes('stack'), 'result')
        self.change()
        ui.timer(EACH, self.tick)

    def arguments(self):
        """What export.py is told."""
        chosen = [name for name, box in self.formats.items() if box.value]
        words = [f'--out_dir={self.runs[self.model.value]}', f'--format={",".join(chosen)}']
        if self.precision.value:
            words.append(f'--quantize={self.precision.value}')
        if self.force.value:
            words.append('--force=true')
        return words

    def task(self):
        return launch.exporting(self.runs[self.model.value])

    def change(self):
        """After a control was changed."""
        if not hasattr(self, 'result'):
            return
        has_adapter = bool(facts_of(self.runs[self.model.value]).get('adapter'))
        self.formats['peft'].set_visibility(has_adapter)
        if not has_adapter:
            self.formats['peft'].value = False
        self.command.set_text(launch.command_line('export.py', self.arguments()))
        self.go.set_enabled(any(box.value for box in self.formats.values()))

    async def start(self):
        self.trouble.set_text('')
        try:
            await away(launch.start, self.task(), self.arguments(), self.request)
        except launch.Refused as error:
            self.trouble.set_text(str(error))
        self.request = secrets.token_hex(8)
        await self.tick()

    async def stop(self):
        try:
            await away(launch.stop, self.task())
        except launch.Refused as error:
            self.trouble.set_text(str(error))

    async def tick(self):
        """Shows what is new in the log."""
        out_dir = self.runs[self.model.value]
        report = await away(report_of, out_dir)
        if (out_dir, report) == self.shown:
            return
        self.shown = out_dir, report
        is_at_work = bool(report and report.is_at_work)
        self.go.set_visibility(not is_at_work)
        self.halt.set_visibility(is_at_work)
        self.state.set_text('Writing, then comparing: some seconds to a minute …' if is_at_work else '')
        self.result.clear()
        if report:
            with self.result:
                self.show_report(out_dir, report)

    def show_report(self, out_dir, report):
        with look.sheet('The latest export', 'report'):
            if report.trouble and not report.is_at_work:
                look.mark(ui.label(report.trouble).classes('trouble'), 'export-trouble')
            for name, said in report.checks:
                show_check(name, said)
            if report.files:
                before = bytes_in_words(os.path.getsize(checkpoint_in(out_dir))) if checkpoint_in(out_dir) else '?'
                ui.label(f'The checkpoint, with what training needs, has {before}.').classes('muted')
                look.table(('file', '#size'), report.files, 'files')
            with ui.expansion('All that it said', value=report.is_at_work).props('data-testid=export-log'):
                command = launch.command_line('export.py', report.command)
                ui.label('\n'.join([f'$ {command}', *report.lines])).classes('log mono').props('tabindex=0')


def show_check(name, said):
    """What a format's own tool says of the files."""
    is_bad = said.startswith('FAILED')
    is_open = said.startswith('not checked')
    sign = 'error' if is_bad else 'help' if is_open else 'check_circle'
    with ui.element('div').classes('check' + ' bad' * is_bad + ' open' * is_open).props('data-testid=check'):
        ui.icon(sign).props('aria-hidden=true')
        with ui.element('div').classes('min-w-0'):
            ui.label(FORMATS[name][0]).classes('strong')
            ui.label(said).classes('muted small break-words')
