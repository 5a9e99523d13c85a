"""Small language models from your own files. The commands stand a folder above; this is what they are made of."""

__version__ = '0.4.0'
