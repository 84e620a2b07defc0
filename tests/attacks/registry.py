"""The list of hostile files: sound but for one thing, every digest correct, so that only that thing can be refused.

Name → maker, the error it must raise, and words its message must hold. A maker takes no argument and returns the file's
bytes. Importing ``sections`` and ``documents`` fills the list.
"""

HOSTILE = {}


def hostile(error, *words):
    """Enter a maker in the list under its own name."""

    def enter(maker):
        HOSTILE[maker.__name__] = (maker, error, words)
        return maker

    return enter


def several(error, words, **makers):
    """Enter makers that differ in one value."""
    for name, maker in makers.items():
        HOSTILE[name] = (maker, error, (words,))
