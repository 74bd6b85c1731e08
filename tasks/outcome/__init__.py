"""What came of a run: its record, its gate, who hears of it."""
