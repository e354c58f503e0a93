"""The address of a server and the key for it, as the user gives them."""
import os
import re
from urllib.parse import SplitResult, urlsplit

from plumbing.errors import BadInput


def parse_url(url: str) -> SplitResult:
    """A server's address, taken apart. "/v1" and "/v1/completions" at its end may be left out."""
    if re.search(r"[@?#]", url):  # there may be a password in it, so the message does not show it
        raise BadInput("--server: give the address alone, as http://HOST:PORT; "
                       "a key goes into an environment variable (--api-key-env)")
    try:
        address = urlsplit(re.sub(r"/*(/v1)?(/completions)?/*$", "", url))
        has_good_port = address.port is None or address.port > 0  # .port raises ValueError if it is no number
        known = address.scheme in ("http", "https") and address.hostname and has_good_port
    except ValueError:
        known = False
    if not known or not re.fullmatch(r"[!-~]+", url):
        raise BadInput(f"--server {url!r}: not an address; give it as http://HOST:PORT")
    return address


def read_key(name: str | None) -> str | None:
    """The key in the environment variable `name`. No message shows the name: it may be the key itself."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise BadInput("--api-key-env: give the NAME of an environment variable that is set, "
                       "not the key itself")
    if not re.fullmatch(r"[!-~]+", key):
        raise BadInput("--api-key-env: the variable's value has characters that no key has (blanks or beyond "
                       "ASCII); set it anew")
    return key
