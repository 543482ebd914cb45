"""One file a question; each prints a table and can write its raw numbers as JSON."""
