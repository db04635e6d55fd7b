"""What reading found that the reader of a report should know, although nothing is wrong."""

from sparsetrain.core.quote import quoted


class Remarks:
    """Each kind of remark, how often it was made, and where first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, where: object) -> None:
        """Count a remark such as "lone surrogates replaced by U+FFFD"; `where` is kept of the first."""
        count, first = self._found.get(what, (0, str(where)))
        self._found[what] = (count + 1, first)

    def text(self) -> str:
        """To follow a description: "; 3 lone surrogates replaced by U+FFFD (first: a.jsonl:7)"."""
        return "".join(f"; {count:,} {what} (first: {quoted(first)})" for what, (count, first) in self._found.items())
