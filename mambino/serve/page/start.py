"""The first panel: what to do, in three steps, and how far one is."""
import json
import os

from nicegui import ui

from mambino.serve.page import look


def datasets(folder):
    """Names of the datasets in data/, the one prepared last first."""
    root = os.path.join(folder, 'data')
    metas = [os.path.join(root, name, 'meta.json') for name in (os.listdir(root) if os.path.isdir(root) else [])]
    metas = sorted(filter(os.path.isfile, metas), key=os.path.getmtime, reverse=True)
    return [os.path.basename(os.path.dirname(meta)) for meta in metas]


def tokens_of(folder, name):
    """How many tokens a dataset has to learn from; None where its description cannot be read."""
    try:
        with open(os.path.join(folder, 'data', name, 'meta.json'), encoding='utf-8') as f:
            return json.load(f)['splits']['train']['tokens']
    except (OSError, ValueError, KeyError, TypeError):
        return None


def state_of_data(library):
    names = datasets(library.folder)
    if not names:
        return False, 'Nothing is prepared yet. Any folder will do: text, PDF, office files, tables, code.'
    tokens = tokens_of(library.folder, names[0])
    size = f', {tokens:,} tokens' if tokens is not None else ''
    more = f'; {len(names) - 1} more' if len(names) > 1 else ''
    return True, f'{names[0]}{size}{more}'


def state_of_models(library):
    names = [run['id'] for run in library.names()]
    if not names:
        return False, 'No model yet. A small one learns in minutes, on this machine.'
    more = f'; {len(names) - 1} more' if len(names) > 1 else ''
    return True, f'{names[0]}{more}'


def show(library):
    """Fills the panel."""
    look.title('A small language model from your own files',
               'Three steps. Everything stays on this machine.')
    has_data, data = state_of_data(library)
    has_model, models = state_of_models(library)
    talk = 'Ready: let it write, or ask it something.' if has_model else 'As soon as there is a model.'
    steps = (
        ('Your files', data, has_data, '/data', 'Add files' if has_data else 'Choose files', not has_data),
        ('Train', models, has_model, '/train', 'Train another' if has_model else 'Train', has_data and not has_model),
        ('Talk to it', talk, False, '/generate', 'Generate', has_model),
    )
    with ui.element('ol').classes('steps'):
        for number, (name, state, is_done, address, verb, is_next) in enumerate(steps, 1):
            with ui.element('li').classes('step' + ' done' * is_done).props(f'data-testid=step-{number}'):
                with ui.element('span').classes('mark'):
                    if is_done:
                        ui.icon('check')
                    else:
                        ui.label(str(number))
                with ui.element('div').classes('what'):
                    look.heading(name)
                    ui.label(state).classes('muted')
                look.Words('a', verb).classes('go' + ' next' * is_next).props(f'href={address}')
