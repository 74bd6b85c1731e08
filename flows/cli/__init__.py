"""The command line: commands, what each does around its work, and what it prints."""
