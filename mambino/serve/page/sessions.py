"""The sessions of a model on the page: texts that are kept in its folder and go on another day.

    refresh = show_sessions(library, model, session)    # model, session: controls that name them
"""
import os
import time

from nicegui import ui

from mambino.sample.sessions import free_path, name_of, names_in
from mambino.serve import session_api
from mambino.serve.page import look
from mambino.serve.told import Refused


def sessions_of(run):
    """[(name, when it was written), …] of a model, the latest first."""
    folder = os.path.dirname(session_api.path_of(run, 'x'))
    found = []
    for name in names_in(folder):
        try:
            found.append((name, os.path.getmtime(os.path.join(folder, f'{name}.pt'))))
        except OSError:                 # it went meanwhile
            pass
    return sorted(found, key=lambda session: -session[1])


def fork(run, name):
    """Copies a session → the copy's name."""
    copy = name_of(free_path(session_api.existing(run, name)))
    session_api.copy(run, name, copy)
    return copy


def show_sessions(library, model, session):
    """A list with what can be done with each → a function that shows it anew."""
    trouble = look.trouble(test_id='session-trouble')
    rows = ui.element('div').classes('list')

    def act(function, name):
        try:
            made = function(library.find(model.value), name)
            trouble.set_text('')
            if made:
                session.set_value(made)
        except (Refused, OSError) as error:
            trouble.set_text(str(error))
        refresh()

    def delete(run, name):
        session_api.delete(library, run, name)

    def confirm(name):
        with ui.dialog() as dialog, ui.element('div').classes('sheet'):
            ui.label(f'Delete the session {name}? Its text is lost.')
            with look.row():
                ui.button('Delete', on_click=lambda: (dialog.close(), act(delete, name))).props('color=negative')
                ui.button('Keep', on_click=dialog.close).props('flat')
        dialog.open()

    def refresh():
        rows.clear()
        try:
            found = sessions_of(library.find(model.value))
        except Refused:                 # it went meanwhile
            found = []
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
