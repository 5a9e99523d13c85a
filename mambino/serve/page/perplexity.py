"""The panel Perplexity."""
from nicegui import ui


def show(library):
    """Fills the panel."""
    ui.label('Perplexity')
