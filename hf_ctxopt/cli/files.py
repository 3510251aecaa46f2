"""Files that commands read and write: what is wrong with one is said before anything is loaded or measured."""

from __future__ import annotations

from pathlib import Path

from hf_ctxopt.errors import ConfigError


def text_in(file: Path, field: str = "file") -> str:
    """Returns the text of a file.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(field, str(file), f"a readable UTF-8 text file ({error})") from error


def read(file: Path, field: str = "file") -> str:
    """Returns the text of a file that must have some.

    Raises:
        ConfigError: if it cannot be read or is empty.
    """
    text = text_in(file, field)
    if not text.strip():
        raise ConfigError(field, str(file), "a file with some text in it")
    return text


def check_output(field: str, path: Path | None, suffix: str | None = None) -> None:
    """Refuses a path that cannot be written, before anything is measured.

    Raises:
        ConfigError: if it is a directory, its folder cannot be made, or it ends otherwise than in `suffix`.
    """
    if path is None:
        return
    if suffix is not None and path.suffix.lower() != suffix:
        raise ConfigError(field, str(path), f"a file name that ends in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(field, str(path), f"a file that can be written ({error})") from error
