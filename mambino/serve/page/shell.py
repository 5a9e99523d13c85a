"""The page: what all panels have in common, and which there are.

    add_page(app, library)      # at /, /train, /generate …, on the API's app

Each panel has an address of its own, so that a reload, a link and the browser's arrows keep the place.
What a panel shows it reads anew each time: nothing that matters is kept by the page.
"""
from contextlib import asynccontextmanager
from functools import partial

from nicegui import app as pages
from nicegui import core, ui

from mambino.serve.page import data, export, generate, look, machine, perplexity, runs, server, start, train

# of each panel, by its address: its title, its sign in Material Icons, and what fills it
PANELS = {
    '': ('Start', 'home', start.show),
    'machine': ('Machine', 'memory', machine.show),
    'data': ('Data', 'folder_open', data.show),
    'train': ('Train', 'model_training', train.show),
    'runs': ('Runs', 'stacked_line_chart', runs.show),
    'generate': ('Generate', 'edit_note', generate.show),
    'perplexity': ('Perplexity', 'gradient', perplexity.show),
    'export': ('Export', 'ios_share', export.show),
    'server': ('Server', 'dns', server.show),
}
PING = 1        # seconds that a request of a tab without a websocket may stay open, and keep a server from its end
PATIENCE = 60   # seconds that a tab may be silent: where a model trains, a browser and a server wait for the cores
GROUPS = {'machine': 'Make a model', 'generate': 'Use a model'}     # headings above these panels
# a mamba
SIGN = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
        '<rect width="32" height="32" rx="8" fill="#1b7350"/>'
        '<path d="M7 22c5 0 4-12 9-12s4 12 9 12" fill="none" stroke="#fff" stroke-width="3.4" stroke-linecap="round"/>'
        '<circle cx="24.6" cy="10.4" r="2" fill="#9fe3c2"/></svg>')


def add_page(app, library, needs_key=False):
    """Puts the page on an app. needs_key: whether the API's clients must know a key."""
    look.dress()
    for name, (title, _, show) in PANELS.items():
        add_panel(name, title, partial(show, library, needs_key) if name == 'server' else partial(show, library))
    lifespan = app.router.lifespan_context
    # tailwind=False: look.css is all there is, and a browser has half a megabyte less to read
    ui.run_with(app, title='Mambino', dark=None, favicon=SIGN, language='en-US', tailwind=False,
                show_welcome_message=False, reconnect_timeout=PATIENCE)

    @asynccontextmanager
    async def begun(app):
        """The page's life in the app's. run_with's own looks for its server among all objects there are,
        which takes a second where torch is, and makes torch warn."""
        async with pages.router.lifespan_context(pages), lifespan(app) as state:
            core.sio.eio.ping_interval = PING
            yield state
    app.router.lifespan_context = begun


def add_panel(name, title, show):
    """The page of one panel."""

    @ui.page(f'/{name}', title=f'{title} · Mambino' if name else 'Mambino')
    def page():
        with ui.element('div').classes('shell'):
            look.Words('a', 'Skip to the content').classes('skip').props('href=#content')
            show_places(name)
            with ui.element('main').classes('panel').props('id=content tabindex=-1'):
                show()


def show_places(here):
    """Where one can go, and the switch of the theme."""
    with ui.element('header').classes('side'):
        with ui.element('a').classes('brand').props('href=/'):
            ui.html(SIGN, sanitize=False, tag='span')
            ui.label('Mambino')
        with ui.element('nav').classes('places').props('aria-label=Panels'):
            for name, (title, sign, _) in PANELS.items():
                if name in GROUPS:
                    ui.label(GROUPS[name]).classes('group')
                with ui.element('a').classes('place').props(f'href=/{name} data-testid=go-{name or "start"}') as place:
                    ui.icon(sign).props('aria-hidden=true')
                    ui.label(title)
                if name == here:
                    place.props['aria-current'] = 'page'
        with ui.element('div').classes('foot'):
            switch = ui.element('button').classes('theme').props('type=button data-testid=theme')
            switch.on('click', js_handler='() => mambino.toggle()')
            with switch:
                ui.icon('contrast').props('aria-hidden=true')
                ui.label('Light or dark').classes('word')
