"""The type checker that jaxtyping's import hook puts on every function whose shapes are checked at run time."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""beartype, with an int where a float is expected."""
