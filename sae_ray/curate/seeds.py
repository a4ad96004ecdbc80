"""Seeds."""
import re
def query_terms(text: str) -> list[str]:
    return sorted({w.lower() for w in re.findall(r"[^\W_]+", text)})
