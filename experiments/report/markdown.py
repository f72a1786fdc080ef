"""Tables in Markdown, and the words of their cells."""

NOT_MEASURED = "not measured"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(mean: float, low: float, high: float, digits: int) -> str:
    text = f"{mean:.{digits}f}"
    return text if low == high else f"{text} ({low:.{digits}f} to {high:.{digits}f})"
