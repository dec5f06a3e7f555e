"""Other libraries, one file each. None is imported before it is used."""
