"""The page: what all panels have in common, and which there are.

    add_page(app, library)      # at /, on the API's app
"""
from nicegui import ui

from mambino.serve.page import data, export, generate, machine, perplexity, runs, server, train

# of each panel its title in the address and on the page, and what fills it
PANELS = {
    'machine': ('Machine', machine.show),
    'data': ('Data', data.show),
    'train': ('Train', train.show),
    'runs': ('Runs', runs.show),
    'generate': ('Generate', generate.show),
    'perplexity': ('Perplexity', perplexity.show),
    'export': ('Export', export.show),
    'server': ('Server', server.show),
}


def add_page(app, library):
    """Puts the page on an app."""

    @ui.page('/')
    def main():
        with ui.tabs() as tabs:
            for name, (title, _) in PANELS.items():
                ui.tab(name, label=title)
        with ui.tab_panels(tabs, value='machine').classes('w-full'):
            for name, (_, show) in PANELS.items():
                with ui.tab_panel(name):
                    show(library)

    ui.run_with(app, title='Mambino')
