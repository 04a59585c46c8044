"""One quick request to the Hugging Face hub, before its clients retry for minutes."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.parse
import urllib.request

TIMEOUT_S = 10.0


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids network access."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}


def first_line(error: BaseException) -> str:
    """The message of another library's error, shortened to fit into a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def unreachable(path: str, timeout: float = TIMEOUT_S) -> str | None:
    """None if the hub answers for ``path`` (`api/datasets/NAME`, `api/models/NAME`); else the reason, in a few words.

    Honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the proxy variables. Takes at most about ``timeout`` seconds, even
    if the name server never answers.
    """
    if offline():
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{urllib.parse.quote(path)}", method="HEAD")
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    answer: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=timeout).close()
            answer.append(None)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                answer.append(f"{endpoint} answers {error.code}: no such name, or it needs HF_TOKEN")
            elif error.code == 404:
                answer.append(f"{endpoint} knows no such name")
            else:
                # The hub is reachable; other answers are for its own client to handle.
                answer.append(None if error.code < 500 else f"{endpoint} answers {error.code}")
        except (OSError, ValueError) as error:
            answer.append(f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})")

    # A thread, since a name server that never answers ignores the timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 2)
    return answer[0] if answer else f"{endpoint} did not answer within {timeout:.0f} s"
