"""What ledgers say, in tables and files."""
