"""Choosing files and folders of the machine that the server runs on.

    paths = Paths(changed)          # a list, to which one types, or browses
    paths.chosen                    # ['/home/me/books', …]
"""
import os

from nicegui import ui

from mambino.serve import datasets, launch
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.words import bytes_in_words


class Paths:
    """See the top of the file."""

    def __init__(self, changed):
        self.changed = changed
        self.chosen = []
        with look.row().classes('tight'):
            self.typed = look.field(ui.input('A file, a folder, a pattern as books/**/*.pdf'), 'path-typed')
            self.typed.style('flex-basis: 320px')
            self.typed.on('keydown.enter', self.on_add)
            look.mark(ui.button('Add', icon='add', on_click=self.on_add).props('outline'), 'path-add')
            look.mark(ui.button('Browse…', icon='folder_open', on_click=self.on_browse).props('outline'), 'path-browse')
        self.trouble = look.trouble(test_id='path-trouble')
        self.shown = look.mark(ui.element('div').classes('chosen'), 'paths')
        self.folder = os.path.abspath('.')
        self.dialog = None
        self.show()

    def show(self):
        self.shown.clear()
        with self.shown:
            if not self.chosen:
                ui.label('Nothing chosen: Python\'s own standard library is taken, ten megabytes of code to try it '
                         'on.').classes('muted')
            for path in self.chosen:
                with ui.element('div'):
                    ui.icon('folder' if os.path.isdir(path) else 'description').props('aria-hidden=true')
                    ui.label(path).classes('path')
                    button = ui.button(icon='close', on_click=lambda path=path: self.remove(path))
                    button.props('flat dense round size=sm').props['aria-label'] = f'Leave out {path}'

    async def add(self, text):
        """Returns whether that can be."""
        try:
            path = await away(launch.input_path, text)
        except launch.Refused as refusal:
            self.trouble.text = str(refusal)
            return False
        self.trouble.text = ''
        if path not in self.chosen:
            self.chosen.append(path)
        self.show()
        self.changed()
        return True

    def remove(self, path):
        self.chosen.remove(path)
        self.show()
        self.changed()

    async def on_add(self):
        text = self.typed.value
        if text and await self.add(text) and self.typed.value == text:
            self.typed.value = ''

    # --- the folders of the machine

    async def on_browse(self):
        if self.dialog is None:
            with ui.dialog() as self.dialog, ui.element('div').classes('dialog-card q-card'):
                look.heading('Choose files and folders')
                with look.row().classes('tight'):
                    self.up = ui.button(icon='arrow_upward', on_click=lambda: self.open(os.path.dirname(self.folder)))
                    self.up.props('outline dense').props['aria-label'] = 'To the folder above'
                    look.mark(self.up, 'browse-up')
                    home = ui.button(icon='home', on_click=lambda: self.open('~')).props('outline dense')
                    home.props['aria-label'] = 'To your own folder'
                    look.mark(home, 'browse-home')
                    self.where = look.field(ui.input('Folder'), 'browse-folder')
                    self.where.on('keydown.enter', lambda: self.open(self.where.value))
                self.dialog_trouble = look.trouble(test_id='browse-trouble')
                self.entries = look.mark(ui.element('div').classes('entries'), 'entries')
                with look.row().classes('justify-end'):
                    look.mark(ui.button('Take this folder', on_click=self.on_this).props('outline'), 'browse-this')
                    look.mark(ui.button('Done', on_click=self.dialog.close), 'browse-done')
        self.dialog.open()
        await self.open(self.folder)

    async def open(self, folder):
        """Shows what a folder holds."""
        try:
            entries, more = await away(datasets.listing, os.path.abspath(os.path.expanduser(folder)))
        except (OSError, ValueError) as error:
            self.dialog_trouble.text = f'{folder}: {getattr(error, "strerror", None) or error}'
            return
        self.dialog_trouble.text = ''
        self.folder = os.path.abspath(os.path.expanduser(folder))
        self.where.value = self.folder
        self.entries.clear()
        with self.entries:
            if not entries:
                ui.label('Nothing is here that could be read.').classes('muted p-0').style('padding: 12px')
            for entry in entries:
                self.show_entry(entry)
            if more:
                ui.label(f'… and {more:,} more').classes('muted').style('padding: 8px')

    def show_entry(self, entry):
        with ui.element('div').classes('entry'):
            ui.icon('folder' if entry.is_folder else 'description').props('aria-hidden=true')
            if entry.is_folder:
                opened = look.Words('button', entry.name).classes('name').props('type=button')
                opened.on('click', lambda: self.open(entry.path))
            else:
                ui.label(entry.name).classes('name')
                ui.label(bytes_in_words(entry.size)).classes('size')
            button = ui.button('Take', on_click=lambda: self.on_take(entry.path, button)).props('flat dense size=sm')
            button.props['aria-label'] = f'Take {entry.name}'

    async def on_take(self, path, button):
        await self.add(path)
        button.set_text('Taken')
        button.set_enabled(False)

    async def on_this(self):
        await self.add(self.folder)
        self.dialog.close()
