"""HTML files made of a template of this folder, its styles and its scripts, and nothing from elsewhere.

    head, tail = template("page.html", styles=("look.css",), scripts=("page.js",)).split("<!-- data -->")

A Content-Security-Policy holds the browser to it: it allows the style and the script with these hashes alone.
"""
import base64
import hashlib
from pathlib import Path

HERE = Path(__file__).parent


def template(name: str, styles: tuple[str, ...], scripts: tuple[str, ...] = ()) -> str:
    """A page of this folder with its styles and scripts, and with a policy that allows these alone."""
    style = joined(styles)
    script = joined(scripts)
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {csp_hash(style)}"
    if scripts:
        policy += f"; script-src {csp_hash(script)}"
    page = (HERE / name).read_text(encoding="utf-8")
    return page.replace("{policy}", policy).replace("{style}", style).replace("{script}", script)


def joined(names: tuple[str, ...]) -> str:
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


def csp_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
