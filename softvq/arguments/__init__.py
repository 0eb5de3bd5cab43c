"""What stands on the command line: argparse parsers, one module for each group of commands. Nothing heavy here."""
