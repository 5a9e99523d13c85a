"""The panel on which files become a dataset: which, what would be taken of them, the work as it goes
on; and the datasets there are, with random places of their text and the lengths of their documents.
"""
import os
import re
import secrets
from urllib.parse import urlencode

from nicegui import ui

from mambino.serve import datasets, launch, runs
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.charts import Chart, Curve, dress
from mambino.serve.page.choose import Paths
from mambino.serve.page.words import ICONS, bytes_in_words, count_in_words

TOKENIZERS = {'bpe': 'trained on these texts (bpe)', 'char': 'characters', 'byte': 'bytes', 'gpt2': 'that of GPT-2'}
LONGEST = 200_000       # characters of a dry run that are shown


def show(library):
    """Fills the panel."""
    dress()
    look.title('Data', 'Text, code, PDF, office files, tables, mail: whatever you have becomes tokens to learn from. '
                       'Your files are only read.')
    DataPanel()


class DataPanel:
    """The panel."""

    def __init__(self):
        self.request = secrets.token_hex(8)
        self.names = None
        self.last = None
        self.build_form()
        self.build_work()
        with look.sheet('Datasets', 'datasets'):
            self.table = look.table(['name', '#to train on', '#to evaluate', '#documents', 'tokenizer', '#on disk'], [],
                                    'datasets-table')
            self.none = look.note('None yet.')
        self.build_look()
        self.list_datasets()
        ui.timer(1.0, self.tick)

    def build_form(self):
        with look.sheet('Your files', 'files'):
            self.paths = Paths(self.on_paths)
            with ui.element('div').classes('fields wide'):
                self.name = look.field(ui.input('Name of the dataset', value='stdlib'), 'dataset-name')
                self.tokenizer = look.field(ui.select(TOKENIZERS, label='Tokens', value='bpe'), 'tokenizer',
                                            'The pieces that texts are cut into; for a model that is tuned further: '
                                            'those of the dataset it was trained on')
                self.vocab_size = look.field(ui.number('Vocabulary', value=4096, min=16, format='%.0f'), 'vocab_size',
                                             'Of a tokenizer that is trained here, at most')
                self.val_fraction = look.field(ui.number('Share to evaluate', value=0.1, min=0, max=1, step=0.05),
                                               'val_fraction', 'It is never learned, and tells how good the model is')
            with ui.expansion('More', icon='tune'), ui.element('div').classes('fields wide'):
                self.exclude = look.field(ui.input('Leave out'), 'exclude', 'As in a .gitignore: build/,*.log')
                self.text_column = look.field(ui.input('Columns of tables'), 'text_column',
                                              'text, or question,answer; empty: found by what is in them')
                self.separator = look.field(ui.input('Between documents in a file'), 'document_separator',
                                            'As <|endoftext|>')
                self.append = look.field(ui.switch('Add to the dataset that is there'), 'append',
                                         'With its tokenizer, instead of replacing it')
            self.command = look.code('', 'prepare-command')
            with look.row():
                self.try_it = look.mark(ui.button('What would be taken?', icon='search', on_click=self.on_dry_run)
                                        .props('outline'), 'dry-run')
                self.go = look.mark(ui.button('Prepare', icon='play_arrow', on_click=self.on_prepare), 'prepare')
            self.name_words = ui.label().classes('muted small').props('data-testid=dataset-words role=status')
            self.trouble = look.trouble(test_id='prepare-trouble')
            self.dry = ui.label().classes('said wide mono').props('tabindex=0 data-testid=dry-run-text')
            self.dry.bind_visibility_from(self.dry, 'text', backward=bool)
        for control in (self.name, self.tokenizer, self.vocab_size, self.val_fraction, self.exclude, self.text_column,
                        self.separator, self.append):
            control.on_value_change(self.show_command)
        self.show_command()

    def build_work(self):
        with look.sheet('At work', 'work') as self.work:
            with look.row():
                self.work_name = ui.label().classes('strong grow')
                self.stop = look.mark(ui.button('Stop', icon='stop', on_click=self.on_stop).props('outline'),
                                      'prepare-stop')
            with ui.element('div').classes('banner').props('role=status') as self.banner:
                self.icon = ui.icon('info').props('aria-hidden=true')
                self.words = ui.label().props('data-testid=prepare-state')
            with ui.element('div') as self.next:
                self.train = look.Words('a', 'Train a model on it').classes('go next').props('data-testid=train-on-it')
            self.said = ui.label().classes('said wide mono').props('tabindex=0 data-testid=prepare-log')
        self.work.set_visibility(False)
        self.working = newest_work()

    def build_look(self):
        with look.sheet('A look inside', 'inside') as self.inside:
            with look.row().classes('tight'):
                self.which = look.field(ui.select([], label='Dataset'), 'inside-which')
                self.another = look.mark(ui.button('Other places', icon='casino', on_click=self.on_other)
                                         .props('outline'), 'other-places')
            self.lengths = Chart('Tokens in a document', 'chart-lengths', 180)
            self.windows = look.mark(ui.element('div').classes('looks'), 'windows')
        self.seed = 0
        self.which.on_value_change(self.look_inside)

    # --- the form

    def on_paths(self):
        """A name follows from what is chosen first."""
        if self.paths.chosen:
            name = os.path.basename(self.paths.chosen[0].rstrip('/')).partition('.')[0]
            self.name.value = ''.join(c if c.isascii() and (c.isalnum() or c in '_-') else '-' for c in name).strip(
                '-_') or 'mine'
        self.show_command()

    def arguments(self):
        """For prepare.py; Refused if the name is none."""
        wanted = {'tokenizer': self.tokenizer.value, 'vocab_size': whole(self.vocab_size.value),
                  'val_fraction': self.val_fraction.value, 'exclude': self.exclude.value or '',
                  'text_column': self.text_column.value or '', 'document_separator': self.separator.value or ''}
        usual = {'tokenizer': 'bpe', 'vocab_size': 4096, 'val_fraction': 0.1}
        changed = {name: value for name, value in wanted.items() if value not in (None, usual.get(name, ''))}
        if self.tokenizer.value not in ('bpe', 'char'):
            changed.pop('vocab_size', None)
        if self.append.value:
            changed['append'] = 'true'
        return [*self.paths.chosen, *launch.flags(changed)]

    def show_command(self):
        try:
            out = launch.dataset_folder(self.name.value or '')
            words = f'{out} is there: it will be replaced.' if os.path.exists(out) and not self.append.value else ''
        except launch.Refused as refusal:
            out, words = '…', str(refusal)
        self.name_words.set_text(words)
        self.command.set_text(launch.command_line('prepare.py', [*self.arguments(), f'--out={out}']))

    async def on_dry_run(self):
        self.trouble.text = ''
        self.try_it.set_enabled(False)
        self.dry.text = 'Looking…'
        try:
            script = (launch.script_path('prepare.py'),)
            _, text = await away(launch.answer_of, script, [*self.arguments(), '--dry_run=true'])
            self.trouble.text = trouble_of(text)
            text = text.removeprefix('dry_run = True\n').replace('without --dry_run', 'when they are prepared')
            cut = '' if len(text) <= LONGEST else f'[{len(text) - LONGEST:,} characters are not shown]\n'
            self.dry.text = cut + text[-LONGEST:].strip('\n')
        except launch.Refused as refusal:
            self.dry.text = ''
            self.trouble.text = str(refusal)
        finally:
            self.try_it.set_enabled(True)

    async def on_prepare(self):
        self.trouble.text = ''
        self.go.set_enabled(False)
        try:
            task = launch.preparing(self.name.value or '')
            folder = launch.dataset_folder(self.name.value or '')
            await away(launch.start, task, [*self.arguments(), f'--out={folder}'], self.request)
            self.request = secrets.token_hex(8)
            self.working = os.path.basename(folder)
            self.dry.text = ''
        except launch.Refused as refusal:
            self.trouble.text = str(refusal)
        finally:
            self.go.set_enabled(True)

    async def on_stop(self):
        try:
            await away(launch.stop, launch.preparing(self.working))
        except launch.Refused as refusal:
            self.trouble.text = str(refusal)

    # --- each second

    async def tick(self):
        self.list_datasets()
        name = self.working
        if not name:
            return
        standing, text = await away(work_of, name)
        if (name, standing, text) == self.last or name != self.working:
            return
        self.last = name, standing, text
        self.work.set_visibility(standing is not None)
        if standing:
            self.work_name.set_text(name)
            self.banner.classes(replace=f'banner {standing.state}')
            self.icon.props['name'] = ICONS.get(standing.state, 'info')
            self.words.set_text(standing.words)
            self.stop.set_visibility(standing.state == 'running')
            self.next.set_visibility(standing.state == 'complete')
            self.train.props['href'] = f'/train?{urlencode(dict(dataset=name))}'
            self.said.set_text(text)

    def list_datasets(self):
        names = datasets.names()
        stamps = [(name, os.path.getmtime(os.path.join(datasets.ROOT, name))) for name in names
                  if os.path.isdir(os.path.join(datasets.ROOT, name))]
        if stamps == self.names:
            return
        self.names = stamps
        # another model's own, for texts on which it is to be tuned
        self.tokenizer.set_options(TOKENIZERS | {f'data/{name}': f'that of {name}' for name in names})
        rows = []
        for name in names:
            try:
                facts = datasets.facts_of(name)
                rows.append((name, count_in_words(facts['train']), count_in_words(facts['val']),
                             f'{facts["documents"]:,}', f'{facts["tokenizer"]}, {facts["vocab_size"]:,} ids',
                             bytes_in_words(facts['bytes'])))
            except (datasets.NoDataset, OSError):
                rows.append((name, 'cannot be read', '', '', '', ''))
        look.fill_table(self.table, rows)
        self.none.set_visibility(not rows)
        self.inside.set_visibility(bool(rows))
        if self.which.value not in names:
            self.which.set_options(names, value=names[0] if names else None)
        else:
            self.which.set_options(names)
            ui.timer(0, self.look_inside, once=True)

    # --- a look inside

    async def on_other(self):
        self.seed += 1
        await self.look_inside()

    async def look_inside(self):
        """Random places of the text, and how long the documents are."""
        name = self.which.value
        if not name:
            return
        try:
            places, lengths = await away(inside_of, name, self.seed)
            trouble = ''
        except datasets.NoDataset as error:
            places, lengths, trouble = [], [], str(error)
        self.windows.clear()
        with self.windows:
            if trouble:
                look.note(trouble, 'warn')
            for start, text in places:
                ui.label(f'from token {start:,}').classes('small muted')
                ui.label(text).classes('said mono').props('tabindex=0')
        bars = [[f'{least:,}+', count] for least, count in lengths]
        self.lengths.draw([Curve('documents', '--accent', bars)], bars=True)


def trouble_of(text):
    """Why of what a dry run looked at nothing could be prepared; '' if something can."""
    errors = [line.removeprefix('error: ') for line in text.split('\n') if line.startswith('error: ')]
    if errors:
        return errors[-1]
    if re.search(r'^ +files +bytes\n(?:skipped|nothing) ', text, re.MULTILINE):
        return 'There is nothing in it to learn from. What is read: text, code, PDF, office files, tables, mail.'
    return ''


def whole(value):
    """A number of the form as prepare.py takes it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def inside_of(name, seed):
    return datasets.windows(name, 3, seed), datasets.lengths(name)


def newest_work():
    """The name of the dataset that the page made last, or makes; '' if there is none."""
    try:
        found = [name.removesuffix('.started.json') for name in os.listdir(datasets.ROOT)
                 if name.endswith('.started.json')]
    except OSError:
        return ''
    records = {}
    for name in found:
        try:
            records[name] = launch.read_record(launch.preparing(name).record).get('since', '')
        except launch.Refused:
            pass
    return max(records, key=records.get, default='')


def work_of(name):
    """(the Standing of a dataset's making, what it said)."""
    standing = runs.made(name)
    text = runs.last_words(launch.preparing(name))
    lines = [runs.last_shown(line) for line in text.rstrip('\n').split('\n') if not line.startswith('$ ')]
    return standing, '\n'.join(lines)
