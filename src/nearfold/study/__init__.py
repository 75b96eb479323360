"""Studies: many runs, one table, one report.

`nearfold.study.spectrum.run` is the main job. Nothing is imported here, so that the parts that need no
training stay cheap to import.
"""
