"""The measured cases, one file for each family of ops."""
