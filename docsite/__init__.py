"""The documentation as a site: `make docs` builds it, strictly, from docs/ and from the library itself.

Pages that are written lie in docs/ and read as well on GitHub; pages that follow from the library (operators, the
reference, lists) are made anew at every build and are not kept.
"""
