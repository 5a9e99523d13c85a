"""The panel Data."""
from nicegui import ui


def show(library):
    """Fills the panel."""
    ui.label('Data')
