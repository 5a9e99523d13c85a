"""The panel Runs."""
from nicegui import ui


def show(library):
    """Fills the panel."""
    ui.label('Runs')
