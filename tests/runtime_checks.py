"""The checker that the jaxtyping hook puts on every function of bytejepa under pytest: shapes, dtypes and plain types."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float here, as for mypy
