"""What the tables among the sources hold, looked at before they are read: the files of a folder choose
their text column together, and a large one is cut into parts that are read side by side.

    sources, plans, skipped = survey.survey(sources, options)    # a plan for each that is left

A plan is a dict that JSON can hold and that its reader finds among its options: {} for what needs
none, {'parts': [...]} where the file is to be read in parts, of which a reader gets one as 'part'.
"""


def survey(sources, options):
    """(the sources that can be read, a plan for each of them, [{'file', 'reason'}] of the others)"""
    return sources, [{} for _ in sources], []
