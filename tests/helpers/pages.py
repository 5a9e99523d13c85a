"""An HTML file that one of our scripts wrote, as its reader sees it, without a browser."""
import json
from html.parser import HTMLParser

LEADING = ('src', 'href', 'data', 'action', 'formaction', 'background', 'poster')


class Page(HTMLParser):
    """text: what is read; tags: in their order; links: what attributes would fetch or run; data: what stands in it
    for its script."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.links = []
        self.words = []
        self.data = []
        with open(path, encoding='utf-8') as f:
            self.source = f.read()
        self.feed(self.source)
        self.text = ' '.join(self.words)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in LEADING or name.startswith('on')]

    def handle_data(self, data):
        last = self.tags[-1] if self.tags else ''
        if last == 'script' and data.startswith('{'):
            self.data.append(json.loads(data))
        elif last not in ('script', 'style'):
            self.words.append(data)
