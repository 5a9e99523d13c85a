"""The panel that says where the server is, how one speaks to it, and how busy it is."""
import json

from nicegui import ui

from mambino.machine import available_memory, memory_used
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.words import bytes_in_words

EACH = 1.0              # seconds between two looks


def as_curl(address, model, needs_key):
    key = "  -H 'Authorization: Bearer KEY' \\\n" if needs_key else ''
    body = json.dumps(dict(model=model, prompt='Once upon a time', max_tokens=50), ensure_ascii=False, indent=2)
    body = body.replace("'", "'\\''")
    return f"curl {address}/completions \\\n{key}  -H 'Content-Type: application/json' \\\n  -d '{body}'"


def as_python(address, model, needs_key, fills_holes=False):
    key = 'KEY' if needs_key else 'none needed'
    client = f'from openai import OpenAI\n\nclient = OpenAI(\n    base_url={address!r},\n    api_key={key!r},\n)\n'
    if fills_holes:
        return (f'{client}answer = client.completions.create(\n    model={model!r},\n'
                "    prompt='Once upon',\n    suffix='there was',\n    max_tokens=10,\n)\n"
                'print(answer.choices[0].text)')
    return (f'{client}'
            f'answer = client.chat.completions.create(\n    model={model!r},\n'
            "    messages=[{'role': 'user', 'content': 'Hello'}],\n)\nprint(answer.choices[0].message.content)")


def show(library, needs_key=False):
    """Fills the panel. needs_key: whether clients must know one."""
    look.title('Server', 'What OpenAI\'s clients need to talk to the models here.')
    address = str(ui.context.client.request.base_url) + 'v1'
    model = library.default() or 'out'
    with look.sheet('Address'):
        look.code(address, 'address')
        key = ('Clients send the key that the server was started with.' if needs_key else
               'No key is needed: only this machine reaches it.')
        ui.label(f'{key} The first model below answers where none is named.').classes('muted')
    show_activity(library)
    with ui.element('div').classes('two'):
        with look.sheet('From a terminal'):
            look.code(as_curl(address, model, needs_key), 'curl')
        with look.sheet('From Python, pip install openai'):
            fills_holes = any(run['id'] == model and library.fills_holes(run) for run in library.names())
            look.code(as_python(address, model, needs_key, fills_holes), 'python')


def show_activity(library):
    """Figures that are read again each second."""
    with look.sheet('Now'):
        names = ('rows in use', 'waiting', 'tokens/s', 'memory used', 'memory free')
        figures = look.stats(dict.fromkeys(names, '…'), 'activity')
        columns = ('model', 'about', '#rows', '#waiting', '#tokens/s', '#states kept')
        rows = look.table(columns, [], 'models')
        if not library.names():
            with ui.element('div').classes('row-of'):
                ui.label('There is no model yet.').classes('muted')
                ui.link('Train one first', '/train').classes('link')
    shown = []

    async def look_again():
        values, models = await away(activity, library)
        for name, text in values.items():
            figures[name].set_text(text)
        if models != shown:
            shown[:] = models
            look.fill_table(rows, models)

    ui.timer(EACH, look_again)


def activity(library):
    """({name: text} of all models, [(its columns), …] of each)."""
    schedulers = library.schedulers()
    about = {name: served.about for name, served in library.loaded.copy().items()}
    stats = {name: scheduler.stats() for name, scheduler in schedulers.items()}
    models = []
    default = library.default()
    names = [run['id'] for run in library.names()]
    for name in sorted(names, key=lambda name: name != default):
        found = stats.get(name)
        if not found:
            models.append((name, 'loaded when asked for', '', '', '', ''))
            continue
        kept = f'{found["kept_bytes"] / 1e6:,.1f} MB' if 'kept_bytes' in found else ''
        models.append((name, about.get(name, ''), f'{found["rows_used"]} of {found["rows"]}', str(found['queue']),
                       f'{found.get("tokens_per_second", 0):,.0f}', kept))
    values = {
        'rows in use': str(sum(found['rows_used'] for found in stats.values())),
        'waiting': str(sum(found['queue'] for found in stats.values())),
        'tokens/s': f'{sum(found.get("tokens_per_second", 0) for found in stats.values()):,.0f}',
        'memory used': bytes_in_words(memory_used('cpu')),
        'memory free': bytes_in_words(available_memory('cpu')),
    }
    return values, models
