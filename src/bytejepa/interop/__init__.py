"""Other people's files, in and out: `pr832` reads and writes what the reference system's own script made."""
