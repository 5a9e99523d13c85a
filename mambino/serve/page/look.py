"""What the panels are made of, so that they look as one.

    with look.sheet('The model'):           # a part of a panel, with a title
        look.field(ui.input('Prompt'), 'prompt')
        look.stats({'tokens/s': '120'})
        look.code('python sample.py', 'command')
    look.empty('There is no model yet.', 'Train one', '/train')

All colours and distances stand in look.css; look.js has the theme. Text goes into labels alone: what
comes from a model or a file is never read as HTML.
"""
import json
import os

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

FOLDER = os.path.dirname(os.path.abspath(__file__))
DEFAULTS = (
    (ui.input, 'outlined dense'),
    (ui.number, 'outlined dense'),
    (ui.textarea, 'outlined dense'),
    (ui.select, 'outlined dense options-dense'),
    (ui.button, 'unelevated no-caps'),
    (ui.expansion, 'dense'),
    (ui.checkbox, 'dense'),
    (ui.switch, 'dense'),
    (ui.card, 'flat'),
)


class Words(TextElement):
    """A text in an element of this tag."""

    def __init__(self, tag, text):
        super().__init__(tag=tag, text=text)


def dress():
    """Once, before the first page: what all pages have in common."""
    for element, props in DEFAULTS:
        element.default_props(props)
    with open(os.path.join(FOLDER, 'look.css'), encoding='utf-8') as f:
        style = f.read()
    with open(os.path.join(FOLDER, 'look.js'), encoding='utf-8') as f:
        script = f.read()
    ui.add_head_html(f'<style>{style}</style><script>{script}</script>', shared=True)


def title(text, lead=''):
    """The heading of a panel, and a sentence on what it is for."""
    with ui.element('div'):
        heading(text, 1)
        if lead:
            ui.label(lead).classes('lead')


def heading(text, level=2):
    """A heading."""
    return Words(f'h{level}', text)


def sheet(name='', test_id=''):
    """A part of a panel; with … as its context."""
    element = ui.element('section').classes('sheet')
    if name:
        element.props['aria-label'] = name
        with element:
            heading(name)
    return mark(element, test_id)


def row():
    """Things side by side, that wrap."""
    return ui.element('div').classes('row-of')


def mark(element, test_id):
    """An element with a name that tests know it by."""
    if test_id:
        element.props['data-testid'] = test_id
    return element


def field(element, test_id, hint=''):
    """A control with its name for tests, and what it does as its tooltip."""
    mark(element, test_id)
    if hint:
        with element:
            ui.tooltip(hint).props('delay=500')
    return element


def note(text, kind=''):
    """A sentence. kind: '' or 'warn'."""
    return ui.label(text).classes(f'note {kind}')


def trouble(text='', test_id='trouble'):
    """A place for what went wrong, seen as soon as it has text."""
    label = ui.label(text).classes('trouble').props('role=alert')
    label.bind_visibility_from(label, 'text', backward=bool)
    return mark(label, test_id)


def empty(text, link='', address='', test_id='empty'):
    """In the place of a panel where there is nothing yet: a sentence, and where to go first."""
    with sheet(test_id=test_id).classes('empty'):
        ui.label(text)
        if link:
            ui.link(link, address).classes('link')


def stats(values, test_id=''):
    """Figures side by side, {name: text} → {name: its label}."""
    labels = {}
    with mark(ui.element('div').classes('stats'), test_id):
        for name, value in values.items():
            with ui.element('div').classes('stat'):
                labels[name] = ui.label(value).classes('value')
                ui.label(name).classes('name')
    return labels


def code(text, test_id):
    """Lines to copy → the element whose set_text changes them."""
    with ui.element('div').classes('code'):
        with ui.element('pre').props('tabindex=0'):
            shown = mark(ui.label(text), test_id)
        button = ui.button(icon='content_copy', on_click=lambda: copy(shown.text)).props('flat dense size=sm')
        button.props['aria-label'] = 'Copy'
    return shown


def copy(text):
    """Into the clipboard of the person."""
    ui.clipboard.write(text)
    ui.notify('Copied', timeout=1500)


def message(who, text, role):
    """What was said in a conversation."""
    with ui.element('div').classes(f'message {role}'):
        ui.label(who).classes('who')
        ui.label(text).classes('said')


def table(columns, rows, test_id='', kind=''):
    """A plain table of texts. columns: names, those of figures with a # before them; → the element of
    its rows, to be filled again by fill_table. kind: more classes."""
    is_figure = [name.startswith('#') for name in columns]
    with ui.element('div').classes('scroll-x'), mark(ui.element('table').classes(f'table {kind}'), test_id):
        with ui.element('thead'), ui.element('tr'):
            for name, right in zip(columns, is_figure):
                cell(name.removeprefix('#'), right, 'th')
        body = ui.element('tbody')
    body.is_figure = is_figure
    fill_table(body, rows)
    return body


def fill_table(body, rows):
    """Its rows anew."""
    body.clear()
    with body:
        for texts in rows:
            with ui.element('tr'):
                for text, right in zip(texts, body.is_figure):
                    cell(text, right, 'td')


def cell(text, right, tag):
    return Words(tag, str(text)).classes('number' if right else '')


def remember(key, elements, given=()):
    """Keeps the values of controls, {name: element}, in the browser: a reload finds them again, the
    server never had them. given: names of those that the address says."""
    place = json.dumps(f'mambino-{key}')
    client = ui.context.client
    at_first = {name: element.value for name, element in elements.items()}

    def keep():
        values = json.dumps({name: element.value for name, element in elements.items()})
        with client:
            ui.run_javascript(f'localStorage.setItem({place}, {json.dumps(values)})')

    async def restore():
        for name, value in (await recalled(f'mambino-{key}')).items():
            # what was typed before the browser's answer came stays
            is_free = name in elements and name not in given and elements[name].value == at_first[name]
            if is_free and is_possible(elements[name], value):
                elements[name].set_value(value)

    for element in elements.values():
        element.on('update:model-value', keep, throttle=1, leading_events=False)
    ui.timer(0, restore, once=True)


async def recalled(place):
    """What the browser keeps in a place, a dict; {} also where the tab has been closed meanwhile."""
    try:
        return as_dict(await ui.run_javascript(f'localStorage.getItem({json.dumps(place)})', timeout=5))
    except TimeoutError:
        return {}


def as_dict(text):
    """The dict that a text is as JSON; {} where it is none."""
    try:
        value = json.loads(text or '{}')
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def is_possible(element, value):
    """Whether a control can have this value: of the type that it has, and one of its choices."""
    if isinstance(element, ui.select):
        return value in element.options
    is_number = isinstance(element, ui.number)
    kinds = (int, float) if is_number else bool if isinstance(element.value, bool) else str
    return isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
