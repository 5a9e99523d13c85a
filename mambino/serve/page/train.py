"""The panel Train."""
from nicegui import ui


def show(library):
    """Fills the panel."""
    ui.label('Train')
