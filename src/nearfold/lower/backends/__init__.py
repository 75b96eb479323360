"""One file for each way to run a `Basic` operation fast; they do not import each other."""
