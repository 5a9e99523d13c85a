"""The panel on which a model is trained: what kind and how large, on which text, whether it fits into
the memory, all settings, and the run as it goes on.

    /train?recipe=quick&vram=8      # as the panel Machine links here
    /train?dataset=mine             # … Data
    /train?run=out-mine             # with this run below

What is chosen is kept in the browser, so that a reload finds it; what runs stands in the run's files.
"""
import json
import os
import secrets
import time

from nicegui import ui

from mambino.serve import datasets, launch, planning, recipes
from mambino.serve.library import checkpoint_in
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.charts import dress
from mambino.serve.page.settings import Form
from mambino.serve.page.watch import Watch
from mambino.serve.page.words import LABELS, bytes_in_words, count_in_words, labelled

SIZES = {'': 'by the machine', '50m': '50 M', '150m': '150 M', '400m': '400 M'}
KIND_NAMES = {'mamba': 'Mamba', 'gpt': 'GPT', 'hybrid': 'Hybrid'}
KIND_WORDS = {
    'mamba': 'It remembers what it has read in a state of one size, so long texts cost no more.',
    'gpt': 'A transformer: for each token it looks back at all before.',
    'hybrid': 'Both in each layer: it looks back, and it has a state.'}
VERSIONS = {'2': 'Mamba-2', '3': 'Mamba-3', '1': 'Mamba-1'}     # the last one in no hybrid
NEWEST = 'the one prepared last'
PLAN_AFTER = 0.6        # seconds without a change, until the memory is planned anew
DOUBLE = 1.0            # seconds after a start, in which another click is one too many
PLACE = 'mambino-train'


def show(library):
    """Fills the panel."""
    dress()
    look.title('Train', 'Choose the model and the text. The run is a process of its own: it goes on when this page, '
                        'or the server, is closed.')
    TrainPanel(dict(ui.context.client.request.query_params))


class TrainPanel:
    """The panel. query: of its address."""

    def __init__(self, query):
        self.choice = recipes.Choice()
        self.request = secrets.token_hex(8)
        self.again = 0.0                # when the next click on Start counts
        self.is_filling = False
        self.has_begun = False          # until then nothing is planned: what is chosen is not known
        self.plan_timer = None
        self.build_form()
        self.watch = Watch()
        self.watch_first(query.get('run', ''))
        ui.timer(2.0, self.list_runs)
        ui.timer(0, lambda: self.begin(query), once=True)

    # --- what is seen

    def build_form(self):
        names = datasets.names()
        if not names:
            look.empty('There is no text to learn from yet.', 'Prepare some first', '/data', 'no-dataset')
        with look.sheet('What to train', 'form'):
            with look.row():
                self.kind = look.field(ui.toggle(KIND_NAMES, value='mamba'), 'kind')
                self.kind.props('unelevated no-caps aria-label="Kind of model"')
                self.kind_words = ui.label().classes('muted small flex-1').style('min-width: 200px')
            with ui.element('div').classes('fields wide'):
                self.dataset = look.field(
                    ui.select({'': NEWEST} | {name: name for name in names}, label='Text', value='', with_input=True,
                              new_value_mode='add-unique'),
                    'dataset', 'A dataset; or several and their shares, as code:0.6,docs:0.4')
                self.version = look.field(ui.select(VERSIONS, label='Recurrence', value='2'), 'version',
                                          'How the state is kept: Mamba-3\'s turns, so that it can count')
                self.size = look.field(ui.select(SIZES, label='Parameters', value=''), 'size',
                                       'How large the model is: a larger one can learn more, and takes longer')
                self.n_layer = look.field(ui.input(LABELS['n_layer']), 'n_layer',
                                          'Empty: as the size, or the machine, has it')
                self.n_embd = look.field(ui.input(LABELS['n_embd']), 'n_embd',
                                         'Empty: as the size, or the machine, has it')
                self.max_iters = look.field(ui.input(LABELS['max_iters']), 'max_iters', 'Empty: as suits the machine')
                paths = {path: os.path.basename(path).removesuffix('.py') for path in recipes.recipes()}
                self.origin = look.field(ui.select(origins(), label='Begin with', value='auto'), 'init_from',
                                         'A model that learns more: another text, or, with the recipe finetune_chat, '
                                         'conversations')
                self.recipe = look.field(ui.select({'': 'none'} | paths, label='Recipe', value=''), 'recipe',
                                         'Settings in a file, of config/')
            self.about = ui.label().classes('said small').props('tabindex=0 data-testid=recipe-about')
            self.about.bind_visibility_from(self.about, 'text', backward=bool)
            self.trouble = look.trouble(test_id='form-trouble')
        with look.sheet('Memory', 'plan'):
            self.bar = ui.element('div').classes('memory-bar').props('role=img data-testid=memory-bar')
            self.key = ui.element('div').classes('key')
            self.place = ui.element('div').classes('hidden')        # of the timer that waits for the last change
            self.plan_words = ui.label('Counting…').classes('muted').props('data-testid=plan-words role=status')
        with look.sheet():
            self.form = Form(self.choice, self.on_form)
            self.command = look.code('', 'command')
            with look.row().classes('tight'):
                self.name = look.field(ui.input('Name of the run', value=free_name()), 'run-name-input',
                                       'Its folder is called out-…')
                self.start = look.mark(ui.button('Start', icon='play_arrow', on_click=self.on_start), 'start')
                self.beside = look.field(ui.checkbox('beside the one that is training'), 'beside')
            self.name_words = ui.label().classes('muted small').props('data-testid=name-words')
            self.start_trouble = look.trouble(test_id='start-trouble')
        with look.row().classes('tight'):
            self.which = look.field(ui.select({}, label='Run below'), 'which-run')
        self.which.on_value_change(self.on_which)
        for name, control in self.controls().items():
            control.on_value_change(lambda name=name: self.on_control(name))
        self.recipe.on_value_change(self.on_recipe)
        self.name.on_value_change(self.on_name)
        self.show_choice()

    def controls(self):
        """{setting: its control above the form of all}."""
        return dict(model=self.kind, dataset=self.dataset, version=self.version, size=self.size, n_layer=self.n_layer,
                    n_embd=self.n_embd, max_iters=self.max_iters, init_from=self.origin)

    async def begin(self, query):
        """What the address says, else what was chosen here before."""
        if 'recipe' in query or 'vram' in query or 'model' in query:
            self.take_recipe(recipes.recipe_of(query.get('recipe', '')))
            for name in ('vram', 'model'):
                if name in query:
                    self.choice.set(name, query[name])
        else:
            kept = await look.recalled(PLACE)
            self.take_recipe(str(kept.get('recipe', '')))
            for name, value in look.as_dict(json.dumps(kept.get('changed', {}))).items():
                if isinstance(value, str) and name in self.choice.base:
                    self.choice.set(name, value)
            self.name.value = name_kept(kept.get('name')) or self.name.value
        if 'dataset' in query:
            self.choice.set('dataset', query['dataset'])
        if query.keys() & {'recipe', 'vram', 'model', 'dataset'}:
            self.keep()                         # a reload finds what is changed from here on
            ui.run_javascript('history.replaceState(null, "", location.pathname)')
        self.has_begun = True
        self.show_choice()

    def take_recipe(self, recipe):
        try:
            self.choice.take(recipe if recipe in recipes.recipes() else '')
        except launch.Refused as refusal:
            self.choice.take('')
            self.trouble.text = str(refusal)

    # --- what is chosen

    def on_control(self, name):
        if self.is_filling:
            return
        value = self.controls()[name].value or ''
        empty = self.choice.base[name] if name in ('n_layer', 'n_embd', 'max_iters') and not value else value
        self.choice.set(name, empty)
        if name == 'size' and value:            # which says both
            for part in ('n_layer', 'n_embd'):
                self.choice.set(part, '0')
        if name == 'model' and not has_version(value, self.choice.value('version')):
            self.choice.set('version', recipes.text_of(recipes.all_settings()['version'].default))
        self.show_choice()
        self.keep()

    def on_recipe(self):
        if self.is_filling:
            return
        self.trouble.text = ''
        self.take_recipe(self.recipe.value or '')
        self.show_choice()
        self.keep()

    def on_name(self):
        self.show_command()
        self.keep()

    def on_form(self):
        self.show_choice(is_form=False)
        self.keep()

    def keep(self):
        """In the browser."""
        kept = json.dumps(dict(recipe=self.choice.recipe, changed=self.choice.changed, name=self.name.value))
        ui.run_javascript(f'localStorage.setItem({json.dumps(PLACE)}, {json.dumps(kept)})')

    def show_choice(self, is_form=True):
        """All controls are as the choice has it, and the memory is planned anew."""
        self.is_filling = True
        for name, control in self.controls().items():
            value = self.choice.value(name)
            if name in ('n_layer', 'n_embd', 'max_iters') and value == '0':
                value = ''
            if isinstance(control, (ui.select, ui.toggle)) and value not in control.options:
                control.set_options({**control.options, value: value})
            if control.value != value:
                control.set_value(value)
        self.recipe.set_value(self.choice.recipe)
        self.version.set_visibility(self.kind.value != 'gpt' or 'version' in self.choice.changed)
        self.is_filling = False
        self.kind_words.set_text(KIND_WORDS.get(self.kind.value, ''))
        self.about.set_text(recipes.opening_comment(self.choice.recipe) if self.choice.recipe else '')
        if is_form:
            self.form.refresh()
        self.show_command()
        if self.has_begun:
            if self.plan_timer:
                self.plan_timer.cancel()
            with self.place:
                self.plan_timer = ui.timer(PLAN_AFTER, self.plan, once=True)

    def show_command(self):
        """The command line, and what the name leads to."""
        try:
            out_dir = launch.run_folder(self.name.value or '')
            words = f'Its folder is {out_dir}.'
            if out_dir in launch.run_folders():
                words = f'{out_dir} is there: it goes on, and its model stays what it is.'
        except launch.Refused as refusal:
            out_dir, words = '…', str(refusal)
        self.name_words.set_text(words)
        self.command.set_text(launch.command_line('train.py', [*self.choice.arguments(), f'--out_dir={out_dir}']))

    # --- the memory

    async def plan(self):
        arguments = self.choice.arguments()
        problems = self.choice.problems()
        self.trouble.text = labelled(' '.join(problems.values()))
        if problems:
            self.show_plan({}, 'A setting has to be mended first.')
            return
        if not datasets.names():
            self.show_plan({}, 'It is counted as soon as there is a text.')
            return
        self.plan_words.set_text('Counting parameters and memory…')
        client = ui.context.client

        def is_wanted():
            return client.has_socket_connection and arguments == self.choice.arguments()
        try:
            # a folder that is no run: what would be, begun anew
            plan = await away(planning.plan_of, [*arguments, '--out_dir=out-of-a-plan'], is_wanted)
        except launch.Refused as refusal:
            if arguments == self.choice.arguments():
                self.show_plan({}, labelled(str(refusal)), is_trouble=True)
            return
        if plan and arguments == self.choice.arguments():
            self.show_plan(plan, sentence_of(plan))

    def show_plan(self, plan, words, is_trouble=False):
        """The bar: what takes how much of the memory that is free."""
        parts = plan.get('memory') or {}
        free = plan.get('free') or 0
        whole = max(free, parts.get('total', 0)) or 1
        self.bar.clear()
        self.key.clear()
        for name in ('weights', 'gradients', 'optimizer', 'activations', 'temporary'):
            size = parts.get(name, 0)
            if size <= 0:
                continue
            with self.bar:
                ui.element('div').classes(f'part-{name}').style(f'width: {100 * size / whole:.2f}%')
            with self.key, ui.element('div'):
                ui.element('i').classes(f'part-{name}')
                ui.label(f'{name} {bytes_in_words(size)}')
        if parts:
            with self.key:
                with ui.element('div'):
                    ui.label(f'of {bytes_in_words(free)} free' if free else 'how much is free is not known')
        self.bar.props['aria-label'] = words
        self.plan_words.set_text(words)
        self.plan_words.classes(replace='note warn' if is_trouble else 'muted')

    # --- the run

    async def on_start(self):
        if time.monotonic() < self.again:           # the second click of a double one
            return
        self.start_trouble.text = ''
        problems = self.choice.problems()
        if problems:
            self.start_trouble.text = labelled(' '.join(problems.values()))
            return
        self.start.set_enabled(False)
        try:
            out_dir = await away(launch.train, self.name.value or '', self.choice.arguments(), self.request,
                                 self.beside.value)
        except launch.Refused as refusal:
            self.start_trouble.text = str(refusal)
            return
        finally:
            self.start.set_enabled(True)
        self.request = secrets.token_hex(8)
        self.again = time.monotonic() + DOUBLE
        self.list_runs(out_dir)
        self.name.value = free_name()
        ui.run_javascript(f'getHtmlElement({self.watch.sheet.id}).scrollIntoView({{behavior: "smooth"}})')

    def watch_first(self, wanted):
        """The run below: that of the address, else one that trains, else the last one."""
        names = launch.run_folders()
        training = launch.trainings()
        newest = max(names, key=last_change, default='')
        self.list_runs(wanted if wanted in names else next(iter(training), newest))

    def list_runs(self, chosen=None):
        """The runs there are, which become more in another tab, too."""
        names = {name: name for name in sorted(launch.run_folders(), key=last_change, reverse=True)}
        value = self.which.value if chosen is None else chosen
        if value not in names:
            value = next(iter(names), None)
        if names != self.which.options or value != self.which.value:
            self.which.set_options(names, value=value)
        self.which.set_visibility(bool(names))
        self.beside.set_visibility(bool(launch.trainings()))
        here = {self.origin.value: self.origin.value} | origins()
        if here != self.origin.options:
            self.origin.set_options(here)
        self.on_which()

    def on_which(self):
        if hasattr(self, 'watch'):
            self.watch.follow(self.which.value or '')


def has_version(kind, version):
    """Whether there is such a recurrence in a model of this kind; a GPT has none."""
    return kind == 'mamba' or (kind == 'hybrid' and version != '1')


def last_change(out_dir):
    """When a run wrote last, in seconds since 1970."""
    times = [0.0]
    for name in ('metrics.jsonl', 'train.log', 'ckpt.pt'):
        try:
            times.append(os.path.getmtime(os.path.join(out_dir, name)))
        except OSError:
            pass
    return max(times)


def origins():
    """{where a new run can begin: its name}."""
    return {'auto': 'a new model'} | {name: name for name in launch.run_folders() if checkpoint_in(name)}


def free_name():
    """A name that no run has yet."""
    taken = set(launch.run_folders())
    return next(str(n) for n in range(1, 10 ** 6) if f'out-{n}' not in taken)


def name_kept(name):
    """The name that was typed before, if no run has it meanwhile; else ''."""
    try:
        return name if launch.run_folder(name or '') not in launch.run_folders() else ''
    except (launch.Refused, AttributeError):
        return ''


def sentence_of(plan):
    """A plan in words."""
    epochs = plan['max_iters'] * plan['tokens_per_step'] / max(1, plan['train_tokens'])
    total = (plan.get('memory') or {}).get('total')
    needed = f'About {bytes_in_words(total)} of memory. ' if total else ''
    state = f', a state of {bytes_in_words(plan["state"])} for each text it writes' if plan.get('state') else ''
    layers = 'one layer' if plan['n_layer'] == 1 else f'{plan["n_layer"]} layers'
    return (f'{count_in_words(plan["parameters"])} parameters: {layers} of width {plan["n_embd"]}, '
            f'context {plan["block_size"]}{state}. {needed}{plan["max_iters"]:,} steps of '
            f'{plan["tokens_per_step"]:,} tokens, {plan["batch"]} sequences at once: {plan["dataset"]} '
            f'{epochs:.1f} times. Computed on {plan["device"]} in {plan["dtype"]}.')
