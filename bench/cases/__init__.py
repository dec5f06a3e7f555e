"""What is measured, a file for each family of ops."""
