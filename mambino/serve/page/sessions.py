"""The sessions of a model on the page: texts that are kept in its folder and go on another day.

    refresh = show_sessions(library, model, session)    # model, session: controls that name them
"""
import os
import shutil
import time

from nicegui import ui

from mambino.sample.sessions import free_path, names_in, path_of
from mambino.serve.page import look
from mambino.serve.told import NoModel, told


def folder_of(library, name):
    """The folder of a run; '' where there is none of this name."""
    return next((run['out_dir'] for run in library.names() if run['id'] == name), '')


def sessions_of(out_dir):
    """[(name, when it was written), …], the latest first."""
    folder = os.path.join(out_dir, 'sessions')
    found = []
    for name in names_in(folder):
        try:
            found.append((name, os.path.getmtime(os.path.join(folder, f'{name}.pt'))))
        except OSError:                 # it went meanwhile
            pass
    return sorted(found, key=lambda session: -session[1])


def existing_path(out_dir, name):
    """The file of a session that is there; NoModel where there is none."""
    with told():
        path = path_of(out_dir, name)
    if not os.path.isfile(path):
        raise NoModel(f'There is no session {name!r} any more.')
    return path


def fork(out_dir, name):
    """Copies a session → the copy's name."""
    path = existing_path(out_dir, name)
    copy = free_path(path)
    shutil.copyfile(path, copy + '.partial')
    os.replace(copy + '.partial', copy)
    return os.path.basename(copy).removesuffix('.pt')


def delete(out_dir, name):
    """Deletes a session."""
    os.remove(existing_path(out_dir, name))


def show_sessions(library, model, session):
    """A list with what can be done with each → a function that shows it anew."""
    trouble = look.trouble(test_id='session-trouble')
    rows = ui.element('div').classes('list')

    def act(function, name):
        try:
            made = function(folder_of(library, model.value), name)
            trouble.set_text('')
            if made:
                session.set_value(made)
        except (NoModel, OSError) as error:
            trouble.set_text(str(error))
        refresh()

    def confirm(name):
        with ui.dialog() as dialog, look.sheet():
            ui.label(f'Delete the session {name}? Its text is lost.')
            with look.row():
                ui.button('Delete', on_click=lambda: (dialog.close(), act(delete, name))).props('color=negative')
                ui.button('Keep', on_click=dialog.close).props('flat')
        dialog.open()

    def refresh():
        rows.clear()
        out_dir = folder_of(library, model.value)
        found = sessions_of(out_dir) if out_dir else []
        with rows:
            if not found:
                ui.label('None yet.').classes('muted small')
            for name, moment in found:
                show_session(name, moment)

    def show_session(name, moment):
        with ui.element('div').classes('item').props('data-testid=session-row'):
            with ui.element('div').classes('min-w-0'):
                ui.label(name).classes('break-words')
                ui.label(time.strftime('%Y-%m-%d %H:%M', time.localtime(moment))).classes('muted small figure')
            for sign, word, function in (('play_arrow', 'Go on with', session.set_value),
                                         ('call_split', 'Fork', lambda name: act(fork, name)),
                                         ('delete', 'Delete', confirm)):
                button = ui.button(icon=sign, on_click=lambda function=function: function(name))
                button.props('flat dense size=sm').props['aria-label'] = f'{word} {name}'

    model.on_value_change(refresh)
    refresh()
    return refresh
