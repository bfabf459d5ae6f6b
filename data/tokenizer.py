"""Vocabularies of characters or symbols, and the text that the scripts train on when none is given.

The only module that the scripts share. A token id is a place in the list of names of a vocabulary.
"""

from pathlib import Path


class Tokenizer:
    """Maps strings to ids and back. Special tokens (mask, pad, end, ...) have names and come first.

    symbols  the distinct strings of the vocabulary, in id order behind the special tokens
    special  names such as "<mask>"; tok["<mask>"] is the id
    sep      "" if a text is a run of characters, " " if it is symbols with spaces between them
    """

    def __init__(self, symbols, special=(), sep=""):
        self.special, self.symbols, self.sep = tuple(special), tuple(symbols), sep
        self.names = self.special + self.symbols
        self.ids = {name: i for i, name in enumerate(self.names)}
        if len(self.ids) < len(self.names):
            twice = next(n for i, n in enumerate(self.names) if self.ids[n] != i)
            raise ValueError(f"{twice!r} is twice in the vocabulary; every name needs one id")
        if sep not in ("", " "):
            raise ValueError(f"sep={sep!r} must be '' (characters) or ' ' (symbols between spaces)")
        for name in self.symbols:
            if (name.split() != [name]) if sep else (len(name) != 1):
                kind = "a symbol without spaces" if sep else "a single character; set sep=' '"
                raise ValueError(f"{name!r} is not {kind}")

    @classmethod
    def from_text(cls, text, special=()):
        """The vocabulary of all characters of a text, in code-point order."""
        return cls(sorted(set(text)), special)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, name):
        """The id of a symbol or special token."""
        if name not in self.ids:
            raise ValueError(f"{name!r} is not in the vocabulary of {len(self)} names")
        return self.ids[name]

    def encode(self, text):
        """A string, or a list of names -> list of ids. Only a list can hold special tokens."""
        if not isinstance(text, str):
            return [self[name] for name in text]
        parts = text.split() if self.sep else text
        if special := set(parts) & set(self.special):
            raise ValueError(f"special token {special.pop()!r} in a string; encode a list of names")
        return [self[name] for name in parts]

    def decode(self, ids):
        """Ids (a sequence or tensor of integers) -> string; the inverse of encode."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self):
                raise ValueError(f"id {i} is outside the vocabulary of {len(self)} names")
        return self.sep.join(self.names[i] for i in ids)

    def state_dict(self):
        """Lists and strings only, fit for a checkpoint that is loaded with weights_only=True."""
        return {"symbols": list(self.symbols), "special": list(self.special), "sep": self.sep}

    @classmethod
    def from_state(cls, state):
        """The inverse of state_dict."""
        return cls(**state)


def load_corpus(path=None):
    """The text of a UTF-8 file; without a path, the Python language reference.

    Every CPython carries the reference (`pydoc_data.topics`, about half a megabyte of English prose
    and code), so nothing is downloaded. Topics are joined in alphabetical order. A file that cannot
    be used raises ValueError with one line that says why.
    """
    if not path:
        from pydoc_data.topics import topics
        return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ValueError(f"corpus={path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus={path} is not UTF-8 (byte {error.start}); convert it") from None
    if not text.strip():
        raise ValueError(f"corpus={path} is empty; give a text of a few kilobytes or more")
    return text
