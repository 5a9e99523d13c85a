"""The panel Export."""
from nicegui import ui


def show(library):
    """Fills the panel."""
    ui.label('Export')
