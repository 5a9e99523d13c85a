"""The panel that says what this machine is, and which settings suit one like it."""
import os
import platform
from urllib.parse import urlencode

import torch
from nicegui import ui

from mambino import kernels, machine
from mambino.serve import recipes
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.charts import dress
from mambino.serve.page.train import KIND_NAMES
from mambino.serve.page.words import bytes_in_words
from mambino.serve.told import Refused

MEMINFO = '/proc/meminfo'


def show(library):
    """Fills the panel."""
    dress()
    look.title('Machine', 'What trains here, and which settings suit it.')
    MachinePanel()


def facts():
    """{name: text} of this machine."""
    device = machine.choose_device('auto')
    whole = machine.number_in(MEMINFO, r'^MemTotal:\s*(\d+)')
    free = machine.available_memory('cpu')
    name, _, _ = machine.machine_name('cpu').rpartition(', ')
    found = {'processor': name or platform.processor(), 'cores': f'{os.cpu_count()}',
             'memory free': bytes_in_words(free) + (f' of {bytes_in_words(whole * 1024)}' if whole else '')}
    if device.startswith('cuda'):
        card = torch.cuda.get_device_properties(0)
        found['GPU'] = card.name
        found['GPU memory free'] = f'{bytes_in_words(machine.available_memory(device))} of ' \
                                   f'{bytes_in_words(card.total_memory)}'
    else:
        found['GPU'] = 'Apple\'s' if device == 'mps' else 'none: it computes on the processor'
    found['trains in'] = ' or '.join(dtypes_of(device))
    found['writes in'] = machine.choose_dtype('auto', device)
    return found


def dtypes_of(device):
    """The precisions that training takes here: on a CPU the faster one of two, measured with the model."""
    return ['float32', 'bfloat16'] if device == 'cpu' else [machine.choose_dtype('auto', device)]


class MachinePanel:
    """The panel."""

    def __init__(self):
        with look.sheet('This machine', 'machine'):
            self.stats = look.stats(facts(), 'machine-facts')
            with look.row():
                self.measure = look.mark(ui.button('Measure its speed', icon='speed', on_click=self.on_measure)
                                         .props('outline'), 'measure')
                self.speed = ui.label().classes('muted').props('role=status data-testid=speed')
        with look.sheet('Settings for a machine', 'profiles'):
            with ui.element('div').classes('fields wide'):
                self.profile = look.field(ui.select(list(recipes.PROFILES), label='Machine', value='this machine'),
                                          'profile')
                self.kind = look.field(ui.select(KIND_NAMES, label='Model', value='mamba'), 'profile-kind')
            self.words = ui.label().classes('muted').props('data-testid=profile-words')
            self.table = look.table(['setting', 'value', 'what it is'], [], 'profile-settings')
            with ui.element('div'):
                self.use = look.Words('a', 'Train with these').classes('go next').props('data-testid=profile-use')
        self.profile.on_value_change(self.show_profile)
        self.kind.on_value_change(self.show_profile)
        self.show_profile()
        ui.timer(5.0, self.tick)

    def tick(self):
        for name, text in facts().items():
            self.stats[name].set_text(text)

    async def on_measure(self):
        self.measure.set_enabled(False)
        self.speed.set_text('Measuring…')
        try:
            self.speed.set_text(await away(measured))
        finally:
            self.measure.set_enabled(True)

    def show_profile(self):
        profile, kind = self.profile.value, self.kind.value
        recipe, besides = recipes.profile_recipe(profile, kind)
        try:
            rows = recipes.profile_settings(profile, kind)
            words = recipes.opening_comment(recipe).partition('\n')[0] if recipe else (
                'train.py finds the rest by itself: sizes and precision by the device, how much is computed at once by '
                'the memory that is free.')
        except Refused as refusal:
            rows, words = [], str(refusal)
        self.words.set_text(words)
        look.fill_table(self.table, rows)
        query = dict(besides)
        if recipe:
            query['recipe'] = os.path.basename(recipe).removesuffix('.py')
        self.use.props['href'] = f'/train?{urlencode({"model": kind} | query)}'


def measured():
    """How fast matrices are multiplied, and memory is copied, in words."""
    device = machine.choose_device('auto')
    speeds = [f'{machine.matmul_peak(device, dtype) / 1e9:,.0f} billion operations a second in {dtype}'
              for dtype in dtypes_of(device)]
    copied = machine.copy_bandwidth(device) / 1e9
    return (f'Products of matrices: {" and ".join(speeds)}; copying: {copied:,.0f} GB a second; '
            f'{kernels.describe_kernels(device)}.')
