"""`archopt speed`: how long a step takes, beside other rules and beside what memory allows, in one run."""
