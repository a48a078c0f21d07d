"""Free text within Markdown."""


def escaped(words: str) -> str:
    """Free text, with the characters that Markdown and HTML would take as their own made harmless."""
    words = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;")
    for character in "\\`*_[]|":
        words = words.replace(character, f"\\{character}")
    return words
