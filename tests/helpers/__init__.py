"""What several files of tests build, draw and compare. Not collected."""
