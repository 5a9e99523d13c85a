"""The panel that says what this machine is."""
from nicegui import ui

from mambino.machine import machine_name


def show(library):
    """Fills the panel."""
    ui.label(machine_name('cpu'))
