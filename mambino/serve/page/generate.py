"""The panel on which a model writes."""
from nicegui import ui


def show(library):
    """Fills the panel."""
    ui.label(', '.join(run['id'] for run in library.names()))
