"""The panel Server."""
from nicegui import ui


def show(library):
    """Fills the panel."""
    ui.label('Server')
