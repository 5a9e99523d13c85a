"""What takes long, away from the loop that serves all pages.

    standing = await away(runs.standing, 'out')
"""
import asyncio

from nicegui import run


async def away(function, *arguments):
    """What a function returns that is called in a thread. Where the server ends meanwhile, nothing more
    happens with it: CancelledError."""
    result = await run.io_bound(lambda: (function(*arguments),))
    if result is None:          # NiceGUI's word for: it ends
        raise asyncio.CancelledError
    return result[0]
